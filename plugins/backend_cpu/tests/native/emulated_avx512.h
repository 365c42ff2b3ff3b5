// AVX-512 on a machine without it, for tests: SIMDe's portable definitions of the intrinsics, and plain loops
// for those that Debian's SIMDe lacks.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#undef _mm512_madd_epi16  // this one wants a mask's arguments
#define _mm512_madd_epi16 simde_mm512_madd_epi16
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated_cvtph_ps
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#undef _mm512_maskz_loadu_epi8
#define _mm512_maskz_loadu_epi8 emulated_maskz_loadu_epi8
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps emulated_maskz_loadu_ps

namespace {

inline __m512 emulated_cvtph_ps(__m256i halves) {
  float out[16];
  _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm256_castsi256_si128(halves)));
  _mm256_storeu_ps(out + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)));
  return _mm512_loadu_ps(out);
}

inline __m512 emulated_cvtepi32_ps(__m512i v) {
  int32_t in[16];
  float out[16];
  __builtin_memcpy(in, &v, sizeof in);
  for (int i = 0; i < 16; ++i) out[i] = static_cast<float>(in[i]);
  return _mm512_loadu_ps(out);
}

template <class Byte>
__m512i emulated_widen(__m128i v) {
  Byte in[16];
  int32_t out[16];
  __builtin_memcpy(in, &v, sizeof in);
  for (int i = 0; i < 16; ++i) out[i] = in[i];
  return _mm512_loadu_si512(out);
}

inline __m512i emulated_cvtepi8_epi32(__m128i v) { return emulated_widen<int8_t>(v); }
inline __m512i emulated_cvtepu8_epi32(__m128i v) { return emulated_widen<uint8_t>(v); }

inline __m512i emulated_maskz_loadu_epi8(uint64_t mask, const void* p) {
  uint8_t out[64] = {};
  for (int i = 0; i < 64; ++i)
    if (mask >> i & 1) out[i] = static_cast<const uint8_t*>(p)[i];  // nothing else is read
  return _mm512_loadu_si512(out);
}

inline __m512 emulated_maskz_loadu_ps(uint16_t mask, const void* p) {
  float out[16] = {};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) __builtin_memcpy(out + i, static_cast<const uint8_t*>(p) + 4 * i, 4);
  return _mm512_loadu_ps(out);
}

}  // namespace
