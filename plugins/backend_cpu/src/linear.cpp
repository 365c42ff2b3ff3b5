// Matrix times activations, all rows or some.
#include <algorithm>

#include "context.h"

void pi2_cpu::quantise(const float* x, int64_t n, int64_t cols) {
  const int64_t blocks = cols / pi2::kBlock;
  batch.cols = cols;
  batch.quants.resize(n * cols);
  batch.shuffled.resize(n * cols);
  batch.scales.resize(n * blocks);
  batch.offsets.resize(n * blocks);
  pool.for_each(n, [&](int64_t t) {
    kernels->quantise(x + t * cols, cols, batch.quants.data() + t * cols, batch.shuffled.data() + t * cols,
                      batch.scales.data() + t * blocks, batch.offsets.data() + t * blocks);
  });
}

extern "C" void pi2_cpu_linear(pi2_cpu* cpu, const pi2_matrix* w, const float* x, int64_t n,
                               const int32_t* rows, int64_t n_rows, float* out) {
  if (n == 0 || n_rows == 0) return;
  if (cpu->integers_for(w->dtype)) cpu->quantise(x, n, w->cols);
  // Small enough to share out evenly, large enough that claiming costs nothing (about 10 us of memory
  // traffic).
  const int64_t step = std::clamp<int64_t>((1 << 16) / std::max<int64_t>(w->row_bytes, 1), 4, 256);
  cpu->pool.for_each((n_rows + step - 1) / step, [&](int64_t chunk) {
    const int64_t end = std::min(n_rows, (chunk + 1) * step);
    for (int64_t j = chunk * step; j < end; ++j) {
      const uint8_t* row = w->data + (rows ? rows[j] : j) * w->row_bytes;
      for (int64_t t = 0; t < n; ++t) out[t * n_rows + j] = dot(*cpu, w->dtype, row, x, t, w->cols);
    }
  });
}
