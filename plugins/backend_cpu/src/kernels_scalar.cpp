// Built without any instruction set flags.
#include "kernels-inl.h"
#include "simd_scalar.h"

namespace pi2 {
const Kernels* kernels_scalar() {
  static constexpr Kernels table = Make<Scalar>::table();
  return &table;
}
}  // namespace pi2
