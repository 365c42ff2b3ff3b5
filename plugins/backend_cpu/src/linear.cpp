// Matrix times one token, all rows or some.
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

constexpr int64_t kMaxStep = 256;

// Rows claimed at a time: large enough that claiming costs nothing and that prefetching seldom stops at an
// end (128 KiB are some 6 us of memory traffic), small enough to share out evenly.
int64_t step_of(const pi2_cpu& cpu, const pi2_cpu::Product& p) {
  const int64_t memory = (1 << 17) / std::max<int64_t>(p.w->row_bytes, 1);
  const int64_t share = p.n_rows / (8 * cpu.pool.size());
  return std::clamp<int64_t>(std::min(memory, share), 8, kMaxStep) / 4 * 4;
}

int64_t chunks_of(const pi2_cpu& cpu, const pi2_cpu::Product& p) {
  const int64_t step = step_of(cpu, p);
  return (p.n_rows + step - 1) / step;
}

// The weights pass by once, as fast as memory gives them.
void multiply_chunk(const pi2_cpu& cpu, const pi2_cpu::Product& p, const float* x, int64_t chunk) {
  const pi2_matrix& w = *p.w;
  const int64_t step = step_of(cpu, p), first = chunk * step, count = std::min(p.n_rows - first, step);
  const uint8_t* rows[kMaxStep];
  for (int64_t j = 0; j < count; ++j)
    rows[j] = w.data + (p.rows ? p.rows[first + j] : first + j) * w.row_bytes;
  dot_rows(cpu, w.dtype, rows, count, x, w.cols, p.out + first);
}

}  // namespace

void pi2_cpu::multiply(const float* x, int64_t n, const Product* products, int count) {
  if (n > 1) return multiply_many(x, n, products, count);
  bool integers = false;
  int64_t chunks = 0;
  for (int i = 0; i < count; ++i) {
    integers |= integers_for(products[i].w->dtype);
    chunks += chunks_of(*this, products[i]);
  }
  if (integers) quantise(x, 1, products->w->cols);
  pool.for_each(chunks, [&](int64_t chunk) {
    const Product* p = products;
    for (; chunk >= chunks_of(*this, *p); ++p) chunk -= chunks_of(*this, *p);
    multiply_chunk(*this, *p, x, chunk);
  });
}

extern "C" void pi2_cpu_linear(pi2_cpu* cpu, const pi2_matrix* w, const float* x, int64_t n,
                               const int32_t* rows, int64_t n_rows, float* out) {
  if (n == 0 || n_rows == 0) return;
  const pi2_cpu::Product product{w, rows, n_rows, out};
  cpu->multiply(x, n, &product, 1);
}
