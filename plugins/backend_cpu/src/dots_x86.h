// Products of q4_0 and q8_0 rows with quantised activations on x86, written once over V.
//
// A vector is a few lanes of 16 bytes: a lane of q4_0 is a block, a lane of q8_0 half a block.  A row's next
// four vectors are added up together, so that each lane ends as four finished sums, and a float conversion
// and a multiplication serve all four.
#pragma once
#include <algorithm>

#include "kernels.h"

namespace pi2 {
namespace {

template <class V, bool Q4>
struct DotsX86 {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kLanesInBlock = Q4 ? 1 : 2;
  static constexpr int kStep = kLanes / kLanesInBlock;  // blocks in a vector
  static constexpr int kGroup = 4 * kStep;              // blocks whose scales are converted together
  static constexpr int kBlockBytes = Q4 ? 18 : 34;

  // Four sums in every lane of a, b, c, d -> each lane their four totals.
  static inline F totals(I a, I b, I c, I d) {
    if constexpr (Q4) {  // fits 16 bits until the last addition: 16 products of at most 15 * 127
      const I ab = V::add_pairs(V::pack(a, b)), cd = V::add_pairs(V::pack(c, d));
      return V::to_float(V::add_pairs(V::pack(ab, cd)));
    }
    const I ab = V::add(V::low32(a, b), V::high32(a, b)), cd = V::add(V::low32(c, d), V::high32(c, d));
    return V::to_float(V::add(V::low64(ab, cd), V::high64(ab, cd)));
  }

  // `lanes` of a row's quants from w on times a token's: four partial sums a lane, zeros behind them.
  template <bool Whole>
  static inline I products(const uint8_t* w, const int8_t* x, int lanes) {
    const I raw = Whole ? V::load_bytes(w) : V::load_lanes(w, lanes);
    const I first = Whole ? V::load_bytes(x) : V::load_lanes(x, lanes);
    if constexpr (!Q4) return V::signed_quads(raw, first);
    const I second = Whole ? V::load_bytes(x + 16 * kLanes) : V::load_lanes(x + 16 * lanes, lanes);
    return V::nibble_quads(raw, first, second);
  }

  // The vector at block `at`, with `left` blocks to go.
  template <bool Whole>
  static inline I quads_of(const uint8_t* row, const Quantised& x, int64_t at, int64_t left) {
    const uint8_t* w = row + at * 16 * kLanesInBlock;
    const int8_t* quants = (Q4 ? x.shuffled : x.quants) + at * kBlock;
    if (Whole || left >= kStep) return products<true>(w, quants, kLanes);
    return products<false>(w, quants, static_cast<int>(left) * kLanesInBlock);
  }

  static inline int64_t scales_at(int64_t cols, int64_t b) {
    return cols / kBlock * 16 * kLanesInBlock + 2 * b;
  }

  static inline F chain(F sum, F weight_scale, F dot, F scale, F offset) {
    if constexpr (Q4) return V::fma(weight_scale, V::fma(dot, scale, offset), sum);
    return V::fma(V::mul(weight_scale, scale), dot, sum);
  }

  // A group of `here` blocks, from block b on.
  template <bool Whole>
  static inline F group(const uint8_t* row, const Quantised& x, int64_t cols, int64_t b, int64_t here,
                        F sum) {
    I quads[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t left = here - i * kStep;
      quads[i] = Whole || left > 0 ? quads_of<Whole>(row, x, b + i * kStep, left) : V::no_bytes();
    }
    return chain(sum, V::template spread_halves<Q4, Whole>(row + scales_at(cols, b), here),
                 totals(quads[0], quads[1], quads[2], quads[3]),
                 V::template spread<Q4, Whole>(x.scales + b, here),
                 Q4 ? V::template spread<Q4, Whole>(x.offsets + b, here) : V::zero());
  }

  static constexpr int64_t kShort = kStep;  // blocks in a row that is a single vector, at most

  // Four short rows: what their vectors add up to stands where it does in a row of four vectors, each
  // lane's four numbers being those of four rows.  Each row's bits are those of `dot`.
  template <bool Whole>
  static inline void four(const uint8_t* const* rows, const Quantised& x, int64_t cols, F scale, F offset,
                          float* out) {
    const int64_t blocks = cols / kBlock, count = Whole ? kStep : blocks;
    I quads[4];
    uint8_t scales[2 * kGroup] = {};
    for (int i = 0; i < 4; ++i) {
      quads[i] = quads_of<Whole>(rows[i], x, 0, blocks);
      __builtin_memcpy(scales + 2 * kStep * i, rows[i] + scales_at(cols, 0), 2 * count);
    }
    const F v = chain(V::zero(), V::template spread_halves<Q4, true>(scales, kGroup),
                      totals(quads[0], quads[1], quads[2], quads[3]), scale, offset);
    V::store_lane_sums(V::add(v, V::zero()), out);  // no negative zeros, as `dot` has none
  }

  // The first rows of k, in fours; returns how many.  cols <= kShort * kBlock.
  static int64_t dot_short(const uint8_t* const* rows, int64_t k, const Quantised& x, int64_t cols,
                           float* out) {
    const int64_t blocks = cols / kBlock;
    float scales[kGroup] = {}, offsets[kGroup] = {};
    for (int i = 0; i < 4; ++i) {
      std::copy_n(x.scales, blocks, scales + kStep * i);
      std::copy_n(x.offsets, blocks, offsets + kStep * i);
    }
    const F scale = V::template spread<Q4, true>(scales, kGroup);
    const F offset = Q4 ? V::template spread<Q4, true>(offsets, kGroup) : V::zero();
    int64_t j = 0;
    for (; j + 4 <= k; j += 4) {
      if (blocks == kStep) four<true>(rows + j, x, cols, scale, offset, out + j);
      else four<false>(rows + j, x, cols, scale, offset, out + j);
    }
    return j;
  }

  // Memory is asked for as many bytes from `ahead` on.
  static float dot(const uint8_t* row, const uint8_t* ahead, const Quantised& x, int64_t cols) {
    const int64_t blocks = cols / kBlock;
    F sum = V::zero();
    int64_t b = 0;
    for (; b + kGroup <= blocks; b += kGroup) {
      for (int at = 0; at < kGroup * kBlockBytes; at += 64) V::prefetch(ahead + b * kBlockBytes + at);
      sum = group<true>(row, x, cols, b, kGroup, sum);
    }
    if (b < blocks) {
      for (int64_t at = b; at < blocks; ++at) V::prefetch(ahead + at * kBlockBytes);
      sum = group<false>(row, x, cols, b, blocks - b, sum);
    }
    return V::tree(sum);
  }
};

}  // namespace
}  // namespace pi2
