// Panels for Armv8.6's matrix instruction: two rows times two tokens, eight columns at a time.
#pragma once
#include "panels_neon.h"

namespace pi2 {
namespace {

struct NeonI8mmPanels : NeonPanels {
  static constexpr int kColumns = 8;

  struct Weights {
    int8_t quants[kBlock / kColumns][kRows][kColumns];
    float scales[kRows];
  };
  struct Tokens {
    int8_t quants[kBlock / kColumns][kTokens][kColumns];
    float scales[kTokens];
  };
  static constexpr int kBytesPanel = sizeof(Weights), kNibblesPanel = sizeof(Weights);
  static constexpr int kBytesTile = sizeof(Tokens), kNibblesTile = sizeof(Tokens);

  template <bool Q4>
  static void pack(const uint8_t* const* rows, int64_t cols, int64_t first, int64_t blocks, uint8_t* panel) {
    Weights* to = reinterpret_cast<Weights*>(panel);
    for (int64_t b = first; b < first + blocks; ++b, ++to)
      for (int r = 0; r < kRows; ++r) {
        int8x16_t low, high;
        if constexpr (Q4) {
          Neon::split(rows[r] + b * 16, &low, &high);
        } else {
          low = vreinterpretq_s8_u8(vld1q_u8(rows[r] + b * kBlock));
          high = vreinterpretq_s8_u8(vld1q_u8(rows[r] + b * kBlock + 16));
        }
        vst1_s8(to->quants[0][r], vget_low_s8(low));
        vst1_s8(to->quants[1][r], vget_high_s8(low));
        vst1_s8(to->quants[2][r], vget_low_s8(high));
        vst1_s8(to->quants[3][r], vget_high_s8(high));
        to->scales[r] = Neon::half(rows[r] + (Q4 ? cols / 2 : cols) + 2 * b);
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
        const int8_t none[kBlock] = {};
        const int8_t* from = t < count ? quants[t] + b * kBlock : none;
        for (int g = 0; g < kBlock / kColumns; ++g)
          __builtin_memcpy(to->quants[g][t], from + kColumns * g, kColumns);
        to->scales[t] = t < count ? scales[t][b] : 0.0f;
      }
  }

  // Four rows of one token: y += sums * their scales.
  static void add(int32x2_t first, int32x2_t second, const float* row_scales, float token_scale, float* y) {
    const float32x4_t scales = vmulq_n_f32(vld1q_f32(row_scales), token_scale);
    vst1q_f32(y, vfmaq_f32(vld1q_f32(y), vcvtq_f32_s32(vcombine_s32(first, second)), scales));
  }

  // 2 x 8 registers of sums, each of two tokens (its halves) times two rows.
  static void multiply_block(const Weights& w, const Tokens& x, float* out) {
    constexpr int kPairs = kRows / 2, kTokenPairs = kTokens / 2;
    int32x4_t sums[kTokenPairs][kPairs];
    for (auto& line : sums)
      for (auto& s : line) s = vdupq_n_s32(0);
    for (int g = 0; g < kBlock / kColumns; ++g)
      for (int p = 0; p < kPairs; ++p) {
        const int8x16_t rows = vld1q_s8(w.quants[g][2 * p]);
        for (int t = 0; t < kTokenPairs; ++t)
          sums[t][p] = vmmlaq_s32(sums[t][p], vld1q_s8(x.quants[g][2 * t]), rows);
      }
    for (int t = 0; t < kTokenPairs; ++t)
      for (int p = 0; p < kPairs; p += 2) {
        const int32x4_t a = sums[t][p], b = sums[t][p + 1];
        float* y = out + 2 * t * kRows + 2 * p;
        add(vget_low_s32(a), vget_low_s32(b), w.scales + 2 * p, x.scales[2 * t], y);
        add(vget_high_s32(a), vget_high_s32(b), w.scales + 2 * p, x.scales[2 * t + 1], y + kRows);
      }
  }

  static void multiply_bytes(const uint8_t* panel, const uint8_t* tile, int64_t blocks, float* out) {
    const Weights* w = reinterpret_cast<const Weights*>(panel);
    const Tokens* x = reinterpret_cast<const Tokens*>(tile);
    for (int64_t b = 0; b < blocks; ++b) multiply_block(w[b], x[b], out);
  }
  static void multiply_nibbles(const uint8_t* panel, const uint8_t* tile, int64_t blocks, float* out) {
    multiply_bytes(panel, tile, blocks, out);
  }
};
static_assert(kTokens % 2 == 0, "the instruction takes two tokens");

}  // namespace
}  // namespace pi2
