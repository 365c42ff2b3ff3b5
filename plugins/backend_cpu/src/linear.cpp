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

namespace {

// Rows claimed at a time: few enough to share out evenly, enough for claiming to cost nothing (about 10 us
// of memory traffic).
int64_t step_of(const pi2_matrix& w) {
  return std::clamp<int64_t>((1 << 16) / std::max<int64_t>(w.row_bytes, 1), 4, 256);
}

int64_t chunks_of(const pi2_cpu::Product& p) {
  const int64_t step = step_of(*p.w);
  return (p.n_rows + step - 1) / step;
}

void multiply_chunk(const pi2_cpu& cpu, const pi2_cpu::Product& p, const float* x, int64_t chunk) {
  const pi2_matrix& w = *p.w;
  const int64_t step = step_of(w), end = std::min(p.n_rows, (chunk + 1) * step);
  for (int64_t j = chunk * step; j < end; ++j)
    p.out[j] = dot(cpu, w.dtype, w.data + (p.rows ? p.rows[j] : j) * w.row_bytes, x, 0, w.cols);
}

}  // namespace

void pi2_cpu::multiply(const float* x, int64_t n, const Product* products, int count) {
  if (n > 1) return multiply_many(x, n, products, count);
  bool integers = false;
  int64_t chunks = 0;
  for (int i = 0; i < count; ++i) {
    integers |= integers_for(products[i].w->dtype);
    chunks += chunks_of(products[i]);
  }
  if (integers) quantise(x, 1, products->w->cols);
  pool.for_each(chunks, [&](int64_t chunk) {
    const Product* p = products;
    for (; chunk >= chunks_of(*p); ++p) chunk -= chunks_of(*p);
    multiply_chunk(*this, *p, x, chunk);
  });
}

extern "C" void pi2_cpu_linear(pi2_cpu* cpu, const pi2_matrix* w, const float* x, int64_t n,
                               const int32_t* rows, int64_t n_rows, float* out) {
  if (n == 0 || n_rows == 0) return;
  const pi2_cpu::Product product{w, rows, n_rows, out};
  cpu->multiply(x, n, &product, 1);
}
