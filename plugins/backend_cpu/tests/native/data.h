// What the stress tests share: random weights in exactly sized memory, and what they are worth in double.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "../../src/pi2_cpu.h"

void stress_kernels(int64_t cases, const std::string& isa_prefix);
void stress_pool(int64_t rounds);
void stress_streams(int64_t cases);

constexpr double kExact = 2e-5;     // float32 sums of up to 400 terms
constexpr double kRounded = 0.012;  // activations rounded to 8 bits: the backend's stated tolerance

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "stress: %s\n", what.c_str());
  std::exit(1);
}

struct Random {
  std::mt19937 engine;
  int64_t below(int64_t n) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  float normal() { return std::normal_distribution<float>()(engine); }
  template <class T>
  T pick(std::initializer_list<T> from) {
    return from.begin()[below(static_cast<int64_t>(from.size()))];
  }
};

// count items at `shift` bytes into a block that ends with the last of them: the sanitizer sees one byte too
// many.
template <class T>
struct Exact {
  std::unique_ptr<uint8_t[]> block;
  T* data;
  int64_t count;
  Exact(int64_t n, int64_t shift)
      : block(new uint8_t[static_cast<size_t>(shift + n * static_cast<int64_t>(sizeof(T)))]),
        data(reinterpret_cast<T*>(block.get() + shift)),
        count(n) {}
};

inline int64_t row_bytes(int32_t dtype, int64_t cols) {
  switch (dtype) {
    case PI2_NONE: return 0;
    case PI2_F32: return 4 * cols;
    case PI2_F16: return 2 * cols;
    case PI2_Q8_0: return cols / 32 * 34;
    default: return cols / 32 * 18;
  }
}

// IEEE binary16 of small normal numbers only: what the cases are made of.
inline uint16_t to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
  const uint32_t sign = bits >> 16 & 0x8000;
  if (exponent <= 0) return static_cast<uint16_t>(sign);
  return static_cast<uint16_t>(sign | static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 1023));
}

inline double from_half(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  const int exponent = h >> 10 & 31;
  const double size = exponent ? std::ldexp(1024 + (h & 1023), exponent - 25) : std::ldexp(h & 1023, -24);
  return h & 0x8000 ? -size : size;
}

inline void fill_row(Random& r, int32_t dtype, int64_t cols, uint8_t* row) {
  const int64_t size = dtype == PI2_F32 ? 4 : 2;
  int64_t at = 0;
  if (dtype == PI2_Q8_0 || dtype == PI2_Q4_0)
    for (; at < row_bytes(dtype, cols) - cols / 16; ++at) row[at] = static_cast<uint8_t>(r.below(256));
  for (; at < row_bytes(dtype, cols); at += size) {
    const float value = r.one_in(8) ? 0.0f : r.normal() * (dtype == PI2_Q8_0 ? 0.01f : 0.1f);
    uint16_t half = to_half(value);
    if (r.one_in(16)) half = static_cast<uint16_t>(r.below(1024) | r.below(2) << 15);  // subnormal
    std::memcpy(row + at, size == 4 ? static_cast<const void*>(&value) : &half, static_cast<size_t>(size));
  }
}

inline double weight(int32_t dtype, const uint8_t* row, int64_t cols, int64_t c) {
  float value;
  switch (dtype) {
    case PI2_F32: std::memcpy(&value, row + 4 * c, 4); return value;
    case PI2_F16: return from_half(row + 2 * c);
    case PI2_Q8_0: return static_cast<int8_t>(row[c]) * from_half(row + cols + c / 32 * 2);
    default: {
      const int byte = row[c / 32 * 16 + c % 16], nibble = c % 32 < 16 ? byte & 15 : byte >> 4;
      return (nibble - 8) * from_half(row + cols / 2 + c / 32 * 2);
    }
  }
}

struct Value {
  double value, bound;  // a result, and how far off it may be
};

inline Value dot(int32_t dtype, const uint8_t* row, const float* x, int64_t cols, double tolerance,
                 double bias = 0) {
  double sum = bias, size = std::fabs(bias);
  for (int64_t c = 0; c < cols; ++c) {
    const double term = weight(dtype, row, cols, c) * x[c];
    sum += term;
    size += std::fabs(term);
  }
  return {sum, tolerance * size + static_cast<double>(cols) * 0x1p-126};  // subnormals may be flushed
}

struct Context {
  pi2_cpu* cpu;
  bool integer;
  std::string name;
  double tolerance(int32_t dtype) const {
    return integer && (dtype == PI2_Q8_0 || dtype == PI2_Q4_0) ? kRounded : kExact;
  }
};

inline void check(const Context& c, const char* what, double got, Value want) {
  if (std::fabs(got - want.value) <= want.bound) return;
  fail(c.name + ": " + what + " gave " + std::to_string(got) + ", not " + std::to_string(want.value) +
       " +- " + std::to_string(want.bound));
}

void attention_case(Random& r, const Context& c);
