// AVX2, FMA and F16C: eight floats.
#pragma once
#include <immintrin.h>

#include "kernels.h"

namespace pi2 {
namespace {

struct Avx2 {
  using F = __m256;
  static constexpr const char* kName = "avx2";
  static constexpr int kWidth = 8;
  static constexpr int kBlocks = 2;  // 2 blocks x 4 accumulators + 8 temporaries fill the 16 registers
  static constexpr int kPaired = 2;  // blocks of nibbles in one 32-byte load

  static F zero() { return _mm256_setzero_ps(); }
  static F broadcast(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static F max(F a, F b) {  // keeps a NaN of either side
    return _mm256_or_ps(_mm256_max_ps(a, b), _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

  static float half(const uint8_t* p) {
    uint16_t bits;
    __builtin_memcpy(&bits, p, 2);
    return _cvtsh_ss(bits);
  }
  static F load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F load_int8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  // Four bytes a lane to the tops of its words, so that shifts and masks find signed numbers there.
  static __m256i tops(__m256i bytes, int first) {
    const __m256i order = _mm256_setr_epi8(-1, -1, -1, 0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, 3,  //
                                           -1, -1, -1, 4, -1, -1, -1, 5, -1, -1, -1, 6, -1, -1, -1, 7);
    return _mm256_shuffle_epi8(bytes,
                               first == 0 ? order : _mm256_add_epi8(order, _mm256_set1_epi32(8 << 24)));
  }
  // (nibble - 8) / kNibble: with its top bit flipped, a nibble is that number in two's complement.
  static constexpr float kNibble = 0x1p-28f;
  static void load_large_nibbles(const uint8_t* p, F v[4]) {
    const __m256i raw =
        _mm256_xor_si256(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                         _mm256_set1_epi8(-120));
    const __m256i first = tops(raw, 0), second = tops(raw, 8), high = _mm256_set1_epi32(-0x10000000);
    v[0] = _mm256_cvtepi32_ps(_mm256_slli_epi32(first, 4));
    v[1] = _mm256_cvtepi32_ps(_mm256_slli_epi32(second, 4));
    v[2] = _mm256_cvtepi32_ps(_mm256_and_si256(first, high));
    v[3] = _mm256_cvtepi32_ps(_mm256_and_si256(second, high));
  }
  static void load_nibbles(const uint8_t* p, F v[4]) {
    load_large_nibbles(p, v);
    for (int i = 0; i < 4; ++i) v[i] = mul(v[i], broadcast(kNibble));
  }

  static float sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static float sum(const F v[4]) {
    return sum(_mm256_add_ps(_mm256_add_ps(v[0], v[1]), _mm256_add_ps(v[2], v[3])));
  }
  static float max_of(F v) {
    v = max(v, _mm256_permute2f128_ps(v, v, 1));
    v = max(v, _mm256_permute_ps(v, 0x4e));
    return _mm256_cvtss_f32(max(v, _mm256_permute_ps(v, 0xb1)));
  }

  static __m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  // Eight int32, each the sum of four products; u holds 0..15 or absolute values up to 127: no saturation.
  static __m256i four(__m256i u, __m256i s) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1));
  }

  // The first `count` floats or halves, zeros behind them; nothing beyond is read.
  static F load_some(const float* p, int64_t count) {
    static constexpr int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return count >= 8 ? load(p) : _mm256_maskload_ps(p, load_bytes(kMask + 8 - count));
  }
  static F load_some_halves(const uint8_t* p, int64_t count) {  // of a row: 16 bytes before p are readable
    if (count >= 8) return load_half(reinterpret_cast<const uint16_t*>(p));
    static constexpr uint8_t kShift[32] = {0,   1,   2,   3,   4,   5,   6,   7,   8,   9,   10,
                                           11,  12,  13,  14,  15,  128, 128, 128, 128, 128, 128,
                                           128, 128, 128, 128, 128, 128, 128, 128, 128, 128};
    const int64_t ahead = 16 - 2 * count;
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p - ahead));
    return _mm256_cvtph_ps(
        _mm_shuffle_epi8(bytes, _mm_loadu_si128(reinterpret_cast<const __m128i*>(kShift + ahead))));
  }

