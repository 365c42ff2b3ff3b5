// The FFN as a sum over its neurons: gate first, up where the gate is not zero, down as a sum of rows.
#include <algorithm>
#include <atomic>

#include "ffn.h"
#include "cluster.h"
#include "context.h"

namespace {

constexpr int64_t kNeurons = 16;  // claimed at a time: some 10 us of work
constexpr int64_t kPanel = 64;  // neurons decoded at a time for many tokens: 64 x 64 floats fit the L1 cache

constexpr int64_t kAhead = 4;  // neurons: a dot takes some 40 ns, memory some 100 ns

const uint8_t* bundle(const pi2_ffn& f, const int32_t* rows, int64_t i) {
  return f.bundles + (rows ? rows[i] : i) * f.stride;
}

// Asks memory for what the dots of a neuron certainly read: bundles lie too far apart for the hardware, which
// stops at the end of a page.
void prefetch(const pi2_ffn& f, const uint8_t* b) {
  const bool sparse = f.gate != PI2_NONE && (f.activation == PI2_RELU || f.activation == PI2_RELU2);
  const int64_t first = f.gate == PI2_NONE ? f.up_offset : f.gate_offset;
  for (int64_t at = first; at < (sparse ? f.up_offset : f.down_offset); at += 64) __builtin_prefetch(b + at);
}

// h of one neuron for tokens t .. t + count - 1; returns how many are not zero.
int neuron(const pi2_cpu& cpu, const pi2_ffn& f, const uint8_t* b, const float* x, int64_t t, int count,
           float* h) {
  const int64_t d = f.d_model;
  const bool gated = f.gate != PI2_NONE;
  dots(cpu, gated ? f.gate : f.up, b + (gated ? f.gate_offset : f.up_offset), x, t, count, d, h);
  int active = 0;
  for (int i = 0; i < count; ++i) {
    h[i] = pi2::activate(f.activation, h[i] + pi2::bias(f, b, 0));
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
    up[i] += pi2::bias(f, b, 1);
    h[i] *= f.up_relu && up[i] <= 0 ? 0.0f : up[i];
    active += h[i] != 0.0f;
  }
  return active;
}

// Many tokens: a panel of neurons' columns is decoded once, then every token adds what it needs of it.
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

int64_t one_token(pi2_cpu& cpu, const pi2_ffn& f, const pi2::Candidates& candidates, const float* x, float* out) {
  pi2::OneToken token(cpu, f, candidates, x);
  cpu.pool.for_each(token.ranges(), [&](int64_t range) {
    const int64_t first = token.begin(range), last = token.begin(range + 1);
    token.activate(first, last);
    token.add_down(range, first, last);
  });
  return token.total(out);
}

}  // namespace

extern "C" int64_t pi2_cpu_ffn(pi2_cpu* cpu, const pi2_ffn* f, const float* x, int64_t n, const int32_t* rows,
                               int64_t n_rows, float* out) {
  if (n == 0) return 0;
  if (n == 1) return one_token(*cpu, *f, {rows, nullptr, n_rows}, x, out);
  if (cpu->integers_for(f->gate) || cpu->integers_for(f->up)) cpu->quantise(x, n, f->d_model);
  cpu->hidden.resize(n * n_rows);
  std::atomic<int64_t> active{0};
  cpu->pool.for_each((n_rows + kNeurons - 1) / kNeurons, [&](int64_t chunk) {
    const int64_t end = std::min(n_rows, (chunk + 1) * kNeurons);
    int64_t found = 0;
    for (int64_t t = 0; t < n; t += pi2::kTokens) {
      const int count = static_cast<int>(std::min<int64_t>(pi2::kTokens, n - t));
      for (int64_t i = chunk * kNeurons; i < end; ++i) {
        if (t == 0 && i + kAhead < n_rows) prefetch(*f, bundle(*f, rows, i + kAhead));
        float h[pi2::kTokens];
        found += neuron(*cpu, *f, bundle(*f, rows, i), x, t, count, h);
        for (int j = 0; j < count; ++j) cpu->hidden[(t + j) * n_rows + i] = h[j];
      }
    }
    active.fetch_add(found, std::memory_order_relaxed);
  });
  combine_many(*cpu, *f, n, rows, n_rows, out);
  return active.load();
}
