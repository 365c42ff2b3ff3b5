#include "cluster.h"

#include <algorithm>

#include "ffn.h"

namespace pi2 {
namespace {

constexpr int64_t kRanges = 32;  // enough to share out among threads evenly
constexpr int64_t kSmallest =
    96;  // neurons in a range: its sum costs the memory traffic of about two of them
constexpr int64_t kTogether =
    32;  // neurons whose gates are computed before their ups, and these before downs
constexpr int64_t kColumns = 1024;  // of the final sum, a task

// What to ask memory for while rows[j] of k is computed: the row that comes kBytes later, of `known` ones.
struct Ahead {
  static constexpr int64_t kBytes = 8192;  // some 200 ns of one thread's memory traffic

  Ahead(const uint8_t* const* from, int64_t k, int64_t known, int64_t bytes) {
    const int64_t distance = std::max<int64_t>(4, 1 + kBytes / std::max<int64_t>(bytes, 1));
    for (int64_t j = 0; j < k; ++j) rows[j] = from[std::min(j + distance, known - 1)];
  }

  const uint8_t* rows[kLargest];
};

}  // namespace

int64_t Candidates::first_from(int64_t neuron) const {
  if (ids == nullptr) return std::min(neuron, count);
  return std::lower_bound(ids, ids + count, neuron) - ids;
}

int64_t range_size(int64_t neurons) {
  const int64_t share = (neurons + kRanges - 1) / kRanges;
  return std::clamp<int64_t>((share + 15) / 16 * 16, kSmallest, kLargest);
}

OneToken::OneToken(pi2_cpu& cpu, const pi2_ffn& f, const Candidates& candidates, const float* x,
                   TokenScratch& scratch)
    : cpu_(cpu), f_(f), candidates_(candidates), x_(x), scratch_(scratch), size_(range_size(f.count)) {
  ranges_ = (f.count + size_ - 1) / size_;
  scratch.hidden.resize(candidates.count);
  scratch.sums.resize(ranges_ * f.d_model);
  scratch.active.resize(ranges_);
  hidden_ = scratch.hidden.data();
}

void OneToken::prepare() {
  if (cpu_.integers_for(f_.gate) || cpu_.integers_for(f_.up)) cpu_.quantise(x_, 1, f_.d_model, scratch_.x);
}

// The rows at `offset` of k candidates times x; of `known` candidates it is known that they come next.
void OneToken::dot(int32_t dtype, int64_t offset, const int32_t* which, int64_t k, int64_t known,
                   float* sums) {
  const uint8_t* rows[2 * kLargest];
  for (int64_t j = 0; j < known; ++j) rows[j] = bundle(which[j]) + offset;
  const Ahead ahead(rows, k, known, row_bytes(dtype, f_.d_model));
  dot_rows(cpu_, dtype, rows, ahead.rows, k, x_, scratch_.x, f_.d_model, sums);
}

int64_t OneToken::gates(const int32_t* which, int64_t k, int64_t known, int32_t* on) {
  const bool gated = f_.gate != PI2_NONE;
  float sums[kLargest];
  dot(gated ? f_.gate : f_.up, gated ? f_.gate_offset : f_.up_offset, which, k, known, sums);
  int64_t count = 0;
  for (int64_t j = 0; j < k; ++j) {
    const int32_t i = which[j];
    hidden_[i] = ::activate(f_.activation, sums[j] + ::bias(f_, bundle(i), 0));
    if (hidden_[i] != 0.0f) on[count++] = i;
  }
  return count;
}

void OneToken::ups(const int32_t* which, int64_t k, int64_t known) {
  if (f_.gate == PI2_NONE) return;
  float sums[kLargest];
  dot(f_.up, f_.up_offset, which, k, known, sums);
  for (int64_t j = 0; j < k; ++j) {
    const float up = sums[j] + ::bias(f_, bundle(which[j]), 1);
    hidden_[which[j]] *= f_.up_relu && up <= 0 ? 0.0f : up;
  }
}

void OneToken::downs(int64_t range) {
  int32_t on[kLargest];
  int64_t active = 0;
  const int64_t last = begin(range + 1);
  for (int64_t i = begin(range); i < last; ++i) {
    on[active] = static_cast<int32_t>(i);
    active += hidden_[i] != 0.0f;
  }
  scratch_.active[range] = 0;
  add_downs(range, on, active, active);
}
void OneToken::compute(int64_t range) {
  const int64_t last = begin(range + 1);
  int32_t on[2 * kTogether];  // whose gates are not zero: of these neurons, then of the next
  int64_t here = 0, next = 0;
  scratch_.active[range] = 0;
  for (int64_t first = begin(range); here > 0 || first < last; first += kTogether, here = next) {
    next = 0;
    if (first < last) {
      int32_t which[2 * kTogether];
      const int64_t known = std::min(2 * kTogether, last - first);
      for (int64_t j = 0; j < known; ++j) which[j] = static_cast<int32_t>(first + j);
      next = gates(which, std::min(kTogether, known), known, on + here);
    }
    ups(on, here, here + next);
    add_downs(range, on, here, here + next);
    std::copy_n(on + here, next, on);
  }
}

void OneToken::add_downs(int64_t range, const int32_t* which, int64_t k, int64_t known) {
  const uint8_t* rows[2 * kLargest];
  float h[kLargest];
  int64_t active = 0, all = 0;
  for (int64_t j = 0; j < known; ++j) {
    const int32_t i = which[j];
    if (j < k && hidden_[i] == 0.0f) continue;
    if (j < k) h[active++] = hidden_[i];
    rows[all++] = bundle(i) + f_.down_offset;
  }
  if (active == 0) return;
  const Ahead ahead(rows, active, all, row_bytes(f_.down, f_.d_model));
  cpu_.kernels->add_rows(static_cast<DType>(f_.down), rows, ahead.rows, h, active, f_.d_model,
                         scratch_.active[range] == 0, scratch_.sums.data() + range * f_.d_model);
  scratch_.active[range] += active;
}

int64_t OneToken::total(float* out) {
  const int64_t d = f_.d_model;
  cpu_.pool.for_each((d + kColumns - 1) / kColumns, [&](int64_t part) {
    const int64_t first = part * kColumns, last = std::min(d, first + kColumns);
    std::fill(out + first, out + last, 0.0f);
    for (int64_t r = 0; r < ranges_; ++r) {
      if (scratch_.active[r] == 0) continue;
      const float* sum = scratch_.sums.data() + r * d;
      for (int64_t c = first; c < last; ++c) out[c] += sum[c];
    }
  });
  int64_t active = 0;
  for (int64_t r = 0; r < ranges_; ++r) active += scratch_.active[r];
  return active;
}

}  // namespace pi2
