// Attention of one token: ranges of positions at the same time, put together in their order.
#include "mix.h"

namespace {

constexpr int64_t kRange = 2 * kKeys;  // positions claimed at a time, whatever the threads

struct One : Mix {
  int64_t first_range() const { return oldest(0) / kRange; }
  int64_t ranges() const { return start / kRange + 1 - first_range(); }
  int64_t size() const { return a.head_dim + 2; }  // of a partial result: largest, total, sums

  // Range r of a KV head, for all query heads that share it.
  void range(int64_t kv_head, int64_t r, float* scratch) const {
    const int64_t h = a.head_dim, begin = (first_range() + r) * kRange;
    const int64_t end = std::min(begin + kRange, start + 1);
    float* partial = cpu.partial.data() + (r * a.heads + kv_head * group()) * size();
    for (int64_t i = 0; i < group(); ++i) {
      partial[i * size()] = Running().largest;
      std::fill_n(partial + i * size() + 1, h + 1, 0.0f);
    }
    for (int64_t block = begin; block < end; block += kKeys) {
      const int64_t from = std::max(block, oldest(0)), count = std::min(block + kKeys, end) - from;
      if (count <= 0) continue;
      const float* keys = floats(cache.keys, kv_head, from, count, scratch);
      const float* values = floats(cache.values, kv_head, from, count, scratch + kKeys * h);
      for (int64_t i = 0; i < group(); ++i) {
        float* result = partial + i * size();
        Running run{result[0], result[1]};
        add(run, cpu.q.data() + (kv_head * group() + i) * h, keys, values, count, result + 2);
        result[0] = run.largest;
        result[1] = run.total;
      }
    }
  }

  void merge(int64_t head) const {
    const float* first = cpu.partial.data() + head * size();
    const int64_t step = a.heads * size();
    float largest = first[0], total = 0;
    for (int64_t r = 1; r < ranges(); ++r) largest = std::max(largest, first[r * step]);
    float* out = cpu.mixed.data() + head * a.head_dim;
    std::fill_n(out, a.head_dim, 0.0f);
    for (int64_t r = 0; r < ranges(); ++r) {
      const float* result = first + r * step;
      const float share = std::exp(result[0] - largest);
      total += share * result[1];
      for (int64_t c = 0; c < a.head_dim; ++c) out[c] += share * result[2 + c];
    }
    for (int64_t c = 0; c < a.head_dim; ++c) out[c] /= total;
  }
};

}  // namespace

void mix_one(pi2_cpu& cpu, const pi2_attention& a, const KvCache& cache, int64_t start) {
  const One one{{cpu, a, cache, start, 1}};
  cpu.partial.resize(one.ranges() * a.heads * one.size());
  cpu.scratch.resize(cpu.pool.size());
  cpu.pool.for_each_on(a.kv_heads * one.ranges(), [&](int thread, int64_t i) {
    auto& scratch = cpu.scratch[thread];
    scratch.resize(std::max<size_t>(scratch.size(), 2 * kKeys * a.head_dim));
    one.range(i / one.ranges(), i % one.ranges(), scratch.data());
  });
  for (int64_t head = 0; head < a.heads; ++head) one.merge(head);
}
