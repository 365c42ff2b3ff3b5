// AVX-512 (F and BW): sixteen floats.
#pragma once
#include "simd_avx2.h"

namespace pi2 {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  static constexpr const char* kName = "avx512";
  static constexpr int kWidth = 16;
  static constexpr int kBlocks = 4;  // 4 blocks x 2 accumulators + as many of weights, of 32 registers
  static constexpr int kPaired = 4;  // blocks of nibbles in one 64-byte load

  static F zero() { return _mm512_setzero_ps(); }
  static F broadcast(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F max(F a, F b) {  // keeps a NaN of either side
    return _mm512_mask_add_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q), a, b);
  }
  static void prefetch(const void* p) { Avx2::prefetch(p); }

  static float half(const uint8_t* p) { return Avx2::half(p); }
  static F load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F widen(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }
  static F load_int8(const int8_t* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  // nibble - 8: a permutation of sixteen floats looks at the low four bits of its indices only.
  static void load_nibbles(const uint8_t* p, F v[2]) {
    const F values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const I raw = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    v[0] = _mm512_permutexvar_ps(raw, values);
    v[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 4), values);
  }

  static constexpr float kNibble = 1;
  static void load_large_nibbles(const uint8_t* p, F v[2]) { load_nibbles(p, v); }  // (nibble - 8) / kNibble

  static __m256 low(F v) { return _mm512_castps512_ps256(v); }
  static __m256 high(F v) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)); }
  static float sum(F v) { return Avx2::sum(_mm256_add_ps(low(v), high(v))); }
  static float sum(const F v[2]) { return sum(add(v[0], v[1])); }
  static float max_of(F v) { return Avx2::max_of(Avx2::max(low(v), high(v))); }

  // For DotsX86.
  static constexpr int kLanes = 4;

  static I no_bytes() { return _mm512_setzero_si512(); }
  static I load_bytes(const void* p) { return _mm512_loadu_si512(p); }
  static I load_first(const void* p, int64_t bytes) {  // fewer than 64, zeros behind them
    return _mm512_maskz_loadu_epi8((uint64_t{1} << bytes) - 1, p);
  }
  static I load_lanes(const void* p, int lanes) { return load_first(p, 16 * lanes); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I add_pairs(I a) { return _mm512_madd_epi16(a, _mm512_set1_epi16(1)); }
  static I pack(I a, I b) { return _mm512_packs_epi32(a, b); }
  static I low32(I a, I b) { return _mm512_unpacklo_epi32(a, b); }
  static I high32(I a, I b) { return _mm512_unpackhi_epi32(a, b); }
  static I low64(I a, I b) { return _mm512_unpacklo_epi64(a, b); }
  static I high64(I a, I b) { return _mm512_unpackhi_epi64(a, b); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }

  static I low_nibbles(I raw) { return _mm512_and_si512(raw, _mm512_set1_epi8(15)); }
  static I high_nibbles(I raw) { return low_nibbles(_mm512_srli_epi16(raw, 4)); }
  static I with_sign(I x, I w) {  // x, negated where w < 0; 0 * x need not be
    return _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
  }
  static I nibble_quads(I raw, I first, I second) {
    return add_pairs(_mm512_add_epi16(_mm512_maddubs_epi16(low_nibbles(raw), first),
                                      _mm512_maddubs_epi16(high_nibbles(raw), second)));
  }
  static I signed_quads(I w, I x) {
    return add_pairs(_mm512_maddubs_epi16(_mm512_abs_epi8(w), with_sign(x, w)));
  }

  template <bool Q4, bool Whole>
  static __m256i halves(const uint8_t* p, int64_t count) {  // of 16 for q4_0, of 8 for q8_0
    if constexpr (Whole && Q4) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (Whole) return _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_castsi512_si256(load_first(p, 2 * count));
  }
  // A group's scales, lane by lane: element s of lane l belongs to that lane of step s.
  template <bool Q4>
  static F lane_by_lane(F v) {
    const I places = Q4 ? _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)
                        : _mm512_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7, 1, 3, 5, 7);
    return _mm512_permutexvar_ps(places, v);
  }
  template <bool Q4, bool Whole>
  static F spread(const float* p, int64_t here) {
    const int64_t count = Whole ? (Q4 ? 16 : 8) : here;
    return lane_by_lane<Q4>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((uint32_t{1} << count) - 1), p));
  }
  template <bool Q4, bool Whole>
  static F spread_halves(const uint8_t* p, int64_t here) {
    return lane_by_lane<Q4>(_mm512_cvtph_ps(halves<Q4, Whole>(p, here)));
  }
  static __m128 lanes(F v) {  // their sum, as a tree
    const __m256 a = low(v), b = high(v);
    return _mm_add_ps(_mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)),
                      _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1)));
  }
  static void store_lane_sums(F v, float* out) { _mm_storeu_ps(out, lanes(v)); }
  static float tree(F v) {  // each lane's sum, then theirs
    v = add(v, _mm512_shuffle_ps(v, v, 0xb1));
    return _mm_cvtss_f32(lanes(add(v, _mm512_shuffle_ps(v, v, 0x4e))));
  }

  template <bool Q4>
  using Dots = DotsX86<Avx512, Q4>;
};

}  // namespace
}  // namespace pi2
