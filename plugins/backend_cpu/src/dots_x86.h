// Products of q4_0 and q8_0 rows with quantised activations on x86, written once over V.
//
// A vector is a few lanes of 16 bytes: a lane of q4_0 is a block, a lane of q8_0 half a block.  Four vectors
// (of four rows, of four tokens, or of one row's next steps) are added up together, so that each lane ends
// as four finished sums, and a float conversion and a multiplication serve all four.  The order of a row's
// additions is the same in all three cases: chain s * kLanes + l adds up lane l of every step s, modulo 4,
// and the chains are added as a tree at the end.  So no result depends on who shares its vectors.
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

  static inline const int8_t* quants(const Quantised& x, int64_t b) {
    return (Q4 ? x.shuffled : x.quants) + b * kBlock;
  }

  static inline F chain(F sum, F weight_scale, F dot, F scale, F offset) {
    if constexpr (Q4) return V::fma(weight_scale, V::fma(dot, scale, offset), sum);
    return V::fma(V::mul(weight_scale, scale), dot, sum);
  }

  // Step S of a group of `here` blocks, from block b on, of R rows times T tokens, R * T == 4.
  template <int R, int T, int S, bool Whole>
  static inline void step(const uint8_t* const* rows, const Quantised* x, int64_t b, int64_t here, F w, F s,
                          F o, F* sums) {
    const int64_t left = here - S * kStep;
    if (!Whole && left <= 0) {  // what a single row does in the lanes that it lacks
      sums[S] = V::add(sums[S], V::zero());
      return;
    }
    const int lanes = Whole || left > kStep ? kLanes : static_cast<int>(left) * kLanesInBlock;
    const int64_t at = b + S * kStep;
    I quads[4];
    for (int i = 0; i < 4; ++i)
      quads[i] = Whole || lanes == kLanes ? products<true>(rows[R == 4 ? i : 0] + at * 16 * kLanesInBlock,
                                                           quants(x[T == 4 ? i : 0], at), lanes)
                                          : products<false>(rows[R == 4 ? i : 0] + at * 16 * kLanesInBlock,
                                                            quants(x[T == 4 ? i : 0], at), lanes);
    sums[S] = chain(sums[S], w, totals(quads[0], quads[1], quads[2], quads[3]), s, o);
  }

  template <int R, int T, bool Whole>
  static inline void group(const uint8_t* const* rows, const Quantised* x, int64_t cols, int64_t b,
                           int64_t here, F* sums) {
    const int64_t scales_at = cols / kBlock * 16 * kLanesInBlock + 2 * b;
    F w[4], s[4], o[4];
    if constexpr (R == 4) {
      const uint8_t* p[4] = {rows[0] + scales_at, rows[1] + scales_at, rows[2] + scales_at,
                             rows[3] + scales_at};
      V::template four_halves<Q4, Whole>(p, here, w);
      V::each(V::template spread<Q4, Whole>(x->scales + b, here), s);
      if constexpr (Q4) V::each(V::template spread<Q4, Whole>(x->offsets + b, here), o);
    } else {
      V::each(V::template spread_halves<Q4, Whole>(rows[0] + scales_at, here), w);
      for (int t = 0; t < 4; ++t) {
        s[t] = V::template spread<Q4, Whole>(x[t].scales + b, here);
        if constexpr (Q4) o[t] = V::template spread<Q4, Whole>(x[t].offsets + b, here);
      }
      V::transpose(s);
      if constexpr (Q4) V::transpose(o);
    }
    step<R, T, 0, Whole>(rows, x, b, here, w[0], s[0], o[0], sums);
    step<R, T, 1, Whole>(rows, x, b, here, w[1], s[1], o[1], sums);
    step<R, T, 2, Whole>(rows, x, b, here, w[2], s[2], o[2], sums);
    step<R, T, 3, Whole>(rows, x, b, here, w[3], s[3], o[3], sums);
  }

  // One row times one token: the four vectors are the row's own next steps.
  template <bool Whole>
  static inline F single(const uint8_t* row, const Quantised& x, int64_t cols, int64_t b, int64_t here,
                         F sum) {
    I quads[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t left = here - i * kStep, at = b + i * kStep;
      const uint8_t* w = row + at * 16 * kLanesInBlock;
      if (Whole || left >= kStep) quads[i] = products<true>(w, quants(x, at), kLanes);
      else if (left > 0) quads[i] = products<false>(w, quants(x, at), static_cast<int>(left) * kLanesInBlock);
      else quads[i] = V::no_bytes();
    }
    const uint8_t* scales = row + cols / kBlock * 16 * kLanesInBlock + 2 * b;
    return chain(sum, V::template spread_halves<Q4, Whole>(scales, here),
                 totals(quads[0], quads[1], quads[2], quads[3]),
                 V::template spread<Q4, Whole>(x.scales + b, here),
                 Q4 ? V::template spread<Q4, Whole>(x.offsets + b, here) : V::zero());
  }

  static inline void request(const Ahead& ahead, int64_t b, int64_t blocks) {
    for (const uint8_t* part : ahead.parts)
      for (int64_t line = 0; line < (blocks * kBlockBytes + 63) / 64; ++line)
        V::prefetch(part + b * ahead.step + line * ahead.stride);
  }

  // R rows times T tokens, R * T == 4.
  template <int R, int T>
  static void four(const uint8_t* const* rows, const Ahead* ahead, const Quantised* x, int64_t cols,
                   float* out) {
    const int64_t blocks = cols / kBlock;
    F sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    int64_t b = 0;
    for (; b + kGroup <= blocks; b += kGroup) {
      if constexpr (R == 4) request(*ahead, b, kGroup);
      group<R, T, true>(rows, x, cols, b, kGroup, sums);
    }
    if (b < blocks) {
      if constexpr (R == 4) request(*ahead, b, blocks - b);
      group<R, T, false>(rows, x, cols, b, blocks - b, sums);
    }
    V::store_lane(out, V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
  }

  static void four_rows(const uint8_t* const* rows, const Ahead& ahead, const Quantised& x, int64_t cols,
                        float* out) {
    four<4, 1>(rows, &ahead, &x, cols, out);
  }

  static void four_tokens(const uint8_t* row, const Quantised* x, int64_t cols, float* out) {
    four<1, 4>(&row, nullptr, x, cols, out);
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
