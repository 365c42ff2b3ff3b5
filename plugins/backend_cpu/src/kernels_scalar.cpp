// Built without any instruction set flags.
#include "panels-inl.h"
#include "panels_scalar.h"
#include "simd_scalar.h"

namespace pi2 {
const Kernels* kernels_scalar() {
  static constexpr Panels panels = MakePanels<Scalar, ScalarPanels>::table();
  static constexpr Kernels table = Make<Scalar>::table(&panels);
  return &table;
}
}  // namespace pi2
