// The KV cache, and what queries make of it.
#pragma once
#include "context.h"

struct KvCache {
  void *keys, *values;  // (kv_heads, room, head_dim)
  bool half;            // float16; else float32
  int64_t room;
};

// cpu.mixed = softmax(q . keys) values for the queries cpu.q, both (n, heads, head_dim), of the tokens at
// positions start ... start + n - 1, which are in the cache already.
void mix_one(pi2_cpu& cpu, const pi2_attention& a, const KvCache& cache, int64_t start);
void mix_many(pi2_cpu& cpu, const pi2_attention& a, const KvCache& cache, int64_t start, int64_t n);
