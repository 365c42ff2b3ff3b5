// Products of q4_0 and q8_0 rows with quantised activations on x86, written once over V.
//
// A vector is a few lanes of 16 bytes: a lane of q4_0 is a block, a lane of q8_0 half a block.  Four vectors
// (of four rows, or of one row's next steps) are added up together, so that each lane ends as four finished
// sums, and a float conversion and a multiplication serve all four.  The order of a row's additions is the
// same in both cases: chain s * kLanes + l adds up lane l of every step s, modulo 4, and the chains are
// added as a tree at the end.  So no result depends on the rows that share its vectors.
#pragma once
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

  // Step S of a group of `here` blocks of four rows, from block b on.
  template <int S, bool Whole>
  static inline void step(const uint8_t* const* rows, const Quantised& x, int64_t b, int64_t here, F w, F s,
                          F o, F* sums) {
    const int64_t left = here - S * kStep, at = b + S * kStep;
    if (!Whole && left <= 0) {  // what a single row does in the lanes that it lacks
      sums[S] = V::add(sums[S], V::zero());
      return;
    }
    I quads[4];
    for (int i = 0; i < 4; ++i) quads[i] = quads_of<Whole>(rows[i], x, at, left);
    sums[S] = chain(sums[S], w, totals(quads[0], quads[1], quads[2], quads[3]), s, o);
  }

  template <bool Whole>
  static inline void group(const uint8_t* const* rows, const Quantised& x, int64_t cols, int64_t b,
                           int64_t here, F* sums) {
    const int64_t at = scales_at(cols, b);
    const uint8_t* scales[4] = {rows[0] + at, rows[1] + at, rows[2] + at, rows[3] + at};
    F w[4], s[4], o[4];
    V::template four_halves<Q4, Whole>(scales, here, w);
    V::each(V::template spread<Q4, Whole>(x.scales + b, here), s);
    if constexpr (Q4) V::each(V::template spread<Q4, Whole>(x.offsets + b, here), o);
    else o[0] = o[1] = o[2] = o[3] = V::zero();
    step<0, Whole>(rows, x, b, here, w[0], s[0], o[0], sums);
    step<1, Whole>(rows, x, b, here, w[1], s[1], o[1], sums);
    step<2, Whole>(rows, x, b, here, w[2], s[2], o[2], sums);
    step<3, Whole>(rows, x, b, here, w[3], s[3], o[3], sums);
  }

  // One row times one token: the four vectors are the row's own next steps.
  template <bool Whole>
  static inline F single(const uint8_t* row, const Quantised& x, int64_t cols, int64_t b, int64_t here,
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

  static inline void request(const Ahead& ahead, int64_t b, int64_t blocks) {
    for (const uint8_t* part : ahead.parts)
      for (int64_t line = 0; line < (blocks * kBlockBytes + 63) / 64; ++line)
        V::prefetch(part + b * ahead.step + line * ahead.stride);
  }

  static void four_rows(const uint8_t* const* rows, const Ahead& ahead, const Quantised& x, int64_t cols,
                        float* out) {
    const int64_t blocks = cols / kBlock;
    F sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    int64_t b = 0;
    for (; b + kGroup <= blocks; b += kGroup) {
      request(ahead, b, kGroup);
      group<true>(rows, x, cols, b, kGroup, sums);
    }
    if (b < blocks) {
      request(ahead, b, blocks - b);
      group<false>(rows, x, cols, b, blocks - b, sums);
    }
    V::store_lane(out, V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
  }

  static float one(const uint8_t* row, const Quantised& x, int64_t cols) {
    const int64_t blocks = cols / kBlock;
    F sum = V::zero();
    int64_t b = 0;
    for (; b + kGroup <= blocks; b += kGroup) sum = single<true>(row, x, cols, b, kGroup, sum);
    if (b < blocks) sum = single<false>(row, x, cols, b, blocks - b, sum);
    return V::tree(sum);
  }
};

}  // namespace
}  // namespace pi2
