// AVX2, FMA and F16C: eight floats.
#pragma once
#include <immintrin.h>

#include "dots_x86.h"

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
  // Weights are used once: they shall not push anything out of the larger caches.
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_NTA); }

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

  // For DotsX86: vectors of kLanes lanes of 16 bytes.
  using I = __m256i;
  static constexpr int kLanes = 2;

  static I no_bytes() { return _mm256_setzero_si256(); }
  static I load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
  static I load_lanes(const void* p, int) {  // fewer than two is one
    return _mm256_zextsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I add_pairs(I a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
  static I pack(I a, I b) { return _mm256_packs_epi32(a, b); }
  static I low32(I a, I b) { return _mm256_unpacklo_epi32(a, b); }
  static I high32(I a, I b) { return _mm256_unpackhi_epi32(a, b); }
  static I low64(I a, I b) { return _mm256_unpacklo_epi64(a, b); }
  static I high64(I a, I b) { return _mm256_unpackhi_epi64(a, b); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }

  // Sums of the products of 8 nibbles, or of 4 bytes up to 127 in size: nothing saturates.
  static I nibble_quads(I raw, I low, I high) {
    I mask = _mm256_set1_epi8(15);
    asm("" : "+x"(raw));  // one load into a register
    asm("" : "+x"(mask));
    const I first = _mm256_maddubs_epi16(_mm256_and_si256(raw, mask), low);
    const I second = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(raw, 4), mask), high);
    return add_pairs(_mm256_add_epi16(first, second));
  }
  static I signed_quads(I w, I x) {
    return add_pairs(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)));
  }

  // The first `count` of 8 halves of a row, zeros behind them; 16 bytes before p are readable.
  template <bool Whole>
  static __m128i halves(const uint8_t* p, int64_t count) {
    if (Whole || count >= 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    static constexpr uint8_t kShift[32] = {0,   1,   2,   3,   4,   5,   6,   7,   8,   9,   10,
                                           11,  12,  13,  14,  15,  128, 128, 128, 128, 128, 128,
                                           128, 128, 128, 128, 128, 128, 128, 128, 128, 128};
    const int64_t ahead = 16 - 2 * count;
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p - ahead));
    return _mm_shuffle_epi8(bytes, _mm_loadu_si128(reinterpret_cast<const __m128i*>(kShift + ahead)));
  }
  // A group's scales, lane by lane: element s of lane l belongs to that lane of step s.
  static F lane_by_lane(F v) {
    return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
  }
  template <bool Q4, bool Whole>
  static F spread(const float* p, int64_t here) {
    static constexpr int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    if constexpr (Q4) {
      return lane_by_lane(Whole ? load(p) : _mm256_maskload_ps(p, load_bytes(kMask + 8 - here)));
    } else {
      const __m128i mask = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kMask + 8 - here));
      const __m128 v = Whole ? _mm_loadu_ps(p) : _mm_maskload_ps(p, mask);
      return _mm256_set_m128(v, v);
    }
  }
  template <bool Q4, bool Whole>
  static F spread_halves(const uint8_t* p, int64_t here) {
    if constexpr (Q4) return lane_by_lane(_mm256_cvtph_ps(halves<Whole>(p, here)));
    const __m128i h = Whole ? _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)) : halves<false>(p, here);
    const __m128 v = _mm_cvtph_ps(h);
    return _mm256_set_m128(v, v);
  }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static void store_lane_sums(F v, float* out) {
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
  }
  static float tree(F v) {  // each lane's sum, then theirs
    v = add(v, _mm256_permute_ps(v, 0xb1));
    v = add(v, _mm256_permute_ps(v, 0x4e));
    return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
  }

  template <bool Q4>
  using Dots = DotsX86<Avx2, Q4>;
};

}  // namespace
}  // namespace pi2
