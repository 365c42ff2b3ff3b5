// What an FFN does between and behind its products.
//   ACTIVATION 0: relu, 1: relu squared, 2: silu, 3: gelu, 4: gelu by tanh.   DTYPE, TOKENS: as in rows.cl, of down.
inline float activate(float v) {
#if ACTIVATION == 0
  return v <= 0.0f ? 0.0f : v;  // a NaN stays one
#elif ACTIVATION == 1
  return v <= 0.0f ? 0.0f : v * v;
#elif ACTIVATION == 2
  return v / (1.0f + exp(-v));
#elif ACTIVATION == 3
  return 0.5f * v * (1.0f + erf(v * 0.70710678118654752f));
#else
  return 0.5f * v * (1.0f + tanh(0.79788456080286536f * (v + 0.044715f * v * v * v)));
#endif
}

// gate (tokens, n) becomes h; `active` counts what is not zero.  biases (neurons, 1 or 2) or none.
__kernel void combine(__global float* gate, __global const float* up, int gated, int up_relu,
                      __global const float* biases, int has_biases, __global const int* rows, int has_rows, int n,
                      int tokens, __global int* active) {
  const int i = get_global_id(0), t = get_global_id(1);
  __local int found;
  if (get_local_id(0) == 0) found = 0;
  barrier(CLK_LOCAL_MEM_FENCE);
  if (i < n) {
    const size_t at = (size_t)t * n + i;
    const int neuron = has_rows ? rows[i] : i, each = gated ? 2 : 1;
    float h = activate(gate[at] + (has_biases ? biases[each * neuron] : 0.0f));
    if (gated && h != 0.0f) {
      const float u = up[at] + (has_biases ? biases[2 * neuron + 1] : 0.0f);
      h *= up_relu && u <= 0.0f ? 0.0f : u;
    }
    gate[at] = h;
    if (h != 0.0f) atomic_inc(&found);
  }
  barrier(CLK_LOCAL_MEM_FENCE);
  if (get_local_id(0) == 0 && found > 0) atomic_add(active, found);
}

// Eight weights of a neuron-major row: `eight` counts them, four to a group of 32 columns.
inline float8 load_eight(__global const uchar* row, int groups, int eight) {
#if DTYPE == 3
  const uint q = ((__global const uint*)row)[eight];
  const uchar4 low = as_uchar4(q & 0x0f0f0f0fu), high = as_uchar4((q >> 4) & 0x0f0f0f0fu);
  const float scale = vload_half(eight >> 2, (__global const half*)(row + groups * 16));
  return (convert_float8((uchar8)(low, high)) - 8.0f) * scale;
#elif DTYPE == 2
  const float scale = vload_half(eight >> 2, (__global const half*)(row + groups * 32));
  return convert_float8(vload8(eight, (__global const char*)row)) * scale;
#elif DTYPE == 1
  return vload_half8(eight, (__global const half*)row);
#else
  return vload8(eight, (__global const float*)row);
#endif
}

// out[t] = sum over i of h[t][i] * down[rows[i]]; down row r begins at r * stride + offset.  A work-item has eight
// columns; split s adds the neurons starts[s] .. starts[s + 1), which are fixed ranges of ids: neurons with h = 0
// change no bit.  Global size (groups * 4 rounded up to LANES, SPLITS, tokens / TOKENS rounded up).
WAVE __kernel void add_down(__global const uchar* down, long stride, int offset, int groups,
                            __global const float* h, int n, int tokens, __global const int* rows, int has_rows,
                            int first_row, __global const int* starts, __global float* out, int accumulate) {
  const int eight = get_global_id(0), split = get_local_id(1), t0 = get_global_id(2) * TOKENS;
  float8 sum[TOKENS];
  for (int t = 0; t < TOKENS; ++t) sum[t] = 0.0f;
  if (eight < groups * 4) {
    for (int i = starts[split]; i < starts[split + 1]; ++i) {
      const long row = has_rows ? rows[i] - first_row : i - first_row;
      float hi[TOKENS];
      int any = 0;
      for (int t = 0; t < TOKENS; ++t) {
        hi[t] = h[(size_t)min(t0 + t, tokens - 1) * n + i];
        any |= hi[t] != 0.0f;
      }
      if (!any) continue;
      const float8 w = load_eight(down + row * stride + offset, groups, eight);
      for (int t = 0; t < TOKENS; ++t) sum[t] += hi[t] * w;
    }
  }
  __local float8 parts[LANES * SPLITS];
  for (int t = 0; t < TOKENS; ++t) {
    barrier(CLK_LOCAL_MEM_FENCE);
    parts[split * LANES + get_local_id(0)] = sum[t];
    barrier(CLK_LOCAL_MEM_FENCE);
    if (split == 0 && eight < groups * 4 && t0 + t < tokens) {
      float8 total = parts[get_local_id(0)];
      for (int s = 1; s < SPLITS; ++s) total += parts[s * LANES + get_local_id(0)];
      const size_t at = (size_t)(t0 + t) * groups * 32;
#if DTYPE == 3  // bytes hold columns 16 apart
      __global float* to = out + at + (eight >> 2) * 32 + (eight & 3) * 4;
      vstore4(accumulate ? vload4(0, to) + total.lo : total.lo, 0, to);
      vstore4(accumulate ? vload4(0, to + 16) + total.hi : total.hi, 0, to + 16);
#else
      __global float* to = out + at + eight * 8;
      vstore8(accumulate ? vload8(0, to) + total : total, 0, to);
#endif
    }
  }
}
