// The table of kernels that each instruction set fills in; chosen once, when the library is loaded.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pi2 {

enum class DType : int32_t { kF32 = 0, kF16 = 1, kQ8_0 = 2, kQ4_0 = 3 };
constexpr int kBlock = 32;  // weights that share a scale
constexpr int kTokens = 4;  // at a time: with 2 sums each, and 8 temporaries, they fill 16 registers

// One token's activations, quantised in blocks of kBlock as q8_0 does, for the integer kernels.
struct Quantised {
  const int8_t* quants;    // (cols): in natural order, for q8_0 weights
  const int8_t* shuffled;  // (cols): in the order in which the ISA meets the nibbles of q4_0 weights
  const float* scales;     // (cols / 32)
  const float* offsets;    // (cols / 32): -8 * scale * sum of the block's quants, for q4_0 weights
};

struct Panels;  // panels.h

struct Kernels {
  const char* isa;
  // x (cols) -> quants, shuffled (cols), scales, offsets (cols / 32)
  void (*quantise)(const float* x, int64_t cols, int8_t* quants, int8_t* shuffled, float* scales,
                   float* offsets);
  // Exact products of k rows of any format with float x (cols); the bits of one do not depend on the others.
  // While rows[j] is computed, memory is asked for the row ahead[j]; NULL: for what follows among the rows.
  void (*dot_rows)(DType dtype, const uint8_t* const* rows, const uint8_t* const* ahead, int64_t k,
                   const float* x, int64_t cols, float* out);
  // The same for rows of q8_0 or q4_0 and quantised activations.
  void (*dot_rows_quantised)(DType dtype, const uint8_t* const* rows, const uint8_t* const* ahead, int64_t k,
                             const Quantised& x, int64_t cols, float* out);
  // y[0 .. cols) = sum over k of h[k] * rows[k][0 .. cols), added one by one behind y, or behind 0 if
  // `fresh`; memory is asked for ahead[0 .. k) meanwhile.
  void (*add_rows)(DType dtype, const uint8_t* const* rows, const uint8_t* const* ahead, const float* h,
                   int64_t k, int64_t cols, bool fresh, float* y);
  // Columns [first, last) of k rows as floats, (k, last - first): multiples of kBlock, or
  // cols.
  void (*decode)(DType dtype, const uint8_t* const* rows, int64_t k, int64_t cols, int64_t first,
                 int64_t last, float* out);
  // y[0 .. width) += sum over k of h[k] * w[k][0 .. width), with w (k, width); zeros in h are skipped.
  void (*add_product)(const float* h, const float* w, int64_t k, int64_t width, float* y);
  // out[j] = q . keys[j], with keys (k, cols); the bits of one do not depend on the others.
  void (*scores)(const float* q, const float* keys, int64_t k, int64_t cols, float* out);
  const Panels* panels;  // many rows times many tokens
};

// Bytes from the start of a row to its scales (quantised formats only).
inline int64_t quant_bytes(DType dtype, int64_t cols) { return dtype == DType::kQ8_0 ? cols : cols / 2; }

const Kernels* kernels_scalar();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_vnni();
const Kernels* kernels_neon();
const Kernels* kernels_neon_dotprod();
const Kernels* kernels_neon_i8mm();

}  // namespace pi2
