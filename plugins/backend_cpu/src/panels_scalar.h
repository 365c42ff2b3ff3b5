// Panels without vector instructions: the quants of 4 rows, and their scales as floats, column by column.
#pragma once
#include "panels.h"
#include "simd_scalar.h"

namespace pi2 {
namespace {

struct ScalarPanels {
  using V = Scalar;
  static constexpr int kRows = 4;
  struct Weights {
    int8_t quants[kBlock][kRows];
    float scales[kRows];
  };
  struct Tokens {
    int8_t quants[kBlock][kTokens];
    float scales[kTokens];
  };
  static constexpr int kBytesPanel = sizeof(Weights), kNibblesPanel = sizeof(Weights);
  static constexpr int kBytesTile = sizeof(Tokens), kNibblesTile = sizeof(Tokens);

  static void pack_bytes(const uint8_t* const* rows, int64_t cols, int64_t first, int64_t blocks,
                         uint8_t* panel) {
    Weights* to = reinterpret_cast<Weights*>(panel);
    for (int64_t b = first; b < first + blocks; ++b, ++to)
      for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < kBlock; ++c) to->quants[c][r] = static_cast<int8_t>(rows[r][b * kBlock + c]);
        to->scales[r] = Scalar::half(rows[r] + cols + 2 * b);
      }
  }

  static void pack_nibbles(const uint8_t* const* rows, int64_t cols, int64_t first, int64_t blocks,
                           uint8_t* panel) {
    constexpr int kHalf = kBlock / 2;
    Weights* to = reinterpret_cast<Weights*>(panel);
    for (int64_t b = first; b < first + blocks; ++b, ++to)
      for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < kHalf; ++c) {
          to->quants[c][r] = static_cast<int8_t>((rows[r][b * kHalf + c] & 15) - 8);
          to->quants[c + kHalf][r] = static_cast<int8_t>((rows[r][b * kHalf + c] >> 4) - 8);
        }
        to->scales[r] = Scalar::half(rows[r] + cols / 2 + 2 * b);
      }
  }

  static void pack_quants(Kind, const int8_t* const* quants, const float* const* scales, int64_t count,
                          int64_t blocks, uint8_t* tile) {
    Tokens* to = reinterpret_cast<Tokens*>(tile);
    for (int64_t b = 0; b < blocks; ++b, ++to)
      for (int t = 0; t < kTokens; ++t) {
        for (int c = 0; c < kBlock; ++c)
          to->quants[c][t] = t < count ? quants[t][b * kBlock + c] : static_cast<int8_t>(0);
        to->scales[t] = t < count ? scales[t][b] : 0.0f;
      }
  }

  // 16-bit products are no faster than floats here.
  static constexpr decltype(Panels::pack_columns) kPackColumns = nullptr;
  static constexpr decltype(Panels::pack_activations) kPackActivations = nullptr;

  static uint16_t half(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);   // NaN
    if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
    if (size < 0x38800000) {  // subnormal: as many 2^-24 as the float addition leaves whole
      float shifted;
      __builtin_memcpy(&shifted, &size, 4);
      shifted += 0.5f;  // its last bit is worth 2^-24
      uint32_t low;
      __builtin_memcpy(&low, &shifted, 4);
      return static_cast<uint16_t>(sign | (low - 0x3f000000));
    }
    const uint32_t odd = size >> 13 & 1;  // to even
    return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xfff + odd) >> 13));
  }
  static void to_halves(const float* x, int64_t count, uint16_t* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = half(x[i]);
  }
  static float round(float x) { return __builtin_rintf(x); }
  static float power_of_two(float n) {  // n whole, -126 .. 127, or NaN
    if (n != n) return n;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }

  static void multiply_bytes(const uint8_t* panel, const uint8_t* tile, int64_t blocks, float* sums) {
    const Weights* w = reinterpret_cast<const Weights*>(panel);
    const Tokens* x = reinterpret_cast<const Tokens*>(tile);
    for (int64_t b = 0; b < blocks; ++b, ++w, ++x)
      for (int t = 0; t < kTokens; ++t)
        for (int r = 0; r < kRows; ++r) {
          int32_t dot = 0;
          for (int c = 0; c < kBlock; ++c) dot += w->quants[c][r] * x->quants[c][t];
          sums[t * kRows + r] += static_cast<float>(dot) * (w->scales[r] * x->scales[t]);
        }
  }
  static void multiply_nibbles(const uint8_t* panel, const uint8_t* tile, int64_t blocks, float* sums) {
    multiply_bytes(panel, tile, blocks, sums);
  }
};

}  // namespace
}  // namespace pi2
