// What a context holds: kernels, threads, and scratch that grows to the largest call and stays.
#pragma once
#include <memory>
#include <vector>

#include "kernels.h"
#include "pi2_cpu.h"
#include "pool.h"

// Activations of n tokens, quantised for the integer kernels.
struct QuantisedBatch {
  std::vector<int8_t> quants, shuffled;
  std::vector<float> scales, offsets;
  int64_t cols = 0;

  pi2::Quantised token(int64_t t) const {
    const int64_t blocks = cols / pi2::kBlock;
    return {quants.data() + t * cols, shuffled.data() + t * cols, scales.data() + t * blocks,
            offsets.data() + t * blocks};
  }
};

// Of one token's FFN: h of the candidates, and the sums of the ranges that they lie in.
struct TokenScratch {
  std::vector<float> hidden;    // (k)
  std::vector<float> sums;      // (ranges, d): of the down rows of a range's active neurons
  std::vector<int64_t> active;  // (ranges): how many those are
  QuantisedBatch x;             // the token itself
};

struct pi2_cpu {
  pi2_cpu(const pi2::Kernels* table, int threads, const int32_t* cpus, bool use_integers)
      : kernels(table), pool(threads, cpus), integer(use_integers) {}

  const pi2::Kernels* kernels;
  pi2::Pool pool;
  bool integer;
  QuantisedBatch batch;
  TokenScratch token;
  std::vector<float> hidden;                // (n, k)
  std::vector<uint8_t> tiles[3];            // x of many tokens, packed for each kind of panel
  std::vector<uint8_t> any_active;          // (k): whether a neuron is active for any token
  std::vector<int32_t> active_places;       // of these neurons among the k, and
  std::vector<int32_t> chosen;              // their rows
  std::vector<float> listed, sizes;         // h of many tokens, rearranged for down
  std::vector<uint8_t> places, found;       // where they were, and how many there are
  std::vector<float> inner, scores;         // of a low-rank predictor
  std::vector<float> normed;                // (n, d)
  std::vector<float> q, k, v;               // (n, heads * head_dim), as the matrices give them
  std::vector<float> mixed;                 // (n, heads * head_dim), what attention makes of the values
  std::vector<float> partial;               // (ranges, heads, head_dim + 2), of one token
  std::vector<std::vector<float>> scratch;  // one a thread

  bool integers_for(int32_t dtype) const { return integer && (dtype == PI2_Q8_0 || dtype == PI2_Q4_0); }
  void quantise(const float* x, int64_t n, int64_t cols, QuantisedBatch& into);
  // out[t][j] = sum over c of x[t][c] * w[rows[j]][c] for several matrices of the same width: one job.
  struct Product {
    const pi2_matrix* w;
    const int32_t* rows;  // NULL: all
    int64_t n_rows;
    float* out;  // (n, n_rows)
  };
  void multiply(const float* x, int64_t n, const Product* products, int count);
  void multiply_many(const float* x, int64_t n, const Product* products, int count);  // n > 1: batch.cpp
};

inline int64_t row_bytes(int32_t dtype, int64_t cols) {
  switch (dtype) {
    case PI2_F32: return 4 * cols;
    case PI2_F16: return 2 * cols;
    case PI2_Q8_0: return cols / pi2::kBlock * 34;
    default: return cols / pi2::kBlock * 18;
  }
}

// k rows of weights times one token (x, or the first of `quantised`), by integers or floats as the context
// and the format want.  Memory is asked for the rows `ahead`, or NULL: for what follows.
inline void dot_rows(const pi2_cpu& cpu, int32_t dtype, const uint8_t* const* rows,
                     const uint8_t* const* ahead, int64_t k, const float* x, const QuantisedBatch& quantised,
                     int64_t cols, float* out) {
  const auto type = static_cast<pi2::DType>(dtype);
  if (cpu.integers_for(dtype))
    cpu.kernels->dot_rows_quantised(type, rows, ahead, k, quantised.token(0), cols, out);
  else cpu.kernels->dot_rows(type, rows, ahead, k, x, cols, out);
}
