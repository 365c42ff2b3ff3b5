// Products of many tokens with many rows: weights are unpacked into panels, activations into tiles, and every
// pair of them is multiplied in registers.
#pragma once
#include "kernels.h"

namespace pi2 {

// What a panel and a tile hold: floats; bytes for q8_0; bytes 0..15 for q4_0.
enum class Kind : int32_t { kFloat = 0, kBytes = 1, kNibbles = 2 };
constexpr int kKinds = 3;
constexpr int kMaxPanelRows = 32;

// Sizes are of one block of kBlock columns; layouts are each instruction set's own.
struct Panels {
  int32_t rows;  // of a panel
  int32_t panel_bytes[kKinds], tile_bytes[kKinds];
  // Blocks [first, first + blocks) of `rows` rows; columns behind the last are zeros.
  void (*pack_rows)(Kind kind, DType dtype, const uint8_t* const* rows, int64_t cols, int64_t first,
                    int64_t blocks, uint8_t* panel);
  // `count` <= kTokens tokens, x[t] (cols); zeros behind them.
  void (*pack_floats)(const float* const* x, int64_t count, int64_t cols, uint8_t* tile);
  // The same for quants in natural order and scales, as kernels.quantise gives them.
  void (*pack_quants)(Kind kind, const int8_t* const* quants, const float* const* scales, int64_t count,
                      int64_t blocks, uint8_t* tile);
  // The columns of down as rows of a panel of bytes, its neurons in the place of columns; NULL: not offered.
  // Neurons rows[0 .. count), count <= kBlock, columns of block b: kBlock / rows panels of one block each,
  // and factors (kBlock), what a neuron's activation is to be multiplied by; zeros behind `count`.
  void (*pack_columns)(DType dtype, const uint8_t* const* rows, int64_t count, int64_t cols, int64_t b,
                       uint8_t* panels, float* factors);
  // The tile that goes with it: h (kTokens, kBlock), none of them larger than 1, and sizes (kTokens), what
  // their rows are to be multiplied by.
  void (*pack_activations)(const float* h, const float* sizes, const float* factors, uint8_t* tile);
  // sums (kTokens, rows) += tile times panel.  The bits of one token and row do not depend on the others.
  void (*multiply)(Kind kind, const uint8_t* panel, const uint8_t* tile, int64_t blocks, float* sums);
  // y[0 .. width) += sum over i < count of h[i] * w[places[i]][0 .. width): floats, zeros left out.
  void (*add_listed)(const float* h, const uint8_t* places, int64_t count, const float* w, int64_t width,
                     float* y);
  // Rounded to float16, to the nearest.
  void (*to_halves)(const float* x, int64_t count, uint16_t* out);
  // w[i] = exp(w[i] - largest) for i < count; returns their sum.
  float (*weigh)(float* w, int64_t count, float largest);
};

}  // namespace pi2
