// The panels of AVX2, multiplied by VNNI: 16 rows are one register of AVX-512, and the sums are the same
// integers.
#pragma once
#include "panels_avx2.h"
#include "simd_avx512_vnni.h"

namespace pi2 {
namespace {

struct VnniPanels : Avx2Panels {
  using W = __m512i;
  static constexpr int kChains = 2;  // sums a token: one alone would wait for itself

  static W load(const void* p) { return _mm512_loadu_si512(p); }

  // sums += integers, as floats, times both scales.
  static void scale(const W acc[kTokens][kChains], const float* weight_scales, const float* token_scales,
                    float* sums) {
    const __m512 w = _mm512_loadu_ps(weight_scales);
    for (int t = 0; t < kTokens; ++t) {
      float* sum = sums + t * kRows;
      const __m512 dots = _mm512_cvtepi32_ps(_mm512_add_epi32(acc[t][0], acc[t][1]));
      const __m512 both = _mm512_mul_ps(w, _mm512_set1_ps(token_scales[t]));
      _mm512_storeu_ps(sum, _mm512_fmadd_ps(dots, both, _mm512_loadu_ps(sum)));
    }
  }

  static void multiply_nibbles(const uint8_t* panel, const uint8_t* tile, int64_t blocks, float* out) {
    const Nibbles* w = reinterpret_cast<const Nibbles*>(panel);
    const NibblesTile* x = reinterpret_cast<const NibblesTile*>(tile);
    for (int64_t b = 0; b < blocks; ++b, ++w, ++x) {
      W acc[kTokens][kChains];
      for (int t = 0; t < kTokens; ++t) {
        const int32_t start = x->starts[t];  // two sums of 16 bits
        acc[t][0] = _mm512_set1_epi32(static_cast<int16_t>(start) + (start >> 16));
        acc[t][1] = _mm512_setzero_si512();
      }
#pragma GCC unroll 8
      for (int g = 0; g < kBlock / 4; ++g) {
        const W weights = load(w->quants[g]);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          W& sum = acc[t][g % kChains];
          sum = _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(x->quants[g][t]));
        }
      }
      scale(acc, w->scales, x->scales, out);
    }
  }

  static void multiply_bytes(const uint8_t* panel, const uint8_t* tile, int64_t blocks, float* out) {
    const Bytes* w = reinterpret_cast<const Bytes*>(panel);
    const BytesTile* x = reinterpret_cast<const BytesTile*>(tile);
    for (int64_t b = 0; b < blocks; ++b, ++w, ++x) {
      W acc[kTokens][kChains];
      for (auto& sums : acc) sums[0] = sums[1] = _mm512_setzero_si512();
#pragma GCC unroll 16
      for (int g = 0; g < kBlock / 2; ++g) {
        const W weights = load(w->quants[g]);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          W& sum = acc[t][g % kChains];
          sum = _mm512_dpwssd_epi32(sum, weights, _mm512_set1_epi32(x->quants[g][t]));
        }
      }
      scale(acc, w->scales, x->scales, out);
    }
  }
};

}  // namespace
}  // namespace pi2
