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
  static F widen(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)); }
  static void load_nibbles(const uint8_t* p, F v[4]) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i mask = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    const __m128i low = _mm_sub_epi8(_mm_and_si128(raw, mask), eight);
    const __m128i high = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(raw, 4), mask), eight);
    v[0] = widen(low);
    v[1] = widen(_mm_srli_si128(low, 8));
    v[2] = widen(high);
    v[3] = widen(_mm_srli_si128(high, 8));
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
    __m128 m = _mm256_castps256_ps128(max(v, _mm256_permute2f128_ps(v, v, 1)));
    float lanes[4], largest = 0;
    _mm_storeu_ps(lanes, m);
    for (const float x : lanes) largest = x > largest || x != x ? x : largest;
    for (const float x : lanes) largest = x != x ? x : largest;
    return largest;
  }

  static __m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  // Eight int32, each the sum of four products; u holds 0..15 or absolute values up to 127: no saturation.
  static __m256i four(__m256i u, __m256i s) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1));
  }

  // Scales of 8 blocks at once, weights' times activations'; `count` of them exist.
  static F scales_of(const uint8_t* row_scales, const float* x_scales, int64_t count, F* weight_scales) {
    alignas(16) uint16_t halves[8] = {};
    alignas(32) float floats[8] = {};
    F w, x;
    if (count >= 8) {
      w = load_half(reinterpret_cast<const uint16_t*>(row_scales));
      x = load(x_scales);
    } else {
      __builtin_memcpy(halves, row_scales, 2 * count);
      __builtin_memcpy(floats, x_scales, 4 * count);
      w = load_half(halves);
      x = load(floats);
    }
    *weight_scales = w;
    return mul(w, x);
  }

  static F load_some(const float* p, int64_t count) {
    if (count >= 8) return load(p);
    alignas(32) float floats[8] = {};
    __builtin_memcpy(floats, p, 4 * count);
    return load(floats);
  }

  static float dot_q4(const uint8_t* row, const Quantised& x, int64_t cols) {
    const int64_t blocks = cols / kBlock;
    const uint8_t* row_scales = row + cols / 2;
    const __m256i mask = _mm256_set1_epi8(15);
    F sum0 = zero(), sum1 = zero(), offset = zero();
    for (int64_t b = 0; b < blocks; b += 8) {
      const int64_t here = blocks - b < 8 ? blocks - b : 8;
      F weight_scales;
      const F scales = scales_of(row_scales + 2 * b, x.scales + b, here, &weight_scales);
      offset = fma(weight_scales, load_some(x.offsets + b, here), offset);
      int64_t j = 0;
      for (; j + 2 <= here; j += 2) {
        const __m256i raw = load_bytes(row + (b + j) * 16);
        const int8_t* xs = x.shuffled + (b + j) * kBlock;
        const __m256i low = _mm256_and_si256(raw, mask);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask);
        const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, load_bytes(xs)),
                                               _mm256_maddubs_epi16(high, load_bytes(xs + 32)));
        const F dots = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        const int s = static_cast<int>(j);
        const F spread =
            _mm256_permutevar8x32_ps(scales, _mm256_setr_epi32(s, s, s, s, s + 1, s + 1, s + 1, s + 1));
        if (j & 2) sum1 = fma(dots, spread, sum1);
        else sum0 = fma(dots, spread, sum0);
      }
      if (j < here) {  // an odd block at the end: its shuffled order is its own
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + (b + j) * 16));
        const __m256i nibbles = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(raw, 4), raw), mask);
        const F dots = _mm256_cvtepi32_ps(four(nibbles, load_bytes(x.shuffled + (b + j) * kBlock)));
        sum0 = fma(dots, broadcast(half(row_scales + 2 * (b + j)) * x.scales[b + j]), sum0);
      }
    }
    return sum(_mm256_add_ps(_mm256_add_ps(sum0, sum1), offset));
  }

  static float dot_q8(const uint8_t* row, const Quantised& x, int64_t cols) {
    const int64_t blocks = cols / kBlock;
    const uint8_t* row_scales = row + cols;
    F sum0 = zero(), sum1 = zero();
    for (int64_t b = 0; b < blocks; ++b) {
      const __m256i w = load_bytes(row + b * kBlock), q = load_bytes(x.quants + b * kBlock);
      const __m256i products = four(_mm256_sign_epi8(w, w), _mm256_sign_epi8(q, w));
      const F s = broadcast(half(row_scales + 2 * b) * x.scales[b]);
      if (b & 1) sum1 = fma(_mm256_cvtepi32_ps(products), s, sum1);
      else sum0 = fma(_mm256_cvtepi32_ps(products), s, sum0);
    }
    return sum(_mm256_add_ps(sum0, sum1));
  }
};

}  // namespace
}  // namespace pi2
