// No vector instructions at all: one float, and the slow twin of every other file of this kind.
#pragma once
#include "kernels.h"

namespace pi2 {
namespace {

struct Scalar {
  using F = float;
  static constexpr const char* kName = "scalar";
  static constexpr int kWidth = 1;
  static constexpr int kBlocks = 1;
  static constexpr int kPaired = 1;

  static F zero() { return 0; }
  static F broadcast(float x) { return x; }
  static F load(const float* p) {
    F v;
    __builtin_memcpy(&v, p, 4);
    return v;
  }
  static void store(float* p, F v) { __builtin_memcpy(p, &v, 4); }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F abs(F a) { return a < 0 ? -a : a; }
  static F max(F a, F b) { return a != a || a > b ? a : b; }
  static void prefetch(const void*) {}

  static float half(const uint8_t* p) {  // IEEE binary16, subnormals and infinities included
    uint16_t bits;
    __builtin_memcpy(&bits, p, 2);
    const uint32_t sign = static_cast<uint32_t>(bits >> 15) << 31, exponent = bits >> 10 & 31;
    const uint32_t fraction = bits & 1023;
    uint32_t out;
    if (exponent == 31) {
      out = sign | 0x7f800000u | fraction << 13;
    } else if (exponent != 0) {
      out = sign | (exponent + 112) << 23 | fraction << 13;
    } else {
      const float value = static_cast<float>(fraction) * 0x1p-24f;
      return sign ? -value : value;
    }
    float f;
    __builtin_memcpy(&f, &out, 4);
    return f;
  }
  static F load_half(const uint16_t* p) { return half(reinterpret_cast<const uint8_t*>(p)); }
  static F load_int8(const int8_t* p) { return *p; }
  static void load_nibbles(const uint8_t* p, F v[kBlock]) {
    for (int i = 0; i < kBlock / 2; ++i) {
      v[i] = static_cast<float>((p[i] & 15) - 8);
      v[i + kBlock / 2] = static_cast<float>((p[i] >> 4) - 8);
    }
  }
  static constexpr float kNibble = 1;
  static void load_large_nibbles(const uint8_t* p, F* v) { load_nibbles(p, v); }  // (nibble - 8) / kNibble
  static float sum(F v) { return v; }
  static float sum(const F v[kBlock]) {
    float total = 0;
    for (int i = 0; i < kBlock; ++i) total += v[i];
    return total;
  }
  static float max_of(F v) { return v; }

  static float dot_q4(const uint8_t* row, const Quantised& x, int64_t cols) {
    float total = 0;
    for (int64_t b = 0; b < cols / kBlock; ++b) {
      const uint8_t* q = row + b * 16;
      const int8_t* xs = x.shuffled + b * kBlock;
      int32_t dot = 0;
      for (int i = 0; i < 16; ++i) dot += (q[i] & 15) * xs[i] + (q[i] >> 4) * xs[i + 16];
      const float w = half(row + cols / 2 + 2 * b);
      total += w * x.scales[b] * static_cast<float>(dot) + w * x.offsets[b];
    }
    return total;
  }
  static float dot_q8(const uint8_t* row, const Quantised& x, int64_t cols) {
    float total = 0;
    for (int64_t b = 0; b < cols / kBlock; ++b) {
      const int8_t* q = reinterpret_cast<const int8_t*>(row) + b * kBlock;
      int32_t dot = 0;
      for (int i = 0; i < kBlock; ++i) dot += q[i] * x.quants[b * kBlock + i];
      total += half(row + cols + 2 * b) * x.scales[b] * static_cast<float>(dot);
    }
    return total;
  }

  template <bool Q4>
  struct Dots {
    static constexpr int64_t kShort = 0;  // rows are computed one by one
    static float dot(const uint8_t* row, const uint8_t*, const Quantised& x, int64_t cols) {
      return Q4 ? dot_q4(row, x, cols) : dot_q8(row, x, cols);
    }
  };
};

}  // namespace
}  // namespace pi2
