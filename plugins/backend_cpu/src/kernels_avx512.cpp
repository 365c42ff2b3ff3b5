// Built with -mavx2 -mfma -mf16c -mavx512f -mavx512bw.
#include "panels-inl.h"
#include "panels_avx2.h"
#include "simd_avx512.h"

namespace pi2 {
const Kernels* kernels_avx512() {
  static constexpr Panels panels = MakePanels<Avx512, Avx2Panels>::table();
  static constexpr Kernels table = Make<Avx512>::table(&panels);
  return &table;
}
}  // namespace pi2
