// Random attention blocks, called in pieces as a prompt and its answer are, against a plain loop in double.
#include <vector>

#include "data.h"

namespace {

using Doubles = std::vector<double>;

// A block and the memory that it points into, every piece as large as its contents.
struct Block {
  pi2_attention a{};
  std::vector<Exact<uint8_t>> weights;
  std::vector<Exact<float>> floats;

  const float* some_floats(Random& r, int64_t n, float around) {
    floats.emplace_back(n, 4 * r.below(4));
    for (int64_t i = 0; i < n; ++i) floats.back().data[i] = around + 0.2f * r.normal();
    return floats.back().data;
  }
  const float* perhaps(Random& r, int64_t n) { return r.one_in(2) ? some_floats(r, n, 0) : nullptr; }
  pi2_norm norm(Random& r, int64_t n) {
    if (r.one_in(2)) return {};
    const bool centred = r.one_in(2);
    return {some_floats(r, n, 1), centred ? perhaps(r, n) : nullptr, 1e-5f, centred};
  }
  pi2_matrix matrix(Random& r, int64_t rows, int64_t cols) {
    const auto dtype = static_cast<int32_t>(r.below(cols % 32 ? 2 : 4));
    const int64_t bytes = row_bytes(dtype, cols);
    weights.emplace_back(rows * bytes, r.below(64));
    for (int64_t i = 0; i < rows; ++i) fill_row(r, dtype, cols, weights.back().data + i * bytes);
    return {weights.back().data, rows, cols, bytes, dtype};
  }

  explicit Block(Random& r) {
    const int64_t d = r.pick<int64_t>({32, 33, 64, 95, 96});
    a.kv_heads = static_cast<int32_t>(1 + r.below(3));
    a.heads = a.kv_heads * static_cast<int32_t>(1 + r.below(3));
    a.head_dim = r.pick<int32_t>({8, 10, 16, 32});
    const int64_t queries = a.heads * a.head_dim, keys = a.kv_heads * a.head_dim;
    a.q = matrix(r, queries, d);
    a.k = matrix(r, keys, d);
    a.v = matrix(r, keys, d);
    a.o = matrix(r, d, queries);
    a.q_bias = perhaps(r, queries);
    a.k_bias = perhaps(r, keys);
    a.v_bias = perhaps(r, keys);
    a.o_bias = perhaps(r, d);
    a.norm = norm(r, d);
    a.q_norm = norm(r, a.head_dim);
    a.k_norm = norm(r, a.head_dim);
    a.post_norm = norm(r, d);
    a.sum_norm = norm(r, d);
    a.rope_dims = r.pick<int32_t>({0, a.head_dim / 2 / 2 * 2, a.head_dim});
    a.window = r.pick<int64_t>({0, 0, 1, 5, 64, 70});
    a.scale = 0.3f;
    a.softcap = r.one_in(3) ? 5.0f : 0.0f;
  }
};

Doubles times(const pi2_matrix& w, const Doubles& x, const float* bias) {
  Doubles y(static_cast<size_t>(w.rows));
  for (int64_t i = 0; i < w.rows; ++i) {
    double sum = bias ? bias[i] : 0;
    for (int64_t c = 0; c < w.cols; ++c)
      sum += weight(w.dtype, w.data + i * w.row_bytes, w.cols, c) * x[static_cast<size_t>(c)];
    y[static_cast<size_t>(i)] = sum;
  }
  return y;
}

void normalise(const pi2_norm& norm, double* x, int64_t n) {
  if (!norm.weight) return;
  double mean = 0, square = 0;
  for (int64_t i = 0; i < n; ++i) mean += norm.centred ? x[i] / static_cast<double>(n) : 0;
  for (int64_t i = 0; i < n; ++i) square += (x[i] - mean) * (x[i] - mean) / static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i)
    x[i] = (x[i] - mean) / std::sqrt(square + norm.eps) * norm.weight[i] + (norm.bias ? norm.bias[i] : 0);
}

// The sequence as the reference sees it: keys and values of every position so far, (kv_heads * head_dim)
// each.
struct Reference {
  const pi2_attention& a;
  std::vector<Doubles> keys, values;

