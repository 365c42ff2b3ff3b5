// Built with -march=armv8.2-a+dotprod+fp16.
#include "kernels-inl.h"
#include "simd_neon.h"

namespace pi2 {
const Kernels* kernels_neon_dotprod() {
  static constexpr Kernels table = Make<Neon>::table();
  return &table;
}
}  // namespace pi2