  // Nibbles of two blocks, or of an odd one at the end, times one token's shuffled quants.
  static F dots_of(__m256i low, __m256i high, const int8_t* x) {
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, load_bytes(x)),
                                           _mm256_maddubs_epi16(high, load_bytes(x + 32)));
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }

  template <int T>
  struct Sums {
    F even[T], odd[T], offset[T];
  };

  // Up to 8 blocks, whose scales fill a register.
  template <int T>
  [[gnu::always_inline]] static void add_blocks(const uint8_t* row, const uint8_t* row_scales,
                                                const Quantised* x, int64_t b, int64_t here, Sums<T>& sums) {
    const __m256i mask = _mm256_set1_epi8(15);
    const F weight_scales = load_some_halves(row_scales + 2 * b, here);
    F scales[T];
    for (int t = 0; t < T; ++t) {
      scales[t] = mul(weight_scales, load_some(x[t].scales + b, here));
      sums.offset[t] = fma(weight_scales, load_some(x[t].offsets + b, here), sums.offset[t]);
    }
    int64_t j = 0;
    for (; j + 2 <= here; j += 2) {
      const __m256i raw = load_bytes(row + (b + j) * 16);
      const __m256i low = _mm256_and_si256(raw, mask);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask);
      const int s = static_cast<int>(j);
      const __m256i places = _mm256_setr_epi32(s, s, s, s, s + 1, s + 1, s + 1, s + 1);
      for (int t = 0; t < T; ++t) {
        const F dots = dots_of(low, high, x[t].shuffled + (b + j) * kBlock);
        F& sum = j & 2 ? sums.odd[t] : sums.even[t];
        sum = fma(dots, _mm256_permutevar8x32_ps(scales[t], places), sum);
      }
    }
    if (j < here) {  // an odd block at the end: its shuffled order is its own
      const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + (b + j) * 16));
      const __m256i nibbles = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(raw, 4), raw), mask);
      const float scale = half(row_scales + 2 * (b + j));
      for (int t = 0; t < T; ++t) {
        const __m256i dots = four(nibbles, load_bytes(x[t].shuffled + (b + j) * kBlock));
        sums.even[t] = fma(_mm256_cvtepi32_ps(dots), broadcast(scale * x[t].scales[b + j]), sums.even[t]);
      }
    }
  }

  // A row times T tokens: unpacked once, and each token's sum in the same order for every T.
  template <int T>
  static void dots_q4(const uint8_t* row, const Quantised* x, int64_t cols, float* out) {
    const int64_t blocks = cols / kBlock;
    const uint8_t* row_scales = row + cols / 2;
    Sums<T> sums;
    for (int t = 0; t < T; ++t) sums.even[t] = sums.odd[t] = sums.offset[t] = zero();
    int64_t b = 0;
    for (; b + 8 <= blocks; b += 8) add_blocks(row, row_scales, x, b, 8, sums);
    if (b < blocks) add_blocks(row, row_scales, x, b, blocks - b, sums);
    for (int t = 0; t < T; ++t)
      out[t] = sum(_mm256_add_ps(_mm256_add_ps(sums.even[t], sums.odd[t]), sums.offset[t]));
  }

  template <int T>
  static void dots_q8(const uint8_t* row, const Quantised* x, int64_t cols, float* out) {
    const int64_t blocks = cols / kBlock;
    const uint8_t* row_scales = row + cols;
    F sum0[T], sum1[T];
    for (int t = 0; t < T; ++t) sum0[t] = sum1[t] = zero();
    for (int64_t b = 0; b < blocks; ++b) {
      const __m256i w = load_bytes(row + b * kBlock), size = _mm256_sign_epi8(w, w);
      const float scale = half(row_scales + 2 * b);
      for (int t = 0; t < T; ++t) {
        const __m256i dots = four(size, _mm256_sign_epi8(load_bytes(x[t].quants + b * kBlock), w));
        const F s = broadcast(scale * x[t].scales[b]);
        if (b & 1) sum1[t] = fma(_mm256_cvtepi32_ps(dots), s, sum1[t]);
        else sum0[t] = fma(_mm256_cvtepi32_ps(dots), s, sum0[t]);
      }
    }
    for (int t = 0; t < T; ++t) out[t] = sum(_mm256_add_ps(sum0[t], sum1[t]));
  }
};

}  // namespace
}  // namespace pi2
