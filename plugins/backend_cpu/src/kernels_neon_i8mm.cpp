// Built with -march=armv8.2-a+dotprod+i8mm.
#include "panels-inl.h"
#include "panels_neon_i8mm.h"
#include "simd_neon.h"

namespace pi2 {
const Kernels* kernels_neon_i8mm() {
  static constexpr Panels panels = MakePanels<Neon, NeonI8mmPanels>::table();
  static constexpr Kernels table = Make<Neon>::table(&panels);
  return &table;
}
}  // namespace pi2
