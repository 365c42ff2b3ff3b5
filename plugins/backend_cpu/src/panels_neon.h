// Panels of 16 rows in NEON registers: four columns of 4 rows in a register, as signed bytes.
#pragma once
#include "panels.h"
#include "simd_neon.h"

namespace pi2 {
namespace {

struct NeonPanels {
  using V = Neon;
  static constexpr int kRows = 16, kVecs = 4, kLanes = 4;

  struct Weights {
    int8_t quants[kBlock / 4][kRows][4];
    float scales[kRows];
  };
  struct Tokens {
    int8_t quants[kBlock / 4][kTokens][4];
    float scales[kTokens];
  };
  static constexpr int kBytesPanel = sizeof(Weights), kNibblesPanel = sizeof(Weights);
  static constexpr int kBytesTile = sizeof(Tokens), kNibblesTile = sizeof(Tokens);

  // 4 rows x 16 columns -> 4 groups of (4 rows x 4 columns).
  static void transpose(const int8x16_t rows[4], int8x16_t groups[4]) {
    const int32x4x2_t a = vtrnq_s32(vreinterpretq_s32_s8(rows[0]), vreinterpretq_s32_s8(rows[1]));
    const int32x4x2_t b = vtrnq_s32(vreinterpretq_s32_s8(rows[2]), vreinterpretq_s32_s8(rows[3]));
    for (int i = 0; i < 2; ++i) {
      groups[i] = vreinterpretq_s8_s32(vcombine_s32(vget_low_s32(a.val[i]), vget_low_s32(b.val[i])));
      groups[i + 2] = vreinterpretq_s8_s32(vcombine_s32(vget_high_s32(a.val[i]), vget_high_s32(b.val[i])));
    }
  }

  template <bool Q4>
  static void pack(const uint8_t* const* rows, int64_t cols, int64_t first, int64_t blocks, uint8_t* panel) {
    Weights* to = reinterpret_cast<Weights*>(panel);
    for (int64_t b = first; b < first + blocks; ++b, ++to)
      for (int r = 0; r < kRows; r += 4) {
        int8x16_t low[4], high[4], groups[8];
        for (int i = 0; i < 4; ++i) {
          const uint8_t* row = rows[r + i] + (Q4 ? b * 16 : b * kBlock);
          if constexpr (Q4) {
            Neon::split(row, low + i, high + i);
          } else {
            low[i] = vreinterpretq_s8_u8(vld1q_u8(row));
            high[i] = vreinterpretq_s8_u8(vld1q_u8(row + 16));
          }
          to->scales[r + i] = Neon::half(rows[r + i] + (Q4 ? cols / 2 : cols) + 2 * b);
        }
        transpose(low, groups);
        transpose(high, groups + 4);
        for (int g = 0; g < 8; ++g) vst1q_s8(&to->quants[g][r][0], groups[g]);
      }
  }
  static void pack_bytes(const uint8_t* const* rows, int64_t cols, int64_t first, int64_t blocks,
                         uint8_t* panel) {
    pack<false>(rows, cols, first, blocks, panel);
  }
  static void pack_nibbles(const uint8_t* const* rows, int64_t cols, int64_t first, int64_t blocks,
                           uint8_t* panel) {
    pack<true>(rows, cols, first, blocks, panel);
  }

  static void pack_quants(Kind, const int8_t* const* quants, const float* const* scales, int64_t count,
                          int64_t blocks, uint8_t* tile) {
    Tokens* to = reinterpret_cast<Tokens*>(tile);
    for (int64_t b = 0; b < blocks; ++b, ++to)
      for (int t = 0; t < kTokens; ++t) {
        int8_t none[kBlock] = {};
        const int8_t* from = t < count ? quants[t] + b * kBlock : none;
        for (int g = 0; g < kBlock / 4; ++g) __builtin_memcpy(to->quants[g][t], from + 4 * g, 4);
        to->scales[t] = t < count ? scales[t][b] : 0.0f;
      }
  }

