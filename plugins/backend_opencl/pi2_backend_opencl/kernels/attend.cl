// Attention of many tokens.  DIMS: columns of a head that a lane adds up; HALVES: keys and values in 16 bits.
#if HALVES
#define KV half
#define kv(from, i) vload_half(i, from)
#else
#define KV float
#define kv(from, i) (from)[i]
#endif

// out[t * width + head * dim + c]: token t at position start + t looks at the keys from position `first` on
// that are not behind it, or at `window` of them (0: all).  q (heads, n, dim); keys and values (heads /
// group, count, dim).  A work-group is a token and a head: a lane has a key at a time, then columns, and
// what was summed is rescaled whenever the largest score grows.  Global size (LANES, n, heads).
__kernel void attend(__global const float* q, __global const KV* keys, __global const KV* values, int group,
                     int dim, int n, int start, int first, int count, int window, float scale, float softcap,
                     __global float* out, int width) {
  const int lane = get_local_id(0), t = get_global_id(1), head = get_global_id(2);
  __local float weights[LANES];
  q += ((size_t)head * n + t) * dim;
  keys += (size_t)(head / group) * count * dim;
  values += (size_t)(head / group) * count * dim;
  const int last = start + t - first, begin = window > 0 ? max(0, last - window + 1) : 0;
  float sum[DIMS];
  for (int d = 0; d < DIMS; ++d) sum[d] = 0.0f;
  float top = -INFINITY, total = 0.0f;
  for (int tile = begin; tile <= last; tile += LANES) {
    const int key = tile + lane, there = min(LANES, last + 1 - tile);
    float score = -INFINITY;
    if (key <= last) {
      score = 0.0f;
      for (int c = 0; c < dim; ++c) score += q[c] * kv(keys, (size_t)key * dim + c);
      score *= scale;
      if (softcap > 0.0f) score = softcap * tanh(score / softcap);
    }
    weights[lane] = score;
    barrier(CLK_LOCAL_MEM_FENCE);
    float larger = top;
    for (int i = 0; i < there; ++i) larger = fmax(larger, weights[i]);
    barrier(CLK_LOCAL_MEM_FENCE);
    weights[lane] = exp(score - larger);
    barrier(CLK_LOCAL_MEM_FENCE);
    const float kept = exp(top - larger);
    total *= kept;
    for (int d = 0; d < DIMS; ++d) sum[d] *= kept;
    for (int i = 0; i < there; ++i) {
      total += weights[i];
      for (int d = 0; d < DIMS; ++d) {
        const int c = d * LANES + lane;
        if (c < dim) sum[d] += weights[i] * kv(values, (size_t)(tile + i) * dim + c);
      }
    }
    top = larger;
    barrier(CLK_LOCAL_MEM_FENCE);
  }
  for (int d = 0; d < DIMS; ++d) {
    const int c = d * LANES + lane;
    if (c < dim) out[(size_t)t * width + head * dim + c] = sum[d] / total;
  }
}
