// Attention of many tokens: products of queries with a block of keys, and of their weights with its values,
// in panels and tiles of floats (panels.h).
#include "mix.h"

namespace {

using pi2::kBlock;
using pi2::Kind;
using pi2::kTokens;

constexpr int64_t kGroup = 32;  // tokens that share a block of keys and values

int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// One KV head and tokens [first, last), with all query heads that share it.  Blocks begin at multiples of
// kKeys, and a token's way through a block depends on its own position alone: how a prompt is cut changes no
// bit, and a token that is not finite reaches none before it.
struct Many : Mix {
  int64_t kv_head, first, last;
  float *keys = nullptr, *values = nullptr;              // (kKeys, head_dim): a block as floats
  float *key_panels = nullptr, *value_panels = nullptr;  // and as panels of keys, and of values' columns
  float *queries = nullptr, *sums = nullptr;             // (group, tiles): a tile of queries; (kTokens, wide)
  float* fresh = nullptr;                                // (wide / rows, kTokens, rows): what a block adds

  int64_t rows() const { return cpu.kernels->panels->rows; }
  int64_t wide() const { return padded(a.head_dim, rows()); }
  int64_t deep() const { return padded(a.head_dim, kBlock); }
  int64_t tiles() const { return (last - first + kTokens - 1) / kTokens; }

  // The pointers above take their parts of scratch, if it is there yet; returns how many floats they need.
  int64_t take(float* scratch) {
    int64_t at = 0;
    const auto part = [&](float*& pointer, int64_t count) {
      if (scratch) pointer = scratch + at;
      at += count;
    };
    const int64_t heads = group() * kGroup / kTokens;
    part(keys, kKeys * a.head_dim);
    part(values, kKeys * a.head_dim);
    part(key_panels, kKeys * deep());
    part(value_panels, kKeys * wide());
    part(queries, heads * kTokens * deep());
    part(sums, heads * kTokens * wide());
    part(fresh, kTokens * wide());
    return at;
  }

  const float* query(int64_t i, int64_t t) const {
    return cpu.q.data() + (t * a.heads + kv_head * group() + i) * a.head_dim;
  }

  void pack_queries() const {
    for (int64_t i = 0; i < group(); ++i)
      for (int64_t j = 0; j < tiles(); ++j) {
        const float* tokens[kTokens];
        const int64_t t = first + j * kTokens, count = std::min<int64_t>(kTokens, last - t);
        for (int64_t k = 0; k < count; ++k) tokens[k] = query(i, t + k);
        float* tile = queries + (i * tiles() + j) * kTokens * deep();
        cpu.kernels->panels->pack_floats(tokens, count, a.head_dim, reinterpret_cast<uint8_t*>(tile));
      }
  }

  void pack_block(int64_t block) const {
    for (int64_t key = 0; key < kKeys; key += rows()) {
      const uint8_t* pointers[pi2::kMaxPanelRows];
      for (int64_t r = 0; r < rows(); ++r) pointers[r] = row(cache.keys, kv_head, block + key + r);
      cpu.kernels->panels->pack_rows(Kind::kFloat, cache.half ? pi2::DType::kF16 : pi2::DType::kF32, pointers,
                                     a.head_dim, 0, deep() / kBlock,
                                     reinterpret_cast<uint8_t*>(key_panels + key * deep()));
    }
    const float* from = floats(cache.values, kv_head, block, kKeys, values);
    for (int64_t c = 0; c < wide(); c += rows())
      for (int64_t key = 0; key < kKeys; ++key) {
        float* to = value_panels + c * kKeys + key * rows();
        const int64_t count = std::min(rows(), a.head_dim - c);
        std::copy_n(from + key * a.head_dim + c, count, to);
        std::fill(to + count, to + rows(), 0.0f);
      }
  }

  // Positions of a block that a token sees: [from, to).
  struct Seen {
    int64_t from, to;
    bool all() const { return to - from == kKeys; }
  };
  Seen seen(int64_t block, int64_t t) const {
    return {std::max(block, oldest(t)), std::min(block + kKeys, start + t + 1)};
  }

  void multiply(const float* panel, const float* tile, int64_t columns, float* out) const {
    std::fill_n(out, kTokens * rows(), 0.0f);
    cpu.kernels->panels->multiply(Kind::kFloat, reinterpret_cast<const uint8_t*>(panel),
                                  reinterpret_cast<const uint8_t*>(tile), columns / kBlock, out);
  }

