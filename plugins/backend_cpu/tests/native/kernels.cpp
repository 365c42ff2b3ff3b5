// Random calls of every instruction set in blocks of memory that end where the data ends, at any alignment
// that the interface allows, against a plain loop in double.
#include <algorithm>
#include <vector>

#include "data.h"

namespace {

// The activation function, and its error: that of x times the slope (pi2.testing.reference).
Value activate(int32_t kind, Value x) {
  const double g = x.value, positive = std::max(g, 0.0), loss = kExact * std::fabs(g);
  switch (kind) {
    case PI2_RELU: return {positive, x.bound + loss};
    case PI2_RELU2: return {positive * positive, (2 * positive + x.bound) * x.bound + loss * positive};
    case PI2_SILU: return {g / (1 + std::exp(-g)), 1.1 * x.bound + loss};
    case PI2_GELU: return {0.5 * g * (1 + std::erf(g * std::sqrt(0.5))), 1.13 * x.bound + loss};
    default: {
      const double inner = std::sqrt(2 / std::acos(-1.0)) * (g + 0.044715 * g * g * g);
      return {0.5 * g * (1 + std::tanh(inner)), 1.13 * x.bound + loss};
    }
  }
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names(1);
  for (const char* c = pi2_cpu_isas(); *c; ++c) {
    if (*c == '\n') names.emplace_back();
    else names.back() += *c;
  }
  return names;
}

struct Rows {
  std::unique_ptr<Exact<int32_t>> chosen;  // none: all
  int64_t count;
  const int32_t* data() const { return chosen ? chosen->data : nullptr; }
  int64_t at(int64_t i) const { return chosen ? chosen->data[i] : i; }
};

Rows some_rows(Random& r, int64_t all) {
  if (r.one_in(3)) return {nullptr, all};
  std::vector<int32_t> kept;
  const int64_t share = r.below(5);  // quarters: none to all
  for (int64_t i = 0; i < all; ++i)
    if (r.below(4) < share) kept.push_back(static_cast<int32_t>(i));
  const auto count = static_cast<int64_t>(kept.size());
  auto exact = std::make_unique<Exact<int32_t>>(count, 4 * r.below(4));
  std::copy(kept.begin(), kept.end(), exact->data);
  return {std::move(exact), count};
}

// x (n, cols); `bad` is the token that got an element which is not finite, or -1.
Exact<float> inputs(Random& r, int64_t n, int64_t cols, int64_t* bad) {
  Exact<float> x(n * cols, 4 * r.below(16));
  for (int64_t t = 0; t < n; ++t) {
    const float scale = r.pick({1.0f, 1.0f, 1e-3f, 30.0f, 0.0f, 1e-37f});
    for (int64_t c = 0; c < cols; ++c) x.data[t * cols + c] = scale * r.normal();
  }
  *bad = n > 0 && r.one_in(4) ? r.below(n) : -1;
  if (*bad >= 0) x.data[*bad * cols + r.below(cols)] = r.pick({NAN, INFINITY, -INFINITY});
  return x;
}

int64_t some_cols(Random& r, bool quantised) {
  return quantised ? 32 * (1 + r.below(12))
                   : r.pick<int64_t>({1, 7, 31, 32, 33, 63, 64, 65, 95, 97, 257, 321});
}

void linear_case(Random& r, const Context& c) {
  const int32_t dtype = static_cast<int32_t>(r.below(4));
  const int64_t cols = some_cols(r, dtype >= PI2_Q8_0), bytes = row_bytes(dtype, cols);
  const int64_t all = r.pick<int64_t>({0, 1, 2, 3, 5, 16, 17, 65, 300}),
                n = r.one_in(9) ? 131 : r.pick<int64_t>({0, 1, 1, 2, 3, 5, 33});
  Exact<uint8_t> weights(all * bytes, r.below(64));
  for (int64_t i = 0; i < all; ++i) fill_row(r, dtype, cols, weights.data + i * bytes);
  int64_t bad;
  const Exact<float> x = inputs(r, n, cols, &bad);
  const Rows rows = some_rows(r, all);
  Exact<float> out(n * rows.count, 4 * r.below(16));
  const pi2_matrix matrix{weights.data, all, cols, bytes, dtype};
  pi2_cpu_linear(c.cpu, &matrix, x.data, n, rows.data(), rows.count, out.data);
  for (int64_t t = 0; t < n; ++t)
    for (int64_t j = 0; j < rows.count; ++j) {
      const float got = out.data[t * rows.count + j];
      if (t == bad && std::isfinite(got)) fail(c.name + ": a finite product of an input that is not");
      if (t == bad) continue;
      const uint8_t* row = weights.data + rows.at(j) * bytes;
      check(c, "linear", got, dot(dtype, row, x.data + t * cols, cols, c.tolerance(dtype)));
    }
}

// A row's bits are its own, whichever rows are computed with it.
void company_case(Random& r, const Context& c) {
  const int32_t dtype = static_cast<int32_t>(r.below(4));
  const int64_t cols = r.one_in(2) ? some_cols(r, true) : 32 * (1 + r.below(40));
  const int64_t bytes = row_bytes(dtype, cols), all = r.pick<int64_t>({1, 4, 9, 40, 131});
  Exact<uint8_t> weights(all * bytes, r.below(64));
  for (int64_t i = 0; i < all; ++i) fill_row(r, dtype, cols, weights.data + i * bytes);
  int64_t bad;
  const Exact<float> x = inputs(r, 1, cols, &bad);
  const Rows rows = some_rows(r, all);
  const pi2_matrix matrix{weights.data, all, cols, bytes, dtype};
  Exact<float> together(all, 0), chosen(rows.count, 0);
  pi2_cpu_linear(c.cpu, &matrix, x.data, 1, nullptr, all, together.data);
  pi2_cpu_linear(c.cpu, &matrix, x.data, 1, rows.data(), rows.count, chosen.data);
  for (int64_t j = 0; j < rows.count; ++j) {
    const float one = chosen.data[j], other = together.data[rows.at(j)];
    if (std::memcmp(&one, &other, 4) != 0 && !(std::isnan(one) && std::isnan(other)))
      fail(c.name + ": other rows changed bits");
  }
}

// A random layout: parts in any format, at any 16 bytes, bundles back to back at any byte.
pi2_ffn some_ffn(Random& r) {
  pi2_ffn f{};
  f.gate = r.one_in(3) ? PI2_NONE : static_cast<int32_t>(r.below(4));
  f.up = static_cast<int32_t>(r.below(4));
  f.down = static_cast<int32_t>(r.below(4));
  f.d_model = some_cols(r, std::max({f.gate, f.up, f.down}) >= PI2_Q8_0);
  f.count = r.pick<int64_t>({0, 1, 2, 15, 17, 64, 65, 130});
  f.up_offset = f.gate == PI2_NONE ? 0 : (row_bytes(f.gate, f.d_model) + 15) / 16 * 16;
  f.down_offset = f.up_offset + (row_bytes(f.up, f.d_model) + 15) / 16 * 16;
  f.stride = f.down_offset + row_bytes(f.down, f.d_model);
  f.bias_offset = r.one_in(2) ? -1 : f.stride;
  if (f.bias_offset >= 0) f.stride += f.gate == PI2_NONE ? 4 : 8;
  f.activation = static_cast<int32_t>(r.below(5));
  f.up_relu = f.gate != PI2_NONE && r.one_in(2);
  return f;
}

double bias(const pi2_ffn& f, const uint8_t* bundle, int64_t which) {
  float value = 0;
  if (f.bias_offset >= 0) std::memcpy(&value, bundle + f.bias_offset + 4 * which, 4);
  return value;
}

Value hidden(const pi2_ffn& f, const uint8_t* bundle, const float* x, const Context& c) {
  const bool gated = f.gate != PI2_NONE;
  Value u = dot(f.up, bundle + f.up_offset, x, f.d_model, c.tolerance(f.up), bias(f, bundle, gated));
  if (!gated) return activate(f.activation, u);
  if (f.up_relu) u.value = std::max(u.value, 0.0);
  const Value a = activate(f.activation, dot(f.gate, bundle + f.gate_offset, x, f.d_model,
                                             c.tolerance(f.gate), bias(f, bundle, 0)));
  return {a.value * u.value, std::fabs(a.value) * u.bound + std::fabs(u.value) * a.bound + a.bound * u.bound};
}

// The most that a weight of this block of a row can be.
double largest_weight(int32_t dtype, const uint8_t* row, int64_t cols, int64_t column) {
  const int64_t quants = dtype == PI2_Q8_0 ? cols : cols / 2;
  return (dtype == PI2_Q8_0 ? 127 : 8) * std::fabs(from_half(row + quants + column / 32 * 2));
}

// Down in 16 bits (src/down.cpp, Packed): every term is off by half a step of the largest one's 32767.
bool in_sixteen_bits(const pi2_ffn& f, int64_t n, const Context& c) {
  const bool zeros = f.activation == PI2_RELU || f.activation == PI2_RELU2;
  return n > 1 && !zeros && c.integer && (f.down == PI2_Q8_0 || f.down == PI2_Q4_0);
}

void ffn_case(Random& r, const Context& c) {
  pi2_ffn f = some_ffn(r);
  const int64_t n = r.one_in(30) ? 261 : r.pick<int64_t>({0, 1, 1, 1, 2, 5}), d = f.d_model;
  Exact<uint8_t> bundles(f.count * f.stride, r.below(64));
  f.bundles = bundles.data;
  for (int64_t i = 0; i < f.count; ++i) {
    uint8_t* b = bundles.data + i * f.stride;
    std::fill_n(b, f.stride, uint8_t{0});  // biases, and what lies between the parts
    if (f.gate != PI2_NONE) fill_row(r, f.gate, d, b + f.gate_offset);
    fill_row(r, f.up, d, b + f.up_offset);
    fill_row(r, f.down, d, b + f.down_offset);
    if (f.bias_offset >= 0) fill_row(r, PI2_F32, f.gate == PI2_NONE ? 1 : 2, b + f.bias_offset);
  }
  int64_t bad;
  const Exact<float> x = inputs(r, n, d, &bad);
  const Rows rows = some_rows(r, f.count);
  Exact<float> out(n * d, 4 * r.below(16));
  const int64_t active = pi2_cpu_ffn(c.cpu, &f, x.data, n, rows.data(), rows.count, out.data);
  if (active < 0 || active > n * rows.count) fail(c.name + ": more activations than neurons");
  for (int64_t t = 0; t < n; ++t) {
    if (t == bad) continue;
    std::vector<Value> y(static_cast<size_t>(d), Value{0, 1e-36});
    std::vector<double> widest(static_cast<size_t>(d), 0.0);
    double highest = 0;
    for (int64_t i = 0; i < rows.count; ++i) {
      const uint8_t* b = bundles.data + rows.at(i) * f.stride;
      const Value h = hidden(f, b, x.data + t * d, c);
      highest = std::max(highest, std::fabs(h.value) + h.bound);
      for (int64_t k = 0; k < d; ++k) {
        if (in_sixteen_bits(f, n, c)) {
          double& most = widest[static_cast<size_t>(k)];
          most = std::max(most, largest_weight(f.down, b + f.down_offset, d, k));
        }
        const double w = weight(f.down, b + f.down_offset, d, k);
        y[static_cast<size_t>(k)].value += h.value * w;
        y[static_cast<size_t>(k)].bound += (h.bound + kExact * (std::fabs(h.value) + h.bound)) * std::fabs(w);
      }
    }
    for (int64_t k = 0; k < d; ++k) {
      Value& want = y[static_cast<size_t>(k)];
      want.bound += static_cast<double>(rows.count) * highest * widest[static_cast<size_t>(k)] / 65534;
      check(c, "ffn", out.data[t * d + k], want);
    }
  }
}

}  // namespace

