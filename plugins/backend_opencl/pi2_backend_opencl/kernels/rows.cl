// Rows of a matrix times activations.  A cluster is LANES rows; a group is 32 columns; PLANES 16-byte words
// hold a row's weights of a group:
//   words   uint4 [cluster][group][plane][lane]     scales   half [cluster][group][lane] (quantised formats)
// so a wave that works on one cluster reads whole lines, and rows picked at random are right all the same.
// DTYPE 2: q8_0, 3: q4_0, 1: f16, 0: f32.  TOKENS: tokens at a time.
#if DTYPE == 3
#define PLANES 1
#elif DTYPE == 2
#define PLANES 2
#elif DTYPE == 1
#define PLANES 4
#else
#define PLANES 8
#endif

#define PLACE(c, g, p, lane) ((((c) * groups + (g)) * PLANES + (p)) * LANES + (lane))
#if WEIGHTS == 1
#define WEIGHTS_ARG __read_only image1d_buffer_t words
#define word(c, g, p, lane) read_imageui(words, PLACE(c, g, p, lane))
#elif WEIGHTS == 2
#define WEIGHTS_ARG __read_only image2d_t words
__constant sampler_t kNearest = CLK_NORMALIZED_COORDS_FALSE | CLK_ADDRESS_NONE | CLK_FILTER_NEAREST;
#define word(c, g, p, lane) read_imageui(words, kNearest, (int2)((c) * LANES + (lane), (g) * PLANES + (p)))
#else
#define WEIGHTS_ARG __global const uint4* words
#define word(c, g, p, lane) words[PLACE((size_t)(c), g, p, lane)]
#endif

#if INPUTS == 1
#define INPUTS_ARG __read_only image1d_buffer_t x
#define input(i) read_imagef(x, (int)(i))
#else
#define INPUTS_ARG __global const float4* x
#define input(i) x[i]
#endif

inline float4 bytes_of(uint w) { return convert_float4(as_char4(w)); }
inline float4 nibbles_of(uint w) { return convert_float4(as_uchar4(w & 0x0f0f0f0fu)) - 8.0f; }

#if DTYPE == 1 && WEIGHTS != 0
inline float4 halves_of(uint a, uint b) {
  return (float4)(convert_float2(as_half2(a)), convert_float2(as_half2(b)));
}
#endif

// The 32 weights of one row in a group, without their scale, in the order of the columns.
inline void unpack(WEIGHTS_ARG, int groups, int c, int g, int lane, float4 w[8]) {
#if DTYPE == 3
  const uint4 q = word(c, g, 0, lane);
  w[0] = nibbles_of(q.s0), w[1] = nibbles_of(q.s1), w[2] = nibbles_of(q.s2), w[3] = nibbles_of(q.s3);
  w[4] = nibbles_of(q.s0 >> 4), w[5] = nibbles_of(q.s1 >> 4);
  w[6] = nibbles_of(q.s2 >> 4), w[7] = nibbles_of(q.s3 >> 4);
#elif DTYPE == 2
  for (int p = 0; p < 2; ++p) {
    const uint4 q = word(c, g, p, lane);
    w[4 * p] = bytes_of(q.s0), w[4 * p + 1] = bytes_of(q.s1);
    w[4 * p + 2] = bytes_of(q.s2), w[4 * p + 3] = bytes_of(q.s3);
  }
#elif DTYPE == 1
  for (int p = 0; p < 4; ++p) {
#if WEIGHTS == 0
    __global const half* h = (__global const half*)(words + PLACE((size_t)c, g, p, lane));
    w[2 * p] = vload_half4(0, h), w[2 * p + 1] = vload_half4(1, h);
#else
    const uint4 q = word(c, g, p, lane);
    w[2 * p] = halves_of(q.s0, q.s1), w[2 * p + 1] = halves_of(q.s2, q.s3);
#endif
  }
#else
  for (int p = 0; p < 8; ++p) w[p] = as_float4(word(c, g, p, lane));
#endif
}

inline float scale_of(__global const half* scales, int groups, int c, int g, int lane) {
#if DTYPE >= 2
  return vload_half(((size_t)c * groups + g) * LANES + lane, scales);
#else
  return 1.0f;
#endif
}

