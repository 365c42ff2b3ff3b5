// Matrix times one token, all rows or some; two small ones that name rows of the second.
#include <algorithm>

#include "context.h"

void pi2_cpu::quantise(const float* x, int64_t n, int64_t cols, QuantisedBatch& into) {
  const int64_t blocks = cols / pi2::kBlock;
  into.cols = cols;
  into.quants.resize(n * cols);
  into.shuffled.resize(n * cols);
  into.scales.resize(n * blocks);
  into.offsets.resize(n * blocks);
  pool.for_each(n, [&](int64_t t) {
    kernels->quantise(x + t * cols, cols, into.quants.data() + t * cols, into.shuffled.data() + t * cols,
                      into.scales.data() + t * blocks, into.offsets.data() + t * blocks);
  });
}

namespace {

// The rows of a product as chunks to claim: one for every thread of half of the rows, then of half of what is
// left, and so on.  Long ones, because memory is slow where a stream begins; short ones at the end, so that
// all threads end together.
class Chunks {
 public:
  Chunks(const pi2_cpu& cpu, const pi2_cpu::Product& p)
      : rows_(p.n_rows),
        threads_(cpu.pool.size()),
        least_(std::clamp<int64_t>((1 << 14) / std::max<int64_t>(p.w->row_bytes, 1), 8, 64)) {}

  // Calls with (first row, rows) of every chunk in turn until it says true.
  template <class Body>
  void find(Body&& body) const {
    for (int64_t first = 0, size = 0; first < rows_;) {
      size = std::max(least_, (rows_ - first) / (2 * threads_));
      for (int64_t t = 0; t < threads_ && first < rows_; ++t, first += size)
        if (body(first, std::min(size, rows_ - first))) return;
    }
  }

  int64_t count() const {
    int64_t found = 0;
    find([&](int64_t, int64_t) { return ++found, false; });
    return found;
  }

 private:
  int64_t rows_, threads_, least_;
};

// The weights pass by once, as fast as memory gives them.
void multiply_rows(const pi2_cpu& cpu, const pi2_cpu::Product& p, const float* x, int64_t first, int64_t n) {
  constexpr int64_t kAtOnce = 256;
  const pi2_matrix& w = *p.w;
  for (int64_t end = first + n; first < end; first += kAtOnce) {
    const uint8_t* rows[kAtOnce];
    const int64_t count = std::min(end - first, kAtOnce);
    for (int64_t j = 0; j < count; ++j)
      rows[j] = w.data + (p.rows ? p.rows[first + j] : first + j) * w.row_bytes;
    dot_rows(cpu, w.dtype, rows, nullptr, count, x, cpu.batch, w.cols, p.out + first);
  }
}

}  // namespace

void pi2_cpu::multiply(const float* x, int64_t n, const Product* products, int count) {
  if (n > 1) return multiply_many(x, n, products, count);
  bool integers = false;
  int64_t chunks = 0;
  for (int i = 0; i < count; ++i) {
    integers |= integers_for(products[i].w->dtype);
    chunks += Chunks(*this, products[i]).count();
  }
  if (integers) quantise(x, 1, products->w->cols, batch);
  pool.for_each(chunks, [&](int64_t chunk) {
    const Product* p = products;
    for (int64_t here; chunk >= (here = Chunks(*this, *p).count()); ++p) chunk -= here;
    Chunks(*this, *p).find([&](int64_t first, int64_t rows) {
      if (chunk-- > 0) return false;
      multiply_rows(*this, *p, x, first, rows);
      return true;
    });
  });
}

extern "C" void pi2_cpu_linear(pi2_cpu* cpu, const pi2_matrix* w, const float* x, int64_t n,
                               const int32_t* rows, int64_t n_rows, float* out) {
  if (n == 0 || n_rows == 0) return;
  const pi2_cpu::Product product{w, rows, n_rows, out};
  cpu->multiply(x, n, &product, 1);
}

extern "C" int64_t pi2_cpu_low_rank(pi2_cpu* cpu, const pi2_matrix* inner, const float* bias,
                                    const pi2_matrix* outer, const float* bounds, const float* x,
                                    int32_t* rows, float* above) {
  cpu->inner.resize(inner->rows);
  cpu->scores.resize(outer->rows);
  const pi2_cpu::Product first{inner, nullptr, inner->rows, cpu->inner.data()};
  cpu->multiply(x, 1, &first, 1);
  for (int64_t j = 0; j < inner->rows; ++j) {
    const float sum = cpu->inner[j] + bias[j];
    cpu->inner[j] = sum <= 0 ? 0.0f : sum;
  }
  const pi2_cpu::Product second{outer, nullptr, outer->rows, cpu->scores.data()};
  cpu->multiply(cpu->inner.data(), 1, &second, 1);
  int64_t count = 0;
  for (int64_t i = 0; i < outer->rows; ++i) {
    rows[count] = static_cast<int32_t>(i);
    above[count] = cpu->scores[i] - bounds[i];
    count += !(cpu->scores[i] <= bounds[i]);
  }
  return count;
}
