// Activations to 8 bits, and their products with q8_0 and q4_0 rows, written once over V (kernels-inl.h).
#pragma once
#include "kernels.h"

namespace pi2 {
namespace {

template <DType D>
constexpr int64_t bytes_of() {  // a block's, with its scale
  return D == DType::kF32 ? 128 : D == DType::kF16 ? 64 : D == DType::kQ8_0 ? 34 : 18;
}

// Rows to look ahead, so that their memory is on its way for some 100 ns before they are wanted.
template <DType D>
inline int64_t lead_of(int64_t cols) {
  constexpr int64_t kBytes = 4096;
  return 1 + kBytes / (cols / kBlock * bytes_of<D>() + 64);
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

  // Neighbours in memory are asked for in their order, which the hardware's own prefetching recognises: with
  // narrow rows, half as fast again as each row for itself.
  template <DType D>
  static Ahead ahead_of(const uint8_t* const* rows, int64_t cols) {
    const uint8_t* first = rows[0];
    if (rows[3] - first != 3 * (cols / kBlock * bytes_of<D>()))
      return {{first, rows[1], rows[2], rows[3]}, bytes_of<D>(), 64};
    return {{first, first + 64, first + 128, first + 192}, 4 * bytes_of<D>(), 256};
  }

  // Four rows at a time, whose sums share their vectors.
  template <DType D>
  static void dot_rows_quantised_of(const uint8_t* const* rows, int64_t k, const Quantised& x, int64_t cols,
                                    float* out) {
    const int64_t distance = 4 * lead_of<D>(4 * cols);
    int64_t j = 0;
    for (; j + 4 <= k; j += 4) {
      const Ahead ahead = ahead_of<D>(rows + (j + distance + 4 <= k ? j + distance : k - 4), cols);
      Dots<D>::four_rows(rows + j, ahead, x, cols, out + j);
    }
    for (; j < k; ++j) out[j] = Dots<D>::one(rows[j], x, cols);
  }

  static void dot_rows_quantised(DType dtype, const uint8_t* const* rows, int64_t k, const Quantised& x,
                                 int64_t cols, float* out) {
    if (dtype == DType::kQ4_0) dot_rows_quantised_of<DType::kQ4_0>(rows, k, x, cols, out);
    else dot_rows_quantised_of<DType::kQ8_0>(rows, k, x, cols, out);
  }
};

}  // namespace
}  // namespace pi2
