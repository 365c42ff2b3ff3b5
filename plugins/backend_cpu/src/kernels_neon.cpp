// Built for plain Armv8-A.
#include "kernels-inl.h"
#include "simd_neon.h"

namespace pi2 {
const Kernels* kernels_neon() {
  static constexpr Kernels table = Make<Neon>::table();
  return &table;
}
}  // namespace pi2
