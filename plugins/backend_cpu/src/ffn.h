// What the FFN of one token and that of many share: where a neuron lies, and its activation function.
#pragma once
#include <cmath>

#include "context.h"

inline float activate(int32_t kind, float x) {
  switch (kind) {
    case PI2_RELU: return x <= 0 ? 0.0f : x;
    case PI2_RELU2: return x <= 0 ? 0.0f : x * x;
    case PI2_SILU: return x / (1.0f + std::exp(-x));
    case PI2_GELU: return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
    default: return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  }
}

// Whether the activation function makes exact zeros.
inline bool has_zeros(const pi2_ffn& f) { return f.activation == PI2_RELU || f.activation == PI2_RELU2; }

inline const uint8_t* bundle(const pi2_ffn& f, const int32_t* rows, int64_t i) {
  return f.bundles + (rows ? rows[i] : i) * f.stride;
}

inline float bias(const pi2_ffn& f, const uint8_t* bundle, int which) {
  if (f.bias_offset < 0) return 0.0f;
  float value;
  __builtin_memcpy(&value, bundle + f.bias_offset + 4 * which, 4);
  return value;
}

// pi2_cpu_ffn for n > 1 (batch.cpp).
int64_t ffn_many(pi2_cpu& cpu, const pi2_ffn& f, const float* x, int64_t n, const int32_t* rows,
                 int64_t n_rows, float* out);
