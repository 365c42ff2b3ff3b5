// Built with -mavx2 -mfma -mf16c.
#include "panels-inl.h"
#include "panels_avx2.h"
#include "simd_avx2.h"

namespace pi2 {
const Kernels* kernels_avx2() {
  static constexpr Panels panels = MakePanels<Avx2, Avx2Panels>::table();
  static constexpr Kernels table = Make<Avx2>::table(&panels);
  return &table;
}
}  // namespace pi2
