// Online softmax over blocks of keys (Milakov and Gimelshein 2018).
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "attention.h"
#include "panels.h"

constexpr int64_t kKeys = 64;  // positions at a time: a head's keys and values of them fit the L1 cache

// One query head of one token: weights are relative to the largest score so far.
struct Running {
  float largest = -std::numeric_limits<float>::infinity(), total = 0;
};

struct Mix {
  pi2_cpu& cpu;
  const pi2_attention& a;
  const KvCache& cache;
  int64_t start, n;

  int64_t group() const { return a.heads / a.kv_heads; }  // query heads that share a KV head
  int64_t oldest(int64_t t) const { return a.window ? std::max<int64_t>(0, start + t + 1 - a.window) : 0; }

  const uint8_t* row(const void* cached, int64_t kv_head, int64_t position) const {
    const int64_t at = (kv_head * cache.room + position) * a.head_dim;
    return static_cast<const uint8_t*>(cached) + at * (cache.half ? 2 : 4);
  }

  // Positions [first, first + count) of a head as floats (count, head_dim): where they lie, or in `scratch`.
  const float* floats(const void* cached, int64_t kv_head, int64_t first, int64_t count,
                      float* scratch) const {
    const uint8_t* from = row(cached, kv_head, first);
    if (!cache.half) return reinterpret_cast<const float*>(from);
    const int64_t all = count * a.head_dim;
    cpu.kernels->decode(pi2::DType::kF16, &from, 1, all, 0, all, scratch);
    return scratch;
  }

  // Scores become weights; returns what older sums are to be multiplied by.
  float weigh(Running& run, float* scores, int64_t count) const {
    float largest = run.largest, shrink = 1;
    for (int64_t j = 0; j < count; ++j) {
      if (a.softcap > 0) scores[j] = a.softcap * std::tanh(scores[j] / a.softcap);
      largest = std::max(largest, scores[j]);
    }
    if (largest > run.largest) {
      shrink = std::exp(run.largest - largest);
      run.total *= shrink;
      run.largest = largest;
    }
    run.total += cpu.kernels->panels->weigh(scores, count, largest);
    return shrink;
  }

  // Adds `count` positions to one token's sum, (head_dim).
  void add(Running& run, const float* q, const float* keys, const float* values, int64_t count,
           float* sum) const {
    float weights[kKeys];
    cpu.kernels->scores(q, keys, count, a.head_dim, weights);
    const float shrink = weigh(run, weights, count);
    if (shrink != 1)
      for (int64_t c = 0; c < a.head_dim; ++c) sum[c] *= shrink;
    cpu.kernels->add_product(weights, values, count, a.head_dim, sum);
  }
};