  // 16-bit products are no faster than floats here.
  static constexpr decltype(Panels::pack_columns) kPackColumns = nullptr;
  static constexpr decltype(Panels::pack_activations) kPackActivations = nullptr;

  static void to_halves(const float* x, int64_t count, uint16_t* out) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
      vst1_u8(reinterpret_cast<uint8_t*>(out + i), vreinterpret_u8_f16(vcvt_f16_f32(Neon::load(x + i))));
    for (; i < count; ++i) {
      const __fp16 value = static_cast<__fp16>(x[i]);
      __builtin_memcpy(out + i, &value, 2);
    }
  }
  static float32x4_t round(float32x4_t x) { return vrndnq_f32(x); }
  static float32x4_t power_of_two(float32x4_t n) {  // n whole, -126 .. 127, or NaN
    const int32x4_t biased = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(biased, 23));
  }

#if defined(__ARM_FEATURE_DOTPROD)
  struct Sum {
    int32x4_t all;
  };
  template <int T>
  static void add(Sum& sum, int8x16_t w, int8x16_t x) {
    sum.all = vdotq_laneq_s32(sum.all, w, x, T);
  }
  static int32x4_t total(const Sum& sum) { return sum.all; }
#else
  struct Sum {
    int32x4_t low, high;  // two sums a row, to be added: of rows 0 and 1, and of rows 2 and 3
  };
  template <int T>
  static void add(Sum& sum, int8x16_t w, int8x16_t x) {
    const int8x8_t four = vreinterpret_s8_s32(vdup_laneq_s32(vreinterpretq_s32_s8(x), T));
    sum.low = vpadalq_s16(sum.low, vmull_s8(vget_low_s8(w), four));
    sum.high = vpadalq_s16(sum.high, vmull_s8(vget_high_s8(w), four));
  }
  static int32x4_t total(const Sum& sum) { return vpaddq_s32(sum.low, sum.high); }
#endif

  // Rows r .. r + 4 * N of a block: their sums stay in registers.
  template <int N>
  static void multiply_rows(const Weights& w, const Tokens& x, int r, float* out) {
    Sum sums[kTokens][N];
    __builtin_memset(sums, 0, sizeof sums);
    for (int g = 0; g < kBlock / 4; ++g) {
      const int8x16_t quants = vld1q_s8(&x.quants[g][0][0]);
      for (int i = 0; i < N; ++i) {
        const int8x16_t rows = vld1q_s8(&w.quants[g][r + i * kLanes][0]);
        add<0>(sums[0][i], rows, quants);
        add<1>(sums[1][i], rows, quants);
        add<2>(sums[2][i], rows, quants);
        add<3>(sums[3][i], rows, quants);
      }
    }
    for (int t = 0; t < kTokens; ++t)
      for (int i = 0; i < N; ++i) {
        float* sum = out + t * kRows + r + i * kLanes;
        const float32x4_t scales = vmulq_n_f32(vld1q_f32(w.scales + r + i * kLanes), x.scales[t]);
        vst1q_f32(sum, vfmaq_f32(vld1q_f32(sum), vcvtq_f32_s32(total(sums[t][i])), scales));
      }
  }

  static void multiply_bytes(const uint8_t* panel, const uint8_t* tile, int64_t blocks, float* out) {
    constexpr int kAtOnce = 64 / sizeof(Sum);  // 4 tokens' sums of so many registers of rows fill 16
    const Weights* w = reinterpret_cast<const Weights*>(panel);
    const Tokens* x = reinterpret_cast<const Tokens*>(tile);
    for (int64_t b = 0; b < blocks; ++b)
      for (int r = 0; r < kRows; r += kAtOnce * kLanes) multiply_rows<kAtOnce>(w[b], x[b], r, out);
  }
  static void multiply_nibbles(const uint8_t* panel, const uint8_t* tile, int64_t blocks, float* out) {
    multiply_bytes(panel, tile, blocks, out);
  }
};
static_assert(kTokens == 4, "a register of quants holds four tokens");

}  // namespace
}  // namespace pi2
