// The kernels, written once over V, the vector primitives of one instruction set.
//
// V::F is kWidth floats.  Every translation unit that includes this sits in its own anonymous namespace and
// includes no standard C++ header: code compiled for a new CPU must never be the copy that the linker keeps.
#include "quantised-inl.h"

namespace pi2 {
namespace {

template <class V>
struct Make {
  using F = typename V::F;
  static constexpr int W = V::kWidth;
  static constexpr int kVecs = kBlock / W;  // vectors in a block

  // The kBlock values of block b of a row, without their scale.
  template <DType D>
  static inline void block(const uint8_t* row, int64_t b, F v[kVecs]) {
    if constexpr (D == DType::kF32) {
      for (int i = 0; i < kVecs; ++i)
        v[i] = V::load(reinterpret_cast<const float*>(row) + b * kBlock + i * W);
    } else if constexpr (D == DType::kF16) {
      for (int i = 0; i < kVecs; ++i)
        v[i] = V::load_half(reinterpret_cast<const uint16_t*>(row) + b * kBlock + i * W);
    } else if constexpr (D == DType::kQ8_0) {
      for (int i = 0; i < kVecs; ++i)
        v[i] = V::load_int8(reinterpret_cast<const int8_t*>(row) + b * kBlock + i * W);
    } else {
      V::load_nibbles(row + b * (kBlock / 2), v);  // (nibble - 8), in the order of the columns
    }
  }

  template <DType D>
  static inline float scale(const uint8_t* row, int64_t b, int64_t cols) {
    if constexpr (D == DType::kF32 || D == DType::kF16) return 1.0f;
    return V::half(row + quant_bytes(D, cols) + 2 * b);
  }

  template <DType D>
  static inline float element(const uint8_t* row, int64_t c) {  // columns behind the last whole block
    if constexpr (D == DType::kF16) return V::half(row + 2 * c);
    float value;
    __builtin_memcpy(&value, row + 4 * c, 4);
    return value;
  }

  // Memory is asked for as many bytes from `ahead` on.
  template <DType D>
  static float dot_of(const uint8_t* row, const uint8_t* ahead, const float* x, int64_t cols) {
    F sum[kVecs];
    for (auto& s : sum) s = V::zero();
    const int64_t blocks = cols / kBlock;
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t at = 0; at < bytes_of<D>(); at += 64) V::prefetch(ahead + b * bytes_of<D>() + at);
      F w[kVecs];
      block<D>(row, b, w);
      const F s = V::broadcast(scale<D>(row, b, cols));
      for (int i = 0; i < kVecs; ++i) {
        const F xi = V::load(x + b * kBlock + i * W);
        sum[i] = V::fma(w[i], D == DType::kF32 || D == DType::kF16 ? xi : V::mul(xi, s), sum[i]);
      }
    }
    float total = V::sum(sum);
    if constexpr (D == DType::kF32 || D == DType::kF16)
      for (int64_t c = blocks * kBlock; c < cols; ++c) total += element<D>(row, c) * x[c];
    return total;
  }

  // Floats pass by as fast as memory gives them, and the hardware's prefetching needs no more than a nudge.
  static constexpr int64_t kAhead = 1024;

  template <DType D>
  static void dot_rows_of(const uint8_t* const* rows, const uint8_t* const* ahead, int64_t k, const float* x,
                          int64_t cols, float* out) {
    for (int64_t j = 0; j < k; ++j)
      out[j] = dot_of<D>(rows[j], ahead ? ahead[j] : ahead_of<D>(rows, k, j, cols, kAhead), x, cols);
  }

  static void dot_rows(DType dtype, const uint8_t* const* rows, const uint8_t* const* ahead, int64_t k,
                       const float* x, int64_t cols, float* out) {
    switch (dtype) {
      case DType::kF32: return dot_rows_of<DType::kF32>(rows, ahead, k, x, cols, out);
      case DType::kF16: return dot_rows_of<DType::kF16>(rows, ahead, k, x, cols, out);
      case DType::kQ8_0: return dot_rows_of<DType::kQ8_0>(rows, ahead, k, x, cols, out);
      default: return dot_rows_of<DType::kQ4_0>(rows, ahead, k, x, cols, out);
    }
  }

