// The last product of an FFN, as a sum of its neurons' rows.  DTYPE, TOKENS: as in rows.cl.
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

// out[t] = sum over i of h[t][i] * down[rows[i]]; down row r begins at r * stride + offset.  A work-item has
// eight columns; split s adds the neurons starts[s] .. starts[s + 1), which are fixed ranges of ids: neurons
// with h = 0 change no bit.  Global size (groups * 4 rounded up to LANES, SPLITS, tokens / TOKENS rounded
// up).
WAVE __kernel void add_down(__global const uchar* down, long stride, int offset, int groups,
                            __global const float* h, int n, int tokens, __global const int* rows,
                            int has_rows, int first_row, __global const int* starts, __global float* out,
                            int accumulate) {
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
