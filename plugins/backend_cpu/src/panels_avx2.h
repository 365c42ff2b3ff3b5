// Panels of 16 rows in AVX2 registers: a lane is a row, and a token's quants are broadcast to all lanes.
#pragma once
#include "panels.h"
#include "simd_avx2.h"

namespace pi2 {
namespace {

struct Avx2Panels {
  using V = Avx2;
  using I = __m256i;
  static constexpr int kRows = 16, kVecs = 2, kLanes = 8;

  // q4_0: four columns of 8 rows in a vector, as bytes 0..15.  A block's 16 products a 16-bit lane, their
  // -8 included, stay below 2^14; what overflows on the way there wraps around and back.
  struct Nibbles {
    uint8_t quants[kBlock / 4][kVecs][32];
    float scales[kRows];
  };
  struct NibblesTile {
    int32_t quants[kBlock / 4][kTokens];  // 4 bytes each
    int32_t starts[kTokens];              // 2 x 16 bits: -8 times the quants that a lane meets
    float scales[kTokens];
  };
  // q8_0: two columns of 8 rows in a vector, as 16-bit integers: AVX2 multiplies signed bytes no faster.
  struct Bytes {
    int16_t quants[kBlock / 2][kVecs][16];
    float scales[kRows];
  };
  struct BytesTile {
    int32_t quants[kBlock / 2][kTokens];  // 2 x 16 bits each
    float scales[kTokens];
  };
  static constexpr int kBytesPanel = sizeof(Bytes), kNibblesPanel = sizeof(Nibbles);
  static constexpr int kBytesTile = sizeof(BytesTile), kNibblesTile = sizeof(NibblesTile);

  static I load(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
  static I two(const uint8_t* low, const uint8_t* high) {
    return _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(high), reinterpret_cast<const __m128i*>(low));
  }

  // Rows 0..3 in the low halves and 4..7 in the high ones, 4 x 32 bits each -> columns, 8 rows each.
  static void transpose(const I rows[4], I columns[4]) {
    const I a = _mm256_unpacklo_epi32(rows[0], rows[1]), b = _mm256_unpackhi_epi32(rows[0], rows[1]);
    const I c = _mm256_unpacklo_epi32(rows[2], rows[3]), d = _mm256_unpackhi_epi32(rows[2], rows[3]);
    columns[0] = _mm256_unpacklo_epi64(a, c);
    columns[1] = _mm256_unpackhi_epi64(a, c);
    columns[2] = _mm256_unpacklo_epi64(b, d);
    columns[3] = _mm256_unpackhi_epi64(b, d);
  }

  static void pack_nibbles(const uint8_t* const* rows, int64_t cols, int64_t first, int64_t blocks,
                           uint8_t* panel) {
    const I mask = _mm256_set1_epi8(15);
    Nibbles* to = reinterpret_cast<Nibbles*>(panel);
    for (int64_t b = first; b < first + blocks; ++b, ++to) {
      for (int v = 0; v < kVecs; ++v) {
        I lines[4], columns[4];
        for (int i = 0; i < 4; ++i) lines[i] = two(rows[v * 8 + i] + b * 16, rows[v * 8 + i + 4] + b * 16);
        transpose(lines, columns);
        for (int g = 0; g < 4; ++g) {
          const I low = _mm256_and_si256(columns[g], mask);
          const I high = _mm256_and_si256(_mm256_srli_epi16(columns[g], 4), mask);
          _mm256_storeu_si256(reinterpret_cast<I*>(to->quants[g][v]), low);
          _mm256_storeu_si256(reinterpret_cast<I*>(to->quants[g + 4][v]), high);
        }
      }
      for (int r = 0; r < kRows; ++r) to->scales[r] = Avx2::half(rows[r] + cols / 2 + 2 * b);
    }
  }