  // k rows' columns [first, last) as floats, (k, last - first): what a matrix product over many tokens reads.
  template <DType D>
  static void decode_of(const uint8_t* const* rows, int64_t k, int64_t cols, int64_t first, int64_t last,
                        float* out) {
    for (int64_t n = 0; n < k; ++n, out += last - first) {
      for (int64_t b = first / kBlock; b < last / kBlock; ++b) {
        F w[kVecs];
        block<D>(rows[n], b, w);
        const F s = V::broadcast(scale<D>(rows[n], b, cols));
        for (int i = 0; i < kVecs; ++i) V::store(out + b * kBlock - first + i * W, V::mul(w[i], s));
      }
      if constexpr (D == DType::kF32 || D == DType::kF16)
        for (int64_t c = last / kBlock * kBlock; c < last; ++c) out[c - first] = element<D>(rows[n], c);
    }
  }

  static void decode(DType dtype, const uint8_t* const* rows, int64_t k, int64_t cols, int64_t first,
                     int64_t last, float* out) {
    switch (dtype) {
      case DType::kF32: return decode_of<DType::kF32>(rows, k, cols, first, last, out);
      case DType::kF16: return decode_of<DType::kF16>(rows, k, cols, first, last, out);
      case DType::kQ8_0: return decode_of<DType::kQ8_0>(rows, k, cols, first, last, out);
      default: return decode_of<DType::kQ4_0>(rows, k, cols, first, last, out);
    }
  }

  // B blocks of y[0 .. width) += sum over k of h[k] * w[k][0 .. width); w is (k, width)
  template <int B>
  static inline void add_blocks(const float* h, const float* w, int64_t k, int64_t width, float* y) {
    F acc[B * kVecs];
    for (int i = 0; i < B * kVecs; ++i) acc[i] = V::load(y + i * W);
    for (int64_t n = 0; n < k; ++n) {
      if (h[n] == 0) continue;
      const F hn = V::broadcast(h[n]);
      for (int i = 0; i < B * kVecs; ++i) acc[i] = V::fma(hn, V::load(w + n * width + i * W), acc[i]);
    }
    for (int i = 0; i < B * kVecs; ++i) V::store(y + i * W, acc[i]);
  }

  static void add_product(const float* h, const float* w, int64_t k, int64_t width, float* y) {
    int64_t c = 0;
    for (; c + V::kBlocks * kBlock <= width; c += V::kBlocks * kBlock)
      add_blocks<V::kBlocks>(h, w + c, k, width, y + c);
    for (; c + kBlock <= width; c += kBlock) add_blocks<1>(h, w + c, k, width, y + c);
    for (; c < width; ++c)
      for (int64_t n = 0; n < k; ++n)
        if (h[n] != 0) y[c] += h[n] * w[n * width + c];
  }

  // K neighbouring keys share the loads of q, and their sums hide each other's latency.
  template <int K>
  static inline void scores_of(const float* q, const float* keys, int64_t cols, float* out) {
    F sum[K];
    for (auto& s : sum) s = V::zero();
    int64_t c = 0;
    for (; c + W <= cols; c += W) {
      const F qc = V::load(q + c);
      for (int j = 0; j < K; ++j) sum[j] = V::fma(qc, V::load(keys + j * cols + c), sum[j]);
    }
    for (int j = 0; j < K; ++j) out[j] = V::sum(sum[j]);
    for (; c < cols; ++c)
      for (int j = 0; j < K; ++j) out[j] += q[c] * keys[j * cols + c];
  }

  static void scores(const float* q, const float* keys, int64_t k, int64_t cols, float* out) {
    int64_t j = 0;
    for (; j + 8 <= k; j += 8) scores_of<8>(q, keys + j * cols, cols, out + j);
    for (; j < k; ++j) scores_of<1>(q, keys + j * cols, cols, out + j);
  }

  // Blocks b .. b + count of R rows, added to y: each output is loaded and stored once for all rows.
  template <DType D, int R>
  static inline void add_group(const uint8_t* const* rows, const float (*h)[W], int64_t b, int64_t count,
                               bool fresh, float* y) {
    for (int64_t j = 0; j < count; ++j) {
      float* const at = y + (b + j) * kBlock;
      F acc[kVecs];
      for (int i = 0; i < kVecs; ++i) acc[i] = fresh ? V::zero() : V::load(at + i * W);
      for (int r = 0; r < R; ++r) {
        F w[kVecs];
        if constexpr (D == DType::kQ4_0) V::load_large_nibbles(rows[r] + (b + j) * (kBlock / 2), w);
        else block<D>(rows[r], b + j, w);
        const F coefficient = V::broadcast(h[r][j]);
        for (int i = 0; i < kVecs; ++i) acc[i] = V::fma(w[i], coefficient, acc[i]);
      }
      for (int i = 0; i < kVecs; ++i) V::store(at + i * W, acc[i]);
    }
  }

