// What the parts of an FFN of many tokens share.
#pragma once
#include "ffn.h"

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// out[t] = sum over i of h[t][i] * down_i, with the h of n tokens in cpu.hidden (n, k), for the k neurons
// `rows` (down.cpp).  Returns how many h are not zero.
int64_t combine_many(pi2_cpu& cpu, const pi2_ffn& f, int64_t n, const int32_t* rows, int64_t k, float* out);