  static void pack_bytes(const uint8_t* const* rows, int64_t cols, int64_t first, int64_t blocks,
                         uint8_t* panel) {
    Bytes* to = reinterpret_cast<Bytes*>(panel);
    for (int64_t b = first; b < first + blocks; ++b, ++to) {
      for (int v = 0; v < kVecs; ++v)
        for (int quarter = 0; quarter < 4; ++quarter) {  // 8 columns: 4 x 32 bits when widened
          I lines[4], columns[4];
          for (int i = 0; i < 4; ++i) {
            const int64_t at = b * kBlock + quarter * 8;
            const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[v * 8 + i] + at));
            const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[v * 8 + i + 4] + at));
            lines[i] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi64(low, high));
          }
          transpose(lines, columns);
          for (int g = 0; g < 4; ++g)
            _mm256_storeu_si256(reinterpret_cast<I*>(to->quants[quarter * 4 + g][v]), columns[g]);
        }
      for (int r = 0; r < kRows; ++r) to->scales[r] = Avx2::half(rows[r] + cols + 2 * b);
    }
  }

  static void pack_quants(Kind kind, const int8_t* const* quants, const float* const* scales, int64_t count,
                          int64_t blocks, uint8_t* tile) {
    if (kind == Kind::kNibbles) pack_for_nibbles(quants, scales, count, blocks, tile);
    else pack_for_bytes(quants, scales, count, blocks, tile);
  }

  static void pack_for_nibbles(const int8_t* const* quants, const float* const* scales, int64_t count,
                               int64_t blocks, uint8_t* tile) {
    NibblesTile* to = reinterpret_cast<NibblesTile*>(tile);
    for (int64_t b = 0; b < blocks; ++b, ++to)
      for (int t = 0; t < kTokens; ++t) {
        const I x = t < count ? load(quants[t] + b * kBlock) : _mm256_setzero_si256();
        alignas(32) int32_t groups[8];
        _mm256_store_si256(reinterpret_cast<I*>(groups), x);
        for (int g = 0; g < 8; ++g) to->quants[g][t] = groups[g];
        const I pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), x);  // 8 x (first two, last two of four)
        __m128i sum = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        sum = _mm_add_epi16(sum, _mm_srli_si128(sum, 8));
        sum = _mm_add_epi16(sum, _mm_srli_si128(sum, 4));
        to->starts[t] = _mm_cvtsi128_si32(_mm_mullo_epi16(sum, _mm_set1_epi16(-8)));
        to->scales[t] = t < count ? scales[t][b] : 0.0f;
      }
  }

  static void pack_for_bytes(const int8_t* const* quants, const float* const* scales, int64_t count,
                             int64_t blocks, uint8_t* tile) {
    BytesTile* to = reinterpret_cast<BytesTile*>(tile);
    for (int64_t b = 0; b < blocks; ++b, ++to)
      for (int t = 0; t < kTokens; ++t) {
        alignas(32) int32_t groups[16] = {};
        for (int half = 0; half < 2 && t < count; ++half) {
          const auto* from = reinterpret_cast<const __m128i*>(quants[t] + b * kBlock + half * 16);
          const I wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(from));
          _mm256_store_si256(reinterpret_cast<I*>(groups + half * 8), wide);
        }
        for (int g = 0; g < 16; ++g) to->quants[g][t] = groups[g];
        to->scales[t] = t < count ? scales[t][b] : 0.0f;
      }
  }

  // 32 signed bytes of a row's block.
  static void quants_of(DType dtype, const uint8_t* row, int64_t b, __m128i* low, __m128i* high) {
    if (dtype == DType::kQ8_0) {
      *low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + b * kBlock));
      *high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + b * kBlock + 16));
      return;
    }
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + b * 16));
    const __m128i mask = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    *low = _mm_sub_epi8(_mm_and_si128(raw, mask), eight);
    *high = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(raw, 4), mask), eight);
  }

  // 16 columns of two neurons, next to each other as 16-bit integers.
  static void store_pairs(__m128i first, __m128i second, int16_t to[kVecs][16]) {
    const __m128i low = _mm_unpacklo_epi8(first, second), high = _mm_unpackhi_epi8(first, second);
    _mm256_storeu_si256(reinterpret_cast<I*>(to[0]), _mm256_cvtepi8_epi16(low));
    _mm256_storeu_si256(reinterpret_cast<I*>(to[1]), _mm256_cvtepi8_epi16(high));
  }

  static constexpr float kLargest = 32767;  // coefficients: activation times weight scale in 16 bits

  static void pack_columns(DType dtype, const uint8_t* const* rows, int64_t count, int64_t cols, int64_t b,
                           uint8_t* panels, float* factors) {
    Bytes* to = reinterpret_cast<Bytes*>(panels);
    float largest = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
      factors[i] = i < count ? Avx2::half(rows[i] + quant_bytes(dtype, cols) + 2 * b) : 0.0f;
      const float size = __builtin_fabsf(factors[i]);
      largest = size > largest || size != size ? size : largest;
    }
    const float inverse = largest > 0 ? kLargest / largest : 0.0f;
    for (int64_t i = 0; i < kBlock; ++i) factors[i] *= inverse;
    for (int r = 0; r < kRows; ++r) to[0].scales[r] = to[1].scales[r] = largest / kLargest;
    for (int64_t i = 0; i < kBlock; i += 2) {
      __m128i quants[2][2] = {};  // neuron, half of the columns
      for (int64_t j = 0; j < 2 && i + j < count; ++j)
        quants_of(dtype, rows[i + j], b, &quants[j][0], &quants[j][1]);
      for (int half = 0; half < 2; ++half)
        store_pairs(quants[0][half], quants[1][half], to[half].quants[i / 2]);
    }
  }

  static void pack_activations(const float* h, const float* sizes, const float* factors, uint8_t* tile) {
    BytesTile* to = reinterpret_cast<BytesTile*>(tile);
    for (int t = 0; t < kTokens; ++t) to->scales[t] = sizes[t];
    for (int half = 0; half < 2; ++half) {
      I rows[kTokens], columns[4];
      const __m256 first = _mm256_loadu_ps(factors + half * 16),
                   second = _mm256_loadu_ps(factors + half * 16 + 8);
      for (int t = 0; t < kTokens; ++t) {
        const float* from = h + t * kBlock + half * 16;
        const I low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from), first));
        const I high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8), second));
        rows[t] = _mm256_packs_epi32(low, high);  // pairs 0 1 4 5 | 2 3 6 7
      }
      transpose(rows, columns);
      constexpr int kPairs[2][4] = {{0, 1, 4, 5}, {2, 3, 6, 7}};
      for (int i = 0; i < 4; ++i) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to->quants[half * 8 + kPairs[0][i]]),
                         _mm256_castsi256_si128(columns[i]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to->quants[half * 8 + kPairs[1][i]]),
                         _mm256_extracti128_si256(columns[i], 1));
      }
    }
  }
  static constexpr decltype(Panels::pack_columns) kPackColumns = pack_columns;
  static constexpr decltype(Panels::pack_activations) kPackActivations = pack_activations;

  static void to_halves(const float* x, int64_t count, uint16_t* out) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), 0));
    for (; i < count; ++i) out[i] = _cvtss_sh(x[i], 0);
  }
  static __m256 round(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static __m256 power_of_two(__m256 n) {  // n whole, -126 .. 127, or NaN
    const I biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }

  // Here and now in a register: left alone, GCC multiplies far ahead and spills, and loads weights again.
  static void keep(I& v) { asm("" : "+x"(v)); }

  // sums += integers, as floats, times both scales.
  static void scale(const I acc[kTokens][kVecs], const float* weight_scales, const float* token_scales,
                    float* sums) {
    const __m256 w[kVecs] = {_mm256_loadu_ps(weight_scales), _mm256_loadu_ps(weight_scales + kLanes)};
    for (int t = 0; t < kTokens; ++t) {
      const __m256 x = _mm256_broadcast_ss(token_scales + t);
      for (int v = 0; v < kVecs; ++v) {
        float* sum = sums + t * kRows + v * kLanes;
        const __m256 dots = _mm256_cvtepi32_ps(acc[t][v]);
        _mm256_storeu_ps(sum, _mm256_fmadd_ps(dots, _mm256_mul_ps(w[v], x), _mm256_loadu_ps(sum)));
      }
    }
  }

  static void multiply_nibbles(const uint8_t* panel, const uint8_t* tile, int64_t blocks, float* out) {
    const Nibbles* w = reinterpret_cast<const Nibbles*>(panel);
    const NibblesTile* x = reinterpret_cast<const NibblesTile*>(tile);
    for (int64_t b = 0; b < blocks; ++b, ++w, ++x) {
      I acc[kTokens][kVecs];
      for (int t = 0; t < kTokens; ++t) acc[t][0] = acc[t][1] = _mm256_set1_epi32(x->starts[t]);
#pragma GCC unroll 8
      for (int g = 0; g < kBlock / 4; ++g) {
        I first = load(w->quants[g][0]), second = load(w->quants[g][1]);
        keep(first);
        keep(second);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const I quants = _mm256_set1_epi32(x->quants[g][t]);
          acc[t][0] = _mm256_add_epi16(acc[t][0], _mm256_maddubs_epi16(first, quants));
          acc[t][1] = _mm256_add_epi16(acc[t][1], _mm256_maddubs_epi16(second, quants));
          keep(acc[t][0]);
          keep(acc[t][1]);
        }
      }
      const I ones = _mm256_set1_epi16(1);
      for (int t = 0; t < kTokens; ++t)
        for (int v = 0; v < kVecs; ++v) acc[t][v] = _mm256_madd_epi16(acc[t][v], ones);
      scale(acc, w->scales, x->scales, out);
    }
  }

  static void multiply_bytes(const uint8_t* panel, const uint8_t* tile, int64_t blocks, float* out) {
    const Bytes* w = reinterpret_cast<const Bytes*>(panel);
    const BytesTile* x = reinterpret_cast<const BytesTile*>(tile);
    for (int64_t b = 0; b < blocks; ++b, ++w, ++x) {
      I acc[kTokens][kVecs];
      for (int t = 0; t < kTokens; ++t) acc[t][0] = acc[t][1] = _mm256_setzero_si256();
#pragma GCC unroll 16
      for (int g = 0; g < kBlock / 2; ++g) {
        I first = load(w->quants[g][0]), second = load(w->quants[g][1]);
        keep(first);
        keep(second);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const I quants = _mm256_set1_epi32(x->quants[g][t]);
          acc[t][0] = _mm256_add_epi32(acc[t][0], _mm256_madd_epi16(first, quants));
          acc[t][1] = _mm256_add_epi32(acc[t][1], _mm256_madd_epi16(second, quants));
          keep(acc[t][0]);
          keep(acc[t][1]);
        }
      }
      scale(acc, w->scales, x->scales, out);
    }
  }
};

}  // namespace
}  // namespace pi2
