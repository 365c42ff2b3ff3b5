// Activations to 8 bits, and their products with q8_0 and q4_0 rows, written once over V (kernels-inl.h).
#pragma once
#include "kernels.h"

namespace pi2 {
namespace {

template <DType D>
constexpr int64_t bytes_of() {  // a block's, with its scale
  return D == DType::kF32 ? 128 : D == DType::kF16 ? 64 : D == DType::kQ8_0 ? 34 : 18;
}

// What to ask memory for while rows[j] is computed.  Rows that are neighbours: what lies `distance` bytes
// behind, so that the hardware sees one stream.  Others: a row that comes so far behind.
template <DType D>
inline const uint8_t* ahead_of(const uint8_t* const* rows, int64_t k, int64_t j, int64_t cols,
                               int64_t distance) {
  const int64_t bytes = cols / kBlock * bytes_of<D>();
  const int64_t neighbour = j + 1 < k ? j + 1 : j;  // the last of many has none, but goes on likewise
  if (neighbour > 0 && rows[neighbour] - rows[neighbour - 1] == bytes) return rows[j] + distance;
  const int64_t next = j + 1 + distance / (bytes + 1);
  return rows[next < k ? next : k - 1];
}

template <class V>
struct Quantising {
  using F = typename V::F;
  static constexpr int W = V::kWidth;
  static constexpr int kVecs = kBlock / W;  // vectors in a block

  // Blocks whose nibbles V meets together: their low halves come first in the shuffled order.
  static void quantise(const float* x, int64_t cols, int8_t* quants, int8_t* shuffled, float* scales,
                       float* offsets) {
    const int64_t blocks = cols / kBlock;
    for (int64_t b = 0; b < blocks; ++b) {
      const float* xb = x + b * kBlock;
      F most = V::zero();
      for (int i = 0; i < kVecs; ++i) most = V::max(most, V::abs(V::load(xb + i * W)));
      const float largest = V::max_of(most);
      if (!(largest < 3.4e38f)) {  // not finite: so is every product with this block
        scales[b] = offsets[b] = __builtin_nanf("");
        for (int i = 0; i < kBlock; ++i) quants[b * kBlock + i] = 0;
        continue;
      }
      const float lift = largest < 1e-30f ? 0x1p100f : 1.0f;  // else the inverse of a tiny number is infinite
      const float inverse = largest > 0 ? 127.0f / (largest * lift) : 0.0f;
      int32_t rounded[kBlock], sum = 0;  // loops apart, without branches: the compiler makes vectors of them
      for (int i = 0; i < kBlock; ++i) {
        const float v = xb[i] * lift * inverse;
        rounded[i] = static_cast<int32_t>(v + __builtin_copysignf(0.5f, v));
      }
      for (int i = 0; i < kBlock; ++i) sum += rounded[i];
      for (int i = 0; i < kBlock; ++i) quants[b * kBlock + i] = static_cast<int8_t>(rounded[i]);
      scales[b] = largest / 127.0f;
      offsets[b] = -8.0f * scales[b] * static_cast<float>(sum);
    }
    shuffle(quants, blocks, shuffled);
  }

  // V::kPaired blocks at a time, or what is left: first their low halves, then their high ones.
  static inline void shuffle(const int8_t* quants, int64_t blocks, int8_t* shuffled) {
    constexpr int kHalf = kBlock / 2;
    for (int64_t b = 0; b < blocks; b += V::kPaired) {
      const int64_t count = b + V::kPaired < blocks ? V::kPaired : blocks - b;
      for (int64_t j = 0; j < count; ++j) {
        int8_t* to = shuffled + b * kBlock + j * kHalf;
        __builtin_memcpy(to, quants + (b + j) * kBlock, kHalf);
        __builtin_memcpy(to + count * kHalf, quants + (b + j) * kBlock + kHalf, kHalf);
      }
    }
  }

  template <DType D>
  using Dots = typename V::template Dots<D == DType::kQ4_0>;

  static constexpr int64_t kAhead = 4096;  // bytes: some 200 ns of one thread's memory traffic

  template <DType D>
  static void dot_rows_quantised_of(const uint8_t* const* rows, const uint8_t* const* ahead, int64_t k,
                                    const Quantised& x, int64_t cols, float* out) {
    const int64_t bytes = cols / kBlock * bytes_of<D>();
    const int64_t distance = kAhead < bytes ? bytes : kAhead;  // a row's scales are wanted with its quants
    int64_t j = 0;
    if constexpr (Dots<D>::kShort > 0)
      if (cols <= Dots<D>::kShort * kBlock) j = Dots<D>::dot_short(rows, k, x, cols, out);
    for (; j < k; ++j)
      out[j] = Dots<D>::dot(rows[j], ahead ? ahead[j] : ahead_of<D>(rows, k, j, cols, distance), x, cols);
  }

  static void dot_rows_quantised(DType dtype, const uint8_t* const* rows, const uint8_t* const* ahead,
                                 int64_t k, const Quantised& x, int64_t cols, float* out) {
    if (dtype == DType::kQ4_0) dot_rows_quantised_of<DType::kQ4_0>(rows, ahead, k, x, cols, out);
    else dot_rows_quantised_of<DType::kQ8_0>(rows, ahead, k, x, cols, out);
  }
};

}  // namespace
}  // namespace pi2
