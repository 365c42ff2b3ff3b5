#include "cluster.h"

#include <algorithm>

#include "ffn.h"

namespace pi2 {
namespace {

constexpr int64_t kRanges = 32;  // enough to share out among threads evenly
constexpr int64_t kSmallest =
    96;  // neurons in a range: its sum costs the memory traffic of about two of them
constexpr int64_t kLargest = 512;
constexpr int64_t kColumns = 1024;  // of the final sum, a task

}  // namespace

int64_t Candidates::first_from(int64_t neuron) const {
  if (ids == nullptr) return std::min(neuron, count);
  return std::lower_bound(ids, ids + count, neuron) - ids;
}

int64_t range_size(int64_t neurons) {
  const int64_t share = (neurons + kRanges - 1) / kRanges;
  return std::clamp<int64_t>((share + 15) / 16 * 16, kSmallest, kLargest);
}

OneToken::OneToken(pi2_cpu& cpu, const pi2_ffn& f, const Candidates& candidates, const float* x)
    : cpu_(cpu), f_(f), candidates_(candidates), x_(x), size_(range_size(f.count)) {
  ranges_ = (f.count + size_ - 1) / size_;
  if (cpu.integers_for(f.gate) || cpu.integers_for(f.up)) cpu.quantise(x, 1, f.d_model);
  cpu.hidden.resize(candidates.count);
  cpu.sums.resize(ranges_ * f.d_model);
  cpu.active.resize(ranges_);
  hidden = cpu.hidden.data();
}

void OneToken::dots(int32_t dtype, const uint8_t* const* rows, int64_t k, float* out) const {
  dot_rows(cpu_, dtype, rows, k, x_, f_.d_model, out);
}

void OneToken::activate(int64_t first, int64_t last) {
  const bool gated = f_.gate != PI2_NONE;
  const uint8_t* rows[kLargest] = {};
  for (int64_t i = first; i < last; ++i)
    rows[i - first] = bundle(i) + (gated ? f_.gate_offset : f_.up_offset);
  dots(gated ? f_.gate : f_.up, rows, last - first, hidden + first);
  int64_t active[kLargest], count = 0;
  for (int64_t i = first; i < last; ++i) {
    hidden[i] = ::activate(f_.activation, hidden[i] + ::bias(f_, bundle(i), 0));
    if (hidden[i] != 0.0f) active[count++] = i;
  }
  if (!gated) return;
  float up[kLargest];
  for (int64_t k = 0; k < count; ++k) rows[k] = bundle(active[k]) + f_.up_offset;
  dots(f_.up, rows, count, up);
  for (int64_t k = 0; k < count; ++k) {
    up[k] += ::bias(f_, bundle(active[k]), 1);
    hidden[active[k]] *= f_.up_relu && up[k] <= 0 ? 0.0f : up[k];
  }
}

void OneToken::add_down(int64_t range, int64_t first, int64_t last) {
  const uint8_t* rows[kLargest] = {};
  float h[kLargest];
  int64_t active = 0;
  for (int64_t i = first; i < last; ++i) {
    if (hidden[i] == 0.0f) continue;
    rows[active] = bundle(i) + f_.down_offset;
    h[active++] = hidden[i];
  }
  cpu_.active[range] = active;
  if (active > 0)
    cpu_.kernels->add_rows(static_cast<DType>(f_.down), rows, h, active, f_.d_model, true,
                           cpu_.sums.data() + range * f_.d_model);
}

int64_t OneToken::total(float* out) {
  const int64_t d = f_.d_model;
  cpu_.pool.for_each((d + kColumns - 1) / kColumns, [&](int64_t part) {
    const int64_t first = part * kColumns, last = std::min(d, first + kColumns);
    std::fill(out + first, out + last, 0.0f);
    for (int64_t r = 0; r < ranges_; ++r) {
      if (cpu_.active[r] == 0) continue;
      const float* sum = cpu_.sums.data() + r * d;
      for (int64_t c = first; c < last; ++c) out[c] += sum[c];
    }
  });
  int64_t active = 0;
  for (int64_t r = 0; r < ranges_; ++r) active += cpu_.active[r];
  return active;
}

}  // namespace pi2
