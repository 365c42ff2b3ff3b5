// AVX-512 with VNNI, which multiplies four pairs of bytes and adds them up in one instruction.
#pragma once
#include "simd_avx512.h"

namespace pi2 {
namespace {

struct Avx512Vnni : Avx512 {
  static constexpr const char* kName = "avx512_vnni";

  static I nibble_quads(I raw, I first, I second) {
    const I sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low_nibbles(raw), first);
    return _mm512_dpbusd_epi32(sum, high_nibbles(raw), second);
  }
  static I signed_quads(I w, I x) {
    return _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_abs_epi8(w), with_sign(x, w));
  }

  template <bool Q4>
  using Dots = DotsX86<Avx512Vnni, Q4>;
};

}  // namespace
}  // namespace pi2