  // The packed block for those tokens of a tile that see all of it.
  void add_tile(int64_t block, int64_t t, const float* tile, Running* runs, float* out) const {
    alignas(64) float scores[kKeys * kTokens], weights[kKeys * kTokens] = {}, shrink[kTokens];
    for (int64_t key = 0; key < kKeys; key += rows())
      multiply(key_panels + key * deep(), tile, deep(), scores + key * kTokens);
    const int64_t count = std::min<int64_t>(kTokens, last - t);
    for (int64_t j = 0; j < count; ++j) {
      if (!seen(block, t + j).all()) continue;
      float own[kKeys];
      for (int64_t key = 0; key < kKeys; key += rows())
        std::copy_n(scores + key * kTokens + j * rows(), rows(), own + key);
      shrink[j] = weigh(runs[j], own, kKeys);
      for (int64_t key = 0; key < kKeys; ++key) weights[key * kTokens + j] = own[key];
    }
    for (int64_t c = 0; c < wide(); c += rows())
      multiply(value_panels + c * kKeys, weights, kKeys, fresh + c * kTokens);
    for (int64_t j = 0; j < count; ++j) {
      if (!seen(block, t + j).all()) continue;
      for (int64_t c = 0; c < wide(); c += rows()) {
        float* sum = out + j * wide() + c;
        const float* more = fresh + c * kTokens + j * rows();
        for (int64_t r = 0; r < rows(); ++r) sum[r] = sum[r] * shrink[j] + more[r];
      }
    }
  }

  void run(std::vector<Running>& runs) const {
    runs.assign(group() * tiles() * kTokens, {});
    std::fill_n(sums, group() * tiles() * kTokens * wide(), 0.0f);
    pack_queries();
    for (int64_t block = oldest(first) / kKeys * kKeys; block < start + last; block += kKeys) {
      bool whole = false, part = false;
      for (int64_t t = first; t < last; ++t) {
        const Seen s = seen(block, t);
        whole |= s.all();
        part |= !s.all() && s.from < s.to;
      }
      if (whole) pack_block(block);
      if (part) add_parts(block, runs.data());
      if (!whole) continue;
      for (int64_t i = 0; i < group(); ++i)
        for (int64_t j = 0; j < tiles(); ++j) {
          const int64_t at = (i * tiles() + j) * kTokens;
          add_tile(block, first + j * kTokens, queries + at * deep(), runs.data() + at, sums + at * wide());
        }
    }
    for (int64_t i = 0; i < group(); ++i)
      for (int64_t t = first; t < last; ++t) {
        const int64_t at = i * tiles() * kTokens + t - first;
        float* out = cpu.mixed.data() + (t * a.heads + kv_head * group() + i) * a.head_dim;
        for (int64_t c = 0; c < a.head_dim; ++c) out[c] = sums[at * wide() + c] / runs[at].total;
      }
  }

  // A block for the tokens that see a part of it: the newest, and the oldest of a window.
  void add_parts(int64_t block, Running* runs) const {
    const int64_t h = a.head_dim, count = std::min(kKeys, start + n - block);
    const float* all_keys = floats(cache.keys, kv_head, block, count, keys);
    const float* all_values = floats(cache.values, kv_head, block, count, values);
    for (int64_t i = 0; i < group(); ++i)
      for (int64_t t = first; t < last; ++t) {
        const Seen s = seen(block, t);
        const int64_t at = i * tiles() * kTokens + t - first, from = (s.from - block) * h;
        if (s.all() || s.from >= s.to) continue;
        add(runs[at], query(i, t), all_keys + from, all_values + from, s.to - s.from, sums + at * wide());
      }
  }
};

}  // namespace

void mix_many(pi2_cpu& cpu, const pi2_attention& a, const KvCache& cache, int64_t start, int64_t n) {
  const int64_t groups = (n + kGroup - 1) / kGroup;
  cpu.scratch.resize(cpu.pool.size());
  cpu.pool.for_each_on(a.kv_heads * groups, [&](int thread, int64_t i) {
    const int64_t first = i % groups * kGroup;
    Many many{{cpu, a, cache, start, n}, i / groups, first, std::min(n, first + kGroup)};
    auto& scratch = cpu.scratch[thread];
    scratch.resize(std::max<size_t>(scratch.size(), many.take(nullptr)));
    many.take(scratch.data());
    std::vector<Running> runs;
    many.run(runs);
  });
}
