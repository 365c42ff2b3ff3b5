// Built with -mavx2 -mfma -mf16c.
#include "kernels-inl.h"
#include "simd_avx2.h"

namespace pi2 {
const Kernels* kernels_avx2() {
  static constexpr Kernels table = Make<Avx2>::table();
  return &table;
}
}  // namespace pi2