// y[t * y_stride + y_first + i] = row i . x[t], where row i is `rows[i] - first_row`, or i if there are no
// rows. x (tokens, groups * 32).  Global size (n rounded up to LANES, SPLITS, tokens / TOKENS rounded up).
WAVE __kernel void rows_times(WEIGHTS_ARG, __global const half* scales, int groups, INPUTS_ARG, int tokens,
                              __global const int* rows, int has_rows, int first_row, int n, __global float* y,
                              int y_stride, int y_first) {
  const int i = get_global_id(0), split = get_local_id(1), t0 = get_global_id(2) * TOKENS;
  const int row = has_rows ? rows[min(i, n - 1)] - first_row : min(i, n - 1);
  const int c = row / LANES, lane = row % LANES;
  float sum[TOKENS];
  for (int t = 0; t < TOKENS; ++t) sum[t] = 0.0f;
#if BROADCAST && TOKENS == 1
  SHARED_ROOM
#endif
  for (int begin = 0; begin < groups; begin += SPLITS) {  // as often in every split: there are barriers
    const int mine = begin + split < groups, g = mine ? begin + split : groups - 1;
    float4 w[8];
    unpack(words, groups, c, g, lane, w);
    const float scale = scale_of(scales, groups, c, g, lane);
    for (int t = 0; t < TOKENS; ++t) {
      const size_t at = ((size_t)min(t0 + t, tokens - 1) * groups + g) * 8;
      float part = 0.0f;
#if BROADCAST && TOKENS == 1
      share(input(at + (my_lane & 7)));
      part += dot(w[0], shared(0)) + dot(w[1], shared(1)) + dot(w[2], shared(2)) + dot(w[3], shared(3));
      part += dot(w[4], shared(4)) + dot(w[5], shared(5)) + dot(w[6], shared(6)) + dot(w[7], shared(7));
#else
      for (int k = 0; k < 8; ++k) part += dot(w[k], input(at + k));
#endif
      if (mine) sum[t] += scale * part;
    }
  }
  __local float parts[LANES * SPLITS];
  for (int t = 0; t < TOKENS; ++t) {
    barrier(CLK_LOCAL_MEM_FENCE);
    parts[split * LANES + get_local_id(0)] = sum[t];
    barrier(CLK_LOCAL_MEM_FENCE);
    if (split == 0 && i < n && t0 + t < tokens) {
      float total = 0.0f;
      for (int s = 0; s < SPLITS; ++s) total += parts[s * LANES + get_local_id(0)];
      y[(size_t)(t0 + t) * y_stride + y_first + i] = total;
    }
  }
}

#if DTYPE >= 2
// The same for one token whose activations are bytes with a scale for each group; `sums` of a group's bytes.
WAVE __kernel void rows_times_bytes(WEIGHTS_ARG, __global const half* scales, int groups,
                                    __global const uint* x, __global const float* x_scales,
                                    __global const int* sums, __global const int* rows, int has_rows,
                                    int first_row, int n, __global float* y, int y_first) {
  const int i = get_global_id(0), split = get_local_id(1);
  const int row = has_rows ? rows[min(i, n - 1)] - first_row : min(i, n - 1);
  const int c = row / LANES, lane = row % LANES;
  float sum = 0.0f;
  for (int g = split; g < groups; g += SPLITS) {
    __global const uint* a = x + g * 8;
    int d = 0;
#if DTYPE == 3
    const uint4 q = word(c, g, 0, lane);
    d = dot4(a[0], q.s0 & 0x0f0f0f0fu, d), d = dot4(a[1], q.s1 & 0x0f0f0f0fu, d);
    d = dot4(a[2], q.s2 & 0x0f0f0f0fu, d), d = dot4(a[3], q.s3 & 0x0f0f0f0fu, d);
    d = dot4(a[4], (q.s0 >> 4) & 0x0f0f0f0fu, d), d = dot4(a[5], (q.s1 >> 4) & 0x0f0f0f0fu, d);
    d = dot4(a[6], (q.s2 >> 4) & 0x0f0f0f0fu, d), d = dot4(a[7], (q.s3 >> 4) & 0x0f0f0f0fu, d);
    d -= 8 * sums[g];
#else
    for (int p = 0; p < 2; ++p) {
      const uint4 q = word(c, g, p, lane);
#if DOT == 2  // its second operand is unsigned: shift by 128, and take the shift back
      d = dot4(a[4 * p], q.s0 ^ 0x80808080u, d), d = dot4(a[4 * p + 1], q.s1 ^ 0x80808080u, d);
      d = dot4(a[4 * p + 2], q.s2 ^ 0x80808080u, d), d = dot4(a[4 * p + 3], q.s3 ^ 0x80808080u, d);
#else
      d = dot4(a[4 * p], q.s0, d), d = dot4(a[4 * p + 1], q.s1, d);
      d = dot4(a[4 * p + 2], q.s2, d), d = dot4(a[4 * p + 3], q.s3, d);
#endif
    }
#if DOT == 2
    d -= 128 * sums[g];
#endif
#endif
    sum += scale_of(scales, groups, c, g, lane) * x_scales[g] * (float)d;
  }
  __local float parts[LANES * SPLITS];
  parts[split * LANES + get_local_id(0)] = sum;
  barrier(CLK_LOCAL_MEM_FENCE);
  if (split == 0 && i < n) {
    float total = 0.0f;
    for (int s = 0; s < SPLITS; ++s) total += parts[s * LANES + get_local_id(0)];
    y[y_first + i] = total;
  }
}
#endif
