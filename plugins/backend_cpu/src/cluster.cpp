#include "cluster.h"

#include <algorithm>

#include "ffn.h"

namespace pi2 {
namespace {

constexpr int64_t kRanges = 32;  // enough to share out among threads evenly
constexpr int64_t kSmallest =
    96;  // neurons in a range: its sum costs the memory traffic of about two of them
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
  hidden_ = cpu.hidden.data();
}

int64_t OneToken::gates(const int32_t* which, int64_t k, int32_t* on) {
  const bool gated = f_.gate != PI2_NONE;
  const uint8_t* rows[kLargest] = {};
  float sums[kLargest];
  for (int64_t j = 0; j < k; ++j) rows[j] = bundle(which[j]) + (gated ? f_.gate_offset : f_.up_offset);
  dot_rows(cpu_, gated ? f_.gate : f_.up, rows, k, x_, f_.d_model, sums);
  int64_t count = 0;
  for (int64_t j = 0; j < k; ++j) {
    const int32_t i = which[j];
    hidden_[i] = ::activate(f_.activation, sums[j] + ::bias(f_, bundle(i), 0));
    if (hidden_[i] != 0.0f) on[count++] = i;
  }
  return count;
}

void OneToken::ups(const int32_t* which, int64_t k) {
  if (f_.gate == PI2_NONE) return;
  const uint8_t* rows[kLargest] = {};
  float sums[kLargest];
  for (int64_t j = 0; j < k; ++j) rows[j] = bundle(which[j]) + f_.up_offset;
  dot_rows(cpu_, f_.up, rows, k, x_, f_.d_model, sums);
  for (int64_t j = 0; j < k; ++j) {
    const float up = sums[j] + ::bias(f_, bundle(which[j]), 1);
    hidden_[which[j]] *= f_.up_relu && up <= 0 ? 0.0f : up;
  }
}

void OneToken::compute(int64_t range) {
  int32_t which[kLargest];
  const int64_t first = begin(range), last = begin(range + 1);
  for (int64_t i = first; i < last; ++i) which[i - first] = static_cast<int32_t>(i);
  ups(which, gates(which, last - first, which));
  downs(range);
}

void OneToken::downs(int64_t range) {
  const uint8_t* rows[kLargest] = {};
  float h[kLargest];
  int64_t active = 0;
  const int64_t last = begin(range + 1);
  for (int64_t i = begin(range); i < last; ++i) {
    if (hidden_[i] == 0.0f) continue;
    rows[active] = bundle(i) + f_.down_offset;
    h[active++] = hidden_[i];
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
