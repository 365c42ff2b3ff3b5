// Many tokens at once: weights are unpacked once for all of them.
#include <algorithm>
#include <atomic>

#include "ffn.h"

namespace {

constexpr int64_t kNeurons = 16;  // claimed at a time: some 10 us of work a token
constexpr int64_t kPanel = 64;    // neurons decoded at a time: 64 x 64 floats fit the L1 cache

// h of one neuron for tokens t .. t + count - 1; returns how many are not zero.
int neuron(const pi2_cpu& cpu, const pi2_ffn& f, const uint8_t* b, const float* x, int64_t t, int count,
           float* h) {
  const int64_t d = f.d_model;
  const bool gated = f.gate != PI2_NONE;
  dots(cpu, gated ? f.gate : f.up, b + (gated ? f.gate_offset : f.up_offset), x, t, count, d, h);
  int active = 0;
  for (int i = 0; i < count; ++i) {
    h[i] = activate(f.activation, h[i] + bias(f, b, 0));
    active += h[i] != 0.0f;
  }
  if (!gated || active == 0) return active;
  float up[pi2::kTokens];
  if (2 * active > count) {
    dots(cpu, f.up, b + f.up_offset, x, t, count, d, up);
  } else {  // the same bits for those that matter
    for (int i = 0; i < count; ++i)
      if (h[i] != 0.0f) up[i] = dot(cpu, f.up, b + f.up_offset, x, t + i, d);
  }
  active = 0;
  for (int i = 0; i < count; ++i) {
    if (h[i] == 0.0f) continue;
    up[i] += bias(f, b, 1);
    h[i] *= f.up_relu && up[i] <= 0 ? 0.0f : up[i];
    active += h[i] != 0.0f;
  }
  return active;
}

// A panel of neurons' columns is decoded once, then every token adds what it needs of it.
void combine_many(pi2_cpu& cpu, const pi2_ffn& f, int64_t n, const int32_t* rows, int64_t n_rows,
                  float* out) {
  const int64_t slices = (f.d_model + kPanel - 1) / kPanel;
  cpu.slices.resize(std::max<size_t>(cpu.slices.size(), slices));
  cpu.pool.for_each(slices, [&](int64_t slice) {
    const int64_t first = slice * kPanel, last = std::min(f.d_model, first + kPanel), width = last - first;
    auto& panel = cpu.slices[slice];
    panel.resize(kPanel * kPanel + n * width);
    float* sums = panel.data() + kPanel * kPanel;  // (n, width)
    std::fill(sums, sums + n * width, 0.0f);
    for (int64_t i = 0; i < n_rows; i += kPanel) {
      const int64_t k = std::min(kPanel, n_rows - i);
      const uint8_t* down[kPanel];
      for (int64_t j = 0; j < k; ++j) down[j] = bundle(f, rows, i + j) + f.down_offset;
      cpu.kernels->decode(static_cast<pi2::DType>(f.down), down, k, f.d_model, first, last, panel.data());
      for (int64_t t = 0; t < n; ++t)
        cpu.kernels->add_product(cpu.hidden.data() + t * n_rows + i, panel.data(), k, width,
                                 sums + t * width);
    }
    for (int64_t t = 0; t < n; ++t) std::copy_n(sums + t * width, width, out + t * f.d_model + first);
  });
}

int64_t rows_at_a_time(const pi2_matrix& w) {
  return std::clamp<int64_t>((1 << 16) / std::max<int64_t>(w.row_bytes, 1), 4, 256);
}

int64_t chunks_of(const pi2_cpu::Product& p) {
  const int64_t step = rows_at_a_time(*p.w);
  return (p.n_rows + step - 1) / step;
}

// A few tokens stay in the L1 cache while the chunk's rows pass by, from memory or from the L2 cache.
void multiply_chunk(const pi2_cpu& cpu, const pi2_cpu::Product& p, const float* x, int64_t n, int64_t chunk) {
  const pi2_matrix& w = *p.w;
  const int64_t step = rows_at_a_time(w), end = std::min(p.n_rows, (chunk + 1) * step);
  for (int64_t t = 0; t < n; t += pi2::kTokens) {
    const int count = static_cast<int>(std::min<int64_t>(pi2::kTokens, n - t));
    for (int64_t j = chunk * step; j < end; ++j) {
      float y[pi2::kTokens];
      dots(cpu, w.dtype, w.data + (p.rows ? p.rows[j] : j) * w.row_bytes, x, t, count, w.cols, y);
      for (int i = 0; i < count; ++i) p.out[(t + i) * p.n_rows + j] = y[i];
    }
  }
}

}  // namespace

void pi2_cpu::multiply_many(const float* x, int64_t n, const Product* products, int count) {
  bool integers = false;
  int64_t chunks = 0;
  for (int i = 0; i < count; ++i) {
    integers |= integers_for(products[i].w->dtype);
    chunks += chunks_of(products[i]);
  }
  if (integers) quantise(x, n, products->w->cols);
  pool.for_each(chunks, [&](int64_t chunk) {
    const Product* p = products;
    for (; chunk >= chunks_of(*p); ++p) chunk -= chunks_of(*p);
    multiply_chunk(*this, *p, x, n, chunk);
  });
}

int64_t ffn_many(pi2_cpu& cpu, const pi2_ffn& f, const float* x, int64_t n, const int32_t* rows,
                 int64_t n_rows, float* out) {
  if (cpu.integers_for(f.gate) || cpu.integers_for(f.up)) cpu.quantise(x, n, f.d_model);
  cpu.hidden.resize(n * n_rows);
  std::atomic<int64_t> active{0};
  cpu.pool.for_each((n_rows + kNeurons - 1) / kNeurons, [&](int64_t chunk) {
    const int64_t end = std::min(n_rows, (chunk + 1) * kNeurons);
    int64_t found = 0;
    for (int64_t t = 0; t < n; t += pi2::kTokens) {
      const int count = static_cast<int>(std::min<int64_t>(pi2::kTokens, n - t));
      for (int64_t i = chunk * kNeurons; i < end; ++i) {
        float h[pi2::kTokens];
        found += neuron(cpu, f, bundle(f, rows, i), x, t, count, h);
        for (int j = 0; j < count; ++j) cpu.hidden[(t + j) * n_rows + i] = h[j];
      }
    }
    active.fetch_add(found, std::memory_order_relaxed);
  });
  combine_many(cpu, f, n, rows, n_rows, out);
  return active.load();
}