void stress_kernels(int64_t cases, const std::string& isa_prefix) {
  int64_t matching = 0;
  for (const auto& isa : instruction_sets()) {
    if (isa.compare(0, isa_prefix.size(), isa_prefix) != 0) continue;
    ++matching;
    for (const int32_t integer : {0, 1})
      for (const int32_t threads : {1, 3}) {
        pi2_cpu* cpu = pi2_cpu_open(threads, nullptr, isa.c_str(), integer);
        if (cpu == nullptr) fail("cannot open " + isa);
        const Context c{cpu, integer != 0,
                        isa + (integer ? " int8, " : " f32, ") + std::to_string(threads) + " threads"};
        Random r{std::mt19937(static_cast<uint32_t>(threads))};
        for (int64_t i = 0; i < cases; ++i) {
          linear_case(r, c);
          company_case(r, c);
          ffn_case(r, c);
          if (i % 5 == 0) attention_case(r, c);
        }
        pi2_cpu_close(cpu);
        std::printf("%s: %lld rounds\n", c.name.c_str(), static_cast<long long>(cases));
      }
  }
  if (matching == 0) fail("no instruction set begins with " + isa_prefix);
  if (pi2_cpu_open(1, nullptr, "none", 1) || pi2_cpu_open(0, nullptr, nullptr, 1))
    fail("opened what is not there");
}