  // Asks memory for blocks b .. b + W of other rows: they lie too far apart for the hardware.
  template <DType D, int R>
  static inline void fetch(const uint8_t* const* rows, int64_t b) {
    constexpr int64_t kBytes = D == DType::kQ4_0 ? 16 : D == DType::kQ8_0 ? 32 : D == DType::kF16 ? 64 : 128;
    constexpr int64_t kStep = kBytes * W < 64 ? 64 : kBytes * W;
    if (b * kBytes % kStep != 0) return;
    for (int r = 0; r < R; ++r)
      for (int64_t at = 0; at < kStep; at += 64) V::prefetch(rows[r] + b * kBytes + at);
  }

  // R rows: the scales of W blocks become coefficients at a time.
  template <DType D, int R>
  static void add_some(const uint8_t* const* rows, const uint8_t* const* ahead, const float* h, int64_t cols,
                       bool fresh, float* y) {
    constexpr bool kScaled = D == DType::kQ8_0 || D == DType::kQ4_0;
    constexpr float kUnit = D == DType::kQ4_0 ? V::kNibble : 1;
    const int64_t blocks = cols / kBlock;
    float coefficients[R][W];
    for (int r = 0; r < R; ++r) V::store(coefficients[r], V::broadcast(h[r]));
    for (int64_t b = 0; b < blocks; b += W) {
      const int64_t here = blocks - b < W ? blocks - b : W;
      fetch<D, R>(ahead, b);
      for (int r = 0; r < R && kScaled; ++r) V::prefetch(ahead[r] + quant_bytes(D, cols) + 2 * b);
      for (int r = 0; r < R && kScaled; ++r) {
        const uint8_t* scales = rows[r] + quant_bytes(D, cols) + 2 * b;
        if (here == W) {
          const F s = V::load_half(reinterpret_cast<const uint16_t*>(scales));
          V::store(coefficients[r], V::mul(V::broadcast(h[r] * kUnit), s));
        } else {
          for (int64_t j = 0; j < here; ++j) coefficients[r][j] = h[r] * kUnit * V::half(scales + 2 * j);
        }
      }
      add_group<D, R>(rows, coefficients, b, here, fresh, y);
    }
    if constexpr (!kScaled)
      for (int64_t c = blocks * kBlock; c < cols; ++c) {
        float sum = fresh ? 0 : y[c];
        for (int r = 0; r < R; ++r) sum += h[r] * element<D>(rows[r], c);
        y[c] = sum;
      }
  }

  template <DType D>
  static void add_rows_of(const uint8_t* const* rows, const uint8_t* const* ahead, const float* h, int64_t k,
                          int64_t cols, bool fresh, float* y) {
    int64_t n = 0;
    for (; n + 4 <= k; n += 4) add_some<D, 4>(rows + n, ahead + n, h + n, cols, fresh && n == 0, y);
    if (n + 2 <= k) {
      add_some<D, 2>(rows + n, ahead + n, h + n, cols, fresh && n == 0, y);
      n += 2;
    }
    if (n < k) add_some<D, 1>(rows + n, ahead + n, h + n, cols, fresh && n == 0, y);
  }

  static void add_rows(DType dtype, const uint8_t* const* rows, const uint8_t* const* ahead, const float* h,
                       int64_t k, int64_t cols, bool fresh, float* y) {
    switch (dtype) {
      case DType::kF32: return add_rows_of<DType::kF32>(rows, ahead, h, k, cols, fresh, y);
      case DType::kF16: return add_rows_of<DType::kF16>(rows, ahead, h, k, cols, fresh, y);
      case DType::kQ8_0: return add_rows_of<DType::kQ8_0>(rows, ahead, h, k, cols, fresh, y);
      default: return add_rows_of<DType::kQ4_0>(rows, ahead, h, k, cols, fresh, y);
    }
  }

  static constexpr Kernels table(const Panels* panels) {
    using Q = Quantising<V>;
    return {V::kName,    Q::quantise, dot_rows, Q::dot_rows_quantised, add_rows, decode,
            add_product, scores,      panels};
  }
};

}  // namespace
}  // namespace pi2
