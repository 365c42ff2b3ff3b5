// The C interface of the FFN: one token range by range (cluster.cpp), many all at once (batch.cpp).
#include "ffn.h"

#include "cluster.h"

namespace {

int64_t one_token(pi2_cpu& cpu, const pi2_ffn& f, const float* x, const pi2::Candidates& candidates,
                  float* out) {
  pi2::OneToken token(cpu, f, candidates, x, cpu.token);
  token.prepare();
  cpu.pool.for_each(token.ranges(), [&](int64_t range) { token.compute(range); });
  return token.total(out);
}

}  // namespace

extern "C" int64_t pi2_cpu_ffn(pi2_cpu* cpu, const pi2_ffn* f, const float* x, int64_t n, const int32_t* rows,
                               int64_t n_rows, float* out) {
  return pi2_cpu_slab_ffn(cpu, f, x, n, rows, rows, n_rows, out);
}

extern "C" int64_t pi2_cpu_slab_ffn(pi2_cpu* cpu, const pi2_ffn* f, const float* x, int64_t n,
                                    const int32_t* neurons, const int32_t* slots, int64_t k, float* out) {
  if (n == 0) return 0;
  if (n > 1) return ffn_many(*cpu, *f, x, n, slots, k, out);
  return one_token(*cpu, *f, x, {neurons, slots, k}, out);
}
