// A whole attention block: norms, projections, RoPE, KV cache, causal attention, residual connection.
#include "attention.h"

#include <algorithm>
#include <cmath>

#include "panels.h"

namespace {

// x and y (d) may be the same.  Sums in double: a fixed order, and exact enough for any d.
void normalise(const pi2_norm& norm, const float* x, int64_t d, float* y) {
  double mean = 0, squares = 0;
  if (norm.centred) {
    for (int64_t i = 0; i < d; ++i) mean += x[i];
    mean /= static_cast<double>(d);
  }
  for (int64_t i = 0; i < d; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const double inverse = 1 / std::sqrt(squares / static_cast<double>(d) + norm.eps);
  for (int64_t i = 0; i < d; ++i) {
    y[i] = static_cast<float>((x[i] - mean) * inverse) * norm.weight[i];
    if (norm.bias) y[i] += norm.bias[i];
  }
}

// The pairs (i, i + dims / 2) of a head turn by the angle of the position.
void rotate(float* head, int64_t half, const float* cosines, const float* sines) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = head[i], second = head[i + half];
    head[i] = first * cosines[i] - second * sines[i];
    head[i + half] = second * cosines[i] + first * sines[i];
  }
}

struct Attention {
  pi2_cpu& cpu;
  const pi2_attention& a;
  const KvCache& cache;
  int64_t start;
  const float *cosines, *sines;  // (n, rope_dims / 2)

  // Bias, norm and RoPE of one head of token t, in place.
  void finish(float* head, const float* bias, const pi2_norm& norm, int64_t t) const {
    if (bias)
      for (int64_t i = 0; i < a.head_dim; ++i) head[i] += bias[i];
    if (norm.weight) normalise(norm, head, a.head_dim, head);
    const int64_t half = a.rope_dims / 2;
    rotate(head, half, cosines + t * half, sines + t * half);
  }

  // What the matrices gave for token t becomes scaled queries, and keys and values in the cache.
  void prepare(int64_t t) const {
    const int64_t h = a.head_dim, position = start + t;
    for (int64_t i = 0; i < a.heads; ++i) {
      float* q = cpu.q.data() + (t * a.heads + i) * h;
      finish(q, a.q_bias ? a.q_bias + i * h : nullptr, a.q_norm, t);
      for (int64_t c = 0; c < h; ++c) q[c] *= a.scale;
    }
    for (int64_t i = 0; i < a.kv_heads; ++i) {
      const int64_t from = (t * a.kv_heads + i) * h, to = (i * cache.room + position) * h;
      finish(cpu.k.data() + from, a.k_bias ? a.k_bias + i * h : nullptr, a.k_norm, t);
      store(cpu.k.data() + from, cache.keys, to);
      for (int64_t c = 0; a.v_bias && c < h; ++c) cpu.v[from + c] += a.v_bias[i * h + c];
      store(cpu.v.data() + from, cache.values, to);
    }
  }

  // One head's key or value into the cache, at element `to`.
  void store(const float* from, void* cached, int64_t to) const {
    if (cache.half) cpu.kernels->panels->to_halves(from, a.head_dim, static_cast<uint16_t*>(cached) + to);
    else std::copy_n(from, a.head_dim, static_cast<float*>(cached) + to);
  }
};

// out = sum_norm(x + post_norm(out + o_bias)), one token.
void close_block(const pi2_attention& a, const float* x, int64_t d, float* out) {
  if (a.o_bias)
    for (int64_t i = 0; i < d; ++i) out[i] += a.o_bias[i];
  if (a.post_norm.weight) normalise(a.post_norm, out, d, out);
  for (int64_t i = 0; i < d; ++i) out[i] += x[i];
  if (a.sum_norm.weight) normalise(a.sum_norm, out, d, out);
}

}  // namespace

extern "C" void pi2_cpu_attention(pi2_cpu* cpu, const pi2_attention* a, const float* x, int64_t n, void* keys,
                                  void* values, int32_t kv_dtype, int64_t room, int64_t start,
                                  const float* cosines, const float* sines, float* out) {
  if (n == 0) return;
  const int64_t d = a->q.cols;
  const float* y = x;
  if (a->norm.weight) {
    cpu->normed.resize(n * d);
    y = cpu->normed.data();
    cpu->pool.for_each(n, [&](int64_t t) { normalise(a->norm, x + t * d, d, cpu->normed.data() + t * d); });
  }
  cpu->q.resize(n * a->q.rows);
  cpu->k.resize(n * a->k.rows);
  cpu->v.resize(n * a->v.rows);
  cpu->mixed.resize(n * a->q.rows);
  const pi2_cpu::Product projections[] = {{&a->q, nullptr, a->q.rows, cpu->q.data()},
                                          {&a->k, nullptr, a->k.rows, cpu->k.data()},
                                          {&a->v, nullptr, a->v.rows, cpu->v.data()}};
  cpu->multiply(y, n, projections, 3);
  const KvCache cache{keys, values, kv_dtype == PI2_F16, room};
  const Attention attention{*cpu, *a, cache, start, cosines, sines};
  cpu->pool.for_each(n, [&](int64_t t) { attention.prepare(t); });
  if (n == 1) mix_one(*cpu, *a, cache, start);
  else mix_many(*cpu, *a, cache, start, n);
  const pi2_cpu::Product output{&a->o, nullptr, d, out};
  cpu->multiply(cpu->mixed.data(), n, &output, 1);
  cpu->pool.for_each(n, [&](int64_t t) { close_block(*a, x + t * d, d, out + t * d); });
}
