// Built with -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vnni.
#include "panels-inl.h"
#include "panels_avx512_vnni.h"
#include "simd_avx512_vnni.h"

namespace pi2 {
const Kernels* kernels_avx512_vnni() {
  static constexpr Panels panels = MakePanels<Avx512Vnni, VnniPanels>::table();
  static constexpr Kernels table = Make<Avx512Vnni>::table(&panels);
  return &table;
}
}  // namespace pi2
