// A whole attention block: norms, projections, RoPE, KV cache, causal attention, residual connection.
#include <algorithm>
#include <cmath>
#include <limits>

#include "context.h"

namespace {

constexpr int64_t kKeys = 64;   // positions at a time: a head's keys and values of them fit the L1 cache
constexpr int64_t kTokens = 8;  // tokens that share them

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
  float *keys, *values;  // (kv_heads, room, head_dim)
  int64_t room, start;
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
      const int64_t from = (t * a.kv_heads + i) * h, to = (i * room + position) * h;
      finish(cpu.k.data() + from, a.k_bias ? a.k_bias + i * h : nullptr, a.k_norm, t);
      std::copy_n(cpu.k.data() + from, h, keys + to);
      for (int64_t c = 0; c < h; ++c)
        values[to + c] = cpu.v[from + c] + (a.v_bias ? a.v_bias[i * h + c] : 0.0f);
    }
  }

  // Online softmax (Milakov and Gimelshein 2018): weights relative to the largest score so far.
  struct Running {
    float largest = -std::numeric_limits<float>::infinity(), total = 0;
  };

  // Adds the `count` positions from `first` on to one token's sum, (head_dim).
  void add(Running& run, const float* q, int64_t offset, int64_t count, float* sum) const {
    float weights[kKeys];
    cpu.kernels->scores(q, keys + offset, count, a.head_dim, weights);
    float largest = run.largest;
    for (int64_t j = 0; j < count; ++j) {
      if (a.softcap > 0) weights[j] = a.softcap * std::tanh(weights[j] / a.softcap);
      largest = std::max(largest, weights[j]);
    }
    if (largest > run.largest) {
      const float shrink = std::exp(run.largest - largest);
      run.total *= shrink;
      for (int64_t c = 0; c < a.head_dim; ++c) sum[c] *= shrink;
      run.largest = largest;
    }
    for (int64_t j = 0; j < count; ++j) run.total += weights[j] = std::exp(weights[j] - largest);
    cpu.kernels->add_product(weights, values + offset, count, a.head_dim, sum);
  }

  // Tokens [first, last) of query head i.  Blocks of keys begin at multiples of kKeys, whatever the tokens:
  // how a prompt is cut into chunks changes no bit.
  void attend(int64_t i, int64_t first, int64_t last) const {
    const int64_t h = a.head_dim, head = i / (a.heads / a.kv_heads) * room;
    Running run[kTokens];
    for (int64_t t = first; t < last; ++t) std::fill_n(cpu.mixed.data() + (t * a.heads + i) * h, h, 0.0f);
    const int64_t oldest = a.window ? std::max<int64_t>(0, start + first + 1 - a.window) : 0;
    for (int64_t block = oldest / kKeys * kKeys; block < start + last; block += kKeys)
      for (int64_t t = first; t < last; ++t) {
        const int64_t position = start + t;
        const int64_t from = a.window ? std::max(block, position + 1 - a.window) : block;
        const int64_t to = std::min(block + kKeys, position + 1);
        const int64_t at = (t * a.heads + i) * h;
        if (from < to)
          add(run[t - first], cpu.q.data() + at, (head + from) * h, to - from, cpu.mixed.data() + at);
      }
    for (int64_t t = first; t < last; ++t)
      for (int64_t c = 0; c < h; ++c) cpu.mixed[(t * a.heads + i) * h + c] /= run[t - first].total;
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

extern "C" void pi2_cpu_attention(pi2_cpu* cpu, const pi2_attention* a, const float* x, int64_t n,
                                  float* keys, float* values, int64_t room, int64_t start,
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
  const Attention attention{*cpu, *a, keys, values, room, start, cosines, sines};
  cpu->pool.for_each(n, [&](int64_t t) { attention.prepare(t); });
  const int64_t groups = (n + kTokens - 1) / kTokens;
  cpu->pool.for_each(a->heads * groups, [&](int64_t chunk) {
    const int64_t first = chunk % groups * kTokens;
    attention.attend(chunk / groups, first, std::min(n, first + kTokens));
  });
  const pi2_cpu::Product output{&a->o, nullptr, d, out};
  cpu->multiply(cpu->mixed.data(), n, &output, 1);
  cpu->pool.for_each(n, [&](int64_t t) { close_block(*a, x + t * d, d, out + t * d); });
}