  void turn(Doubles& heads, const pi2_norm& norm, const float* cosines, const float* sines) const {
    const auto h = static_cast<size_t>(a.head_dim), half = static_cast<size_t>(a.rope_dims / 2);
    for (size_t at = 0; at < heads.size(); at += h) {
      normalise(norm, &heads[at], a.head_dim);
      for (size_t i = 0; i < half; ++i) {
        const double first = heads[at + i], second = heads[at + i + half];
        heads[at + i] = first * cosines[i] - second * sines[i];
        heads[at + i + half] = second * cosines[i] + first * sines[i];
      }
    }
  }

  // One head's share of the values; q (head_dim), `from` its place in keys and values.
  void mix(const double* q, size_t from, double* out) const {
    const size_t first = a.window && keys.size() > static_cast<size_t>(a.window)
                             ? keys.size() - static_cast<size_t>(a.window)
                             : 0;
    const auto h = static_cast<size_t>(a.head_dim);
    double total = 0;
    for (size_t p = first; p < keys.size(); ++p) {
      double score = 0;
      for (size_t c = 0; c < h; ++c) score += a.scale * q[c] * keys[p][from + c];
      if (a.softcap > 0) score = a.softcap * std::tanh(score / a.softcap);
      const double share = std::exp(score);
      total += share;
      for (size_t c = 0; c < h; ++c) out[c] += share * values[p][from + c];
    }
    for (size_t c = 0; c < h; ++c) out[c] /= total;
  }

  Doubles next(const float* x, const float* cosines, const float* sines) {
    const int64_t d = a.q.cols;
    Doubles y(x, x + d);
    normalise(a.norm, y.data(), d);
    Doubles q = times(a.q, y, a.q_bias);
    keys.push_back(times(a.k, y, a.k_bias));
    values.push_back(times(a.v, y, a.v_bias));
    turn(q, a.q_norm, cosines, sines);
    turn(keys.back(), a.k_norm, cosines, sines);
    Doubles mixed(q.size());
    const auto h = static_cast<size_t>(a.head_dim), shared = static_cast<size_t>(a.heads / a.kv_heads);
    for (size_t i = 0; i * h < q.size(); ++i) mix(&q[i * h], i / shared * h, &mixed[i * h]);
    Doubles out = times(a.o, mixed, a.o_bias);
    normalise(a.post_norm, out.data(), d);
    for (size_t c = 0; c < out.size(); ++c) out[c] += x[c];
    normalise(a.sum_norm, out.data(), d);
    return out;
  }
};

}  // namespace

void attention_case(Random& r, const Context& c) {
  const Block block(r);
  const pi2_attention& a = block.a;
  const int64_t d = a.q.cols, half = a.rope_dims / 2, room = 1 + r.below(200);
  const bool halves = r.one_in(2);
  const int64_t bytes = a.kv_heads * room * a.head_dim * (halves ? 2 : 4);
  Exact<uint8_t> keys(bytes, 4 * r.below(4)), values(bytes, 4 * r.below(4));
  Reference reference{a, {}, {}};
  for (int64_t start = 0, n; start < room; start += n) {
    n = r.one_in(2) ? 1 : 1 + r.below(room - start);
    Exact<float> x(n * d, 4 * r.below(4)), out(n * d, 4 * r.below(4));
    Exact<float> cosines(n * half, 4 * r.below(4)), sines(n * half, 4 * r.below(4));
    for (int64_t i = 0; i < n * d; ++i) x.data[i] = r.normal();
    for (int64_t i = 0; i < n * half; ++i) {
      const float angle = 3 * r.normal();
      cosines.data[i] = std::cos(angle);
      sines.data[i] = std::sin(angle);
    }
    pi2_cpu_attention(c.cpu, &a, x.data, n, keys.data, values.data, halves ? PI2_F16 : PI2_F32, room, start,
                      cosines.data, sines.data, out.data);
    for (int64_t t = 0; t < n; ++t) {
      const Doubles want = reference.next(x.data + t * d, cosines.data + t * half, sines.data + t * half);
      for (int64_t i = 0; i < d; ++i) {
        const double got = out.data[t * d + i], exact = want[static_cast<size_t>(i)];
        // what rounding to 8 bits does behind a softmax has no useful bound; the bits must still be numbers
        const double bound = c.integer ? 1e30 : (halves ? 3e-2 : 1e-3) * (1 + std::fabs(exact));
        check(c, "attention", got, {exact, bound});
      }
    }
  }
}
