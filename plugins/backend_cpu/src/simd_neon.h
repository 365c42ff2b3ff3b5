// Advanced SIMD: four floats.  With KERNEL_DOTPROD (Armv8.2) four byte products add up in one instruction.
#pragma once
#include <arm_neon.h>

#include "kernels.h"

namespace pi2 {
namespace {

struct Neon {
  using F = float32x4_t;
#if defined(__ARM_FEATURE_MATMUL_INT8)
  static constexpr const char* kName = "neon_i8mm";
#elif defined(__ARM_FEATURE_DOTPROD)
  static constexpr const char* kName = "neon_dotprod";
#else
  static constexpr const char* kName = "neon";
#endif
  static constexpr int kWidth = 4;
  static constexpr int kBlocks = 2;  // 2 blocks x 8 accumulators + 8 of weights in 32 registers
  static constexpr int kPaired = 1;  // a block's nibbles fill one register

  static F zero() { return vdupq_n_f32(0); }
  static F broadcast(float x) { return vdupq_n_f32(x); }
  // As bytes: weights may lie anywhere, and a load of floats promises that they are aligned to 4.
  static F load(const float* p) {
    return vreinterpretq_f32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p)));
  }
  static void store(float* p, F v) { vst1q_f32(p, v); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F abs(F a) { return vabsq_f32(a); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }  // keeps a NaN of either side
  static void prefetch(const void* p) { __builtin_prefetch(p); }

  static float half(const uint8_t* p) {
    __fp16 value;
    __builtin_memcpy(&value, p, 2);
    return static_cast<float>(value);
  }
  static F load_half(const uint16_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(reinterpret_cast<const uint8_t*>(p))));
  }
  static F load_int8(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
  }
  static void widen(int8x16_t bytes, F v[4]) {
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    v[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
    v[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(low)));
    v[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
    v[3] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)));
  }
  static void split(const uint8_t* p, int8x16_t* low, int8x16_t* high) {  // nibbles - 8
    const uint8x16_t raw = vld1q_u8(p);
    const int8x16_t eight = vdupq_n_s8(8);
    *low = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(raw, vdupq_n_u8(15))), eight);
    *high = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(raw, 4)), eight);
  }
  static void load_nibbles(const uint8_t* p, F v[8]) {
    int8x16_t low, high;
    split(p, &low, &high);
    widen(low, v);
    widen(high, v + 4);
  }

  static constexpr float kNibble = 1;
  static void load_large_nibbles(const uint8_t* p, F* v) { load_nibbles(p, v); }  // (nibble - 8) / kNibble
  static float sum(F v) { return vaddvq_f32(v); }
  static float sum(const F v[8]) {
    const F a = vaddq_f32(vaddq_f32(v[0], v[1]), vaddq_f32(v[2], v[3]));
    const F b = vaddq_f32(vaddq_f32(v[4], v[5]), vaddq_f32(v[6], v[7]));
    return vaddvq_f32(vaddq_f32(a, b));
  }
  static float max_of(F v) { return vmaxvq_f32(v); }

  // Four int32: acc + sums of products of a and b, 16 of them.
  static int32x4_t dot16(int32x4_t acc, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(acc, a, b);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    const int16x8_t high = vmull_s8(vget_high_s8(a), vget_high_s8(b));
    return vpadalq_s16(vpadalq_s16(acc, low), high);
#endif
  }

  template <bool Q4>
  struct Dots {
    static constexpr int64_t kShort = 0;  // rows are computed one by one
    static constexpr int kBlockBytes = Q4 ? 18 : 34;

    // Memory is asked for as many bytes from `ahead` on.  Even and odd blocks have sums of their own: an
    // addition takes longer than a block.
    static float dot(const uint8_t* row, const uint8_t* ahead, const Quantised& x, int64_t cols) {
      const uint8_t* scales = row + (Q4 ? cols / 2 : cols);
      F sums[2] = {zero(), zero()};
      for (int64_t b = 0; b < cols / kBlock; ++b) {
        prefetch(ahead + b * kBlockBytes);
        int8x16_t low, high;
        if constexpr (Q4) {
          split(row + b * 16, &low, &high);
        } else {
          low = vld1q_s8(reinterpret_cast<const int8_t*>(row) + b * kBlock);
          high = vld1q_s8(reinterpret_cast<const int8_t*>(row) + b * kBlock + 16);
        }
        const int8_t* quants = x.quants + b * kBlock;
        const int32x4_t dots =
            dot16(dot16(vdupq_n_s32(0), low, vld1q_s8(quants)), high, vld1q_s8(quants + 16));
        sums[b & 1] = fma(vcvtq_f32_s32(dots), broadcast(half(scales + 2 * b) * x.scales[b]), sums[b & 1]);
      }
      return vaddvq_f32(vaddq_f32(sums[0], sums[1]));
    }
  };
};

}  // namespace
}  // namespace pi2
