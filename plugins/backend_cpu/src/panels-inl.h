// The panels of panels.h: floats for every instruction set, integers as P, its own part, has them.
#include "kernels-inl.h"
#include "panels.h"

namespace pi2 {
namespace {

template <class V, class P>
struct MakePanels {
  using F = typename V::F;
  static constexpr int W = V::kWidth, R = P::kRows, kVecs = R / W;
  static constexpr int kBlockVecs = kBlock / W;
  static_assert(R <= kMaxPanelRows && R % W == 0, "a panel is whole vectors");

  // (kBlock, rows) floats a block.
  template <DType D>
  static void pack_floats_of(const uint8_t* const* rows, int64_t cols, int64_t first, int64_t blocks,
                             float* panel) {
    for (int64_t b = first; b < first + blocks; ++b, panel += kBlock * R) {
      const int64_t last = b * kBlock + kBlock < cols ? b * kBlock + kBlock : cols;
      for (int r = 0; r < R; ++r) {
        float values[kBlock] = {};
        Make<V>::template decode_of<D>(rows + r, 1, cols, b * kBlock, last, values);
        for (int c = 0; c < kBlock; ++c) panel[c * R + r] = values[c];
      }
    }
  }

  static void pack_rows(Kind kind, DType dtype, const uint8_t* const* rows, int64_t cols, int64_t first,
                        int64_t blocks, uint8_t* panel) {
    if (kind == Kind::kNibbles) return P::pack_nibbles(rows, cols, first, blocks, panel);
    if (kind == Kind::kBytes) return P::pack_bytes(rows, cols, first, blocks, panel);
    float* to = reinterpret_cast<float*>(panel);
    switch (dtype) {
      case DType::kF32: return pack_floats_of<DType::kF32>(rows, cols, first, blocks, to);
      case DType::kF16: return pack_floats_of<DType::kF16>(rows, cols, first, blocks, to);
      case DType::kQ8_0: return pack_floats_of<DType::kQ8_0>(rows, cols, first, blocks, to);
      default: return pack_floats_of<DType::kQ4_0>(rows, cols, first, blocks, to);
    }
  }

  // (columns, kTokens) floats.
  static void pack_floats(const float* const* x, int64_t count, int64_t cols, uint8_t* tile) {
    float* to = reinterpret_cast<float*>(tile);
    const int64_t padded = (cols + kBlock - 1) / kBlock * kBlock;
    for (int t = 0; t < kTokens; ++t)
      for (int64_t c = 0; c < padded; ++c) to[c * kTokens + t] = t < count && c < cols ? x[t][c] : 0.0f;
  }

  static void multiply_floats(const float* panel, const float* tile, int64_t columns, float* sums) {
    F acc[kTokens][kVecs];
    for (int t = 0; t < kTokens; ++t)
      for (int i = 0; i < kVecs; ++i) acc[t][i] = V::load(sums + t * R + i * W);
    for (int64_t c = 0; c < columns; ++c, panel += R, tile += kTokens) {
      F w[kVecs];
      for (int i = 0; i < kVecs; ++i) w[i] = V::load(panel + i * W);
      for (int t = 0; t < kTokens; ++t) {
        const F x = V::broadcast(tile[t]);
        for (int i = 0; i < kVecs; ++i) acc[t][i] = V::fma(w[i], x, acc[t][i]);
      }
    }
    for (int t = 0; t < kTokens; ++t)
      for (int i = 0; i < kVecs; ++i) V::store(sums + t * R + i * W, acc[t][i]);
  }

  static void multiply(Kind kind, const uint8_t* panel, const uint8_t* tile, int64_t blocks, float* sums) {
    if (kind == Kind::kNibbles) return P::multiply_nibbles(panel, tile, blocks, sums);
    if (kind == Kind::kBytes) return P::multiply_bytes(panel, tile, blocks, sums);
    multiply_floats(reinterpret_cast<const float*>(panel), reinterpret_cast<const float*>(tile),
                    blocks * kBlock, sums);
  }

  // B blocks of y[0 .. width) += sum over i < count of h[i] * w[places[i]][0 .. width)
  template <int B>
  static inline void add_listed_blocks(const float* h, const uint8_t* places, int64_t count, const float* w,
                                       int64_t width, float* y) {
    F acc[B * kBlockVecs];
    for (int i = 0; i < B * kBlockVecs; ++i) acc[i] = V::load(y + i * W);
    for (int64_t n = 0; n < count; ++n) {
      const F hn = V::broadcast(h[n]);
      const float* row = w + places[n] * width;
      for (int i = 0; i < B * kBlockVecs; ++i) acc[i] = V::fma(hn, V::load(row + i * W), acc[i]);
    }
    for (int i = 0; i < B * kBlockVecs; ++i) V::store(y + i * W, acc[i]);
  }

  static void add_listed(const float* h, const uint8_t* places, int64_t count, const float* w, int64_t width,
                         float* y) {
    int64_t c = 0;
    for (; c + V::kBlocks * kBlock <= width; c += V::kBlocks * kBlock)
      add_listed_blocks<V::kBlocks>(h, places, count, w + c, width, y + c);
    for (; c + kBlock <= width; c += kBlock) add_listed_blocks<1>(h, places, count, w + c, width, y + c);
    for (; c < width; ++c)
      for (int64_t n = 0; n < count; ++n) y[c] += h[n] * w[places[n] * width + c];
  }

  using E = typename P::V;  // of P's own width
  using Floats = typename E::F;

  // exp(x) for x <= 0 as 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; at least exp(-87), which is next
  // to nothing.
  static inline Floats exponential(Floats x) {
    x = E::max(x, E::broadcast(-87.0f));
    const Floats n = P::round(E::mul(x, E::broadcast(1.44269504f)));
    Floats r = E::fma(n, E::broadcast(-0.693359375f), x);  // ln 2 in two parts
    r = E::fma(n, E::broadcast(2.12194440e-4f), r);
    Floats p = E::broadcast(1.0f / 5040);
    constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (const float c : kTaylor) p = E::fma(p, r, E::broadcast(c));
    return E::mul(p, P::power_of_two(n));
  }

  static float weigh(float* w, int64_t count, float largest) {
    const Floats negative = E::broadcast(-largest), one = E::broadcast(1.0f);
    Floats sum = E::zero();
    int64_t i = 0;
    for (; i + E::kWidth <= count; i += E::kWidth) {
      const Floats e = exponential(E::fma(E::load(w + i), one, negative));
      E::store(w + i, e);
      sum = E::fma(e, one, sum);
    }
    if (i == count) return E::sum(sum);
    float rest[E::kWidth] = {}, total = E::sum(sum);
    __builtin_memcpy(rest, w + i, (count - i) * sizeof(float));
    E::store(rest, exponential(E::fma(E::load(rest), one, negative)));
    __builtin_memcpy(w + i, rest, (count - i) * sizeof(float));
    for (int64_t j = 0; j < count - i; ++j) total += rest[j];
    return total;
  }

  static constexpr Panels table() {
    return {R,
            {kBlock * R * 4, P::kBytesPanel, P::kNibblesPanel},
            {kBlock * kTokens * 4, P::kBytesTile, P::kNibblesTile},
            pack_rows,
            pack_floats,
            P::pack_quants,
            P::kPackColumns,
            P::kPackActivations,
            multiply,
            add_listed,
            P::to_halves,
            weigh};
  }
};

}  // namespace
}  // namespace pi2
