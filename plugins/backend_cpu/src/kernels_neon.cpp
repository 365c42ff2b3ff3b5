// Built for plain Armv8-A.
#include "panels-inl.h"
#include "panels_neon.h"
#include "simd_neon.h"

namespace pi2 {
const Kernels* kernels_neon() {
  static constexpr Panels panels = MakePanels<Neon, NeonPanels>::table();
  static constexpr Kernels table = Make<Neon>::table(&panels);
  return &table;
}
}  // namespace pi2
