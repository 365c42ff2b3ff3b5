// What an FFN does between its products.
enum { RELU, RELU_SQUARED, SILU, GELU, GELU_TANH };

inline float activate(int kind, float v) {
  switch (kind) {
    case RELU: return v <= 0.0f ? 0.0f : v;  // a NaN stays one
    case RELU_SQUARED: return v <= 0.0f ? 0.0f : v * v;
    case SILU: return v / (1.0f + exp(-v));
    case GELU: return 0.5f * v * (1.0f + erf(v * 0.70710678118654752f));
    default: return 0.5f * v * (1.0f + tanh(0.79788456080286536f * (v + 0.044715f * v * v * v)));
  }
}

// gate (tokens, n) becomes h; work-group g of token t counts what is not zero into counts[first + t * groups
// + g].  biases (neurons, 1 or 2) or none.
__kernel void combine(__global float* gate, __global const float* up, int gated, int kind, int up_relu,
                      __global const float* biases, int has_biases, __global const int* rows, int has_rows,
                      int n, __global int* counts, int first) {
  const int i = get_global_id(0), t = get_global_id(1);
  __local int found;
  if (get_local_id(0) == 0) found = 0;
  barrier(CLK_LOCAL_MEM_FENCE);
  if (i < n) {
    const size_t at = (size_t)t * n + i;
    const int neuron = has_rows ? rows[i] : i, each = gated ? 2 : 1;
    float h = activate(kind, gate[at] + (has_biases ? biases[each * neuron] : 0.0f));
    if (gated && h != 0.0f) {
      const float u = up[at] + (has_biases ? biases[2 * neuron + 1] : 0.0f);
      h *= up_relu && u <= 0.0f ? 0.0f : u;
    }
    gate[at] = h;
    if (h != 0.0f) atomic_inc(&found);
  }
  barrier(CLK_LOCAL_MEM_FENCE);
  if (get_local_id(0) == 0) counts[first + t * get_num_groups(0) + get_group_id(0)] = found;
}
