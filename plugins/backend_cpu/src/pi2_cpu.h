/* The C interface of pi2's CPU kernels: all that anyone outside includes.
 *
 * Weights stay where the caller has them, in pi2's row layout (pi2.tensor): float32, float16, or the quants
 * of a row followed by its float16 scales, one for 32 weights.  Nothing here allocates per call but scratch
 * that the context keeps.  A context serves one call at a time.
 */
#ifndef PI2_CPU_H
#define PI2_CPU_H
#include <stdint.h>

#include "pi2_abi.h"

#define PI2_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum pi2_dtype { PI2_NONE = -1, PI2_F32 = 0, PI2_F16 = 1, PI2_Q8_0 = 2, PI2_Q4_0 = 3 };
enum pi2_activation { PI2_RELU = 0, PI2_RELU2 = 1, PI2_SILU = 2, PI2_GELU = 3, PI2_GELU_TANH = 4 };

typedef struct pi2_cpu pi2_cpu; /* threads and scratch */

typedef struct {
  const uint8_t* data; /* (rows, row_bytes) */
  int64_t rows, cols, row_bytes;
  int32_t dtype;
} pi2_matrix;

typedef struct {
  const uint8_t* bundles; /* (count, stride) */
  int64_t count, stride, d_model;
  int32_t gate, up, down;                                   /* dtypes; gate may be PI2_NONE */
  int64_t gate_offset, up_offset, down_offset, bias_offset; /* bytes in a bundle; bias_offset -1: none */
  int32_t activation, up_relu;
} pi2_ffn;

typedef struct {
  const float* weight; /* NULL: no norm at all */
  const float* bias;   /* NULL: none */
  float eps;
  int32_t centred; /* != 0: LayerNorm; else RMSNorm */
} pi2_norm;

typedef struct { /* pi2.attention.AttentionSpec */
  pi2_matrix q, k, v, o;
  const float *q_bias, *k_bias, *v_bias, *o_bias; /* NULL: none */
  pi2_norm norm, q_norm, k_norm, post_norm, sum_norm;
  int32_t heads, kv_heads, head_dim;
  int32_t rope_dims; /* 0: no RoPE */
  int64_t window;    /* 0: none */
  float scale;
  float softcap; /* 0: none */
} pi2_attention;

/* Newline-separated instruction sets that this build has and this CPU can run, best first. */
PI2_API const char* pi2_cpu_isas(void);

/* A context with `threads` threads, the caller's included; `cpus` (threads) pins them, or NULL.  `isa` NULL:
 * the one that the environment variable PI2_CPU_ISA names, else the best. `integer` != 0: quantised weights
 * meet activations quantised to 8 bits; 0: float32 activations, exact. NULL if `isa` is not to be had. */
PI2_API pi2_cpu* pi2_cpu_open(int32_t threads, const int32_t* cpus, const char* isa, int32_t integer);
PI2_API void pi2_cpu_close(pi2_cpu* cpu);

/* The instruction set that the context uses. */
PI2_API const char* pi2_cpu_isa(const pi2_cpu* cpu);

/* out[t][j] = sum over c of x[t][c] * w[rows[j]][c]; rows NULL: all.  x (n, cols), out (n, n_rows). */
PI2_API void pi2_cpu_linear(pi2_cpu* cpu, const pi2_matrix* w, const float* x, int64_t n, const int32_t* rows,
                            int64_t n_rows, float* out);

/* Rows of outer * relu(inner * x + bias) that exceed `bounds`, ascending, and by how much
 * (pi2.powers.SupportsLowRank); rows and above have room for all.  Returns how many they are. */
PI2_API int64_t pi2_cpu_low_rank(pi2_cpu* cpu, const pi2_matrix* inner, const float* bias,
                                 const pi2_matrix* outer, const float* bounds, const float* x, int32_t* rows,
                                 float* above);

/* out[t] = sum over i of h[t][i] * down[rows[i]] (pi2.api.Backend.ffn); x and out (n, d_model).
 * Returns the number of (t, i) with h != 0. */
PI2_API int64_t pi2_cpu_ffn(pi2_cpu* cpu, const pi2_ffn* ffn, const float* x, int64_t n, const int32_t* rows,
                            int64_t n_rows, float* out);

/* The same over k neurons (ascending) of an FFN that has ffn->count, of which i lies in bundle slots[i]
 * (pi2.powers.SupportsSlab). */
PI2_API int64_t pi2_cpu_slab_ffn(pi2_cpu* cpu, const pi2_ffn* ffn, const float* x, int64_t n,
                                 const int32_t* neurons, const int32_t* slots, int64_t k, float* out);

typedef struct {             /* pi2.slot_tables.SlotTables */
  int32_t* slot_of;          /* (ffns, neurons) */
  int64_t* key_of;           /* (slots) */
  uint8_t *states, *touched; /* (slots) */
  int32_t* free;             /* (slots), of which n_free[0] are in use */
  int64_t *n_free, neurons;
} pi2_slots;

/* pi2.slot_tables.SlotSearch: slots of k neurons, -1 for those without; returns how many these are. */
PI2_API int64_t pi2_cpu_find_slots(const pi2_slots* tables, int64_t ffn, const int32_t* neurons, int64_t k,
                                   int32_t* slots);
/* Gives free slots to those without, as long as there are any; returns how many got one. */
PI2_API int64_t pi2_cpu_seat_slots(const pi2_slots* tables, int64_t ffn, const int32_t* neurons, int64_t k,
                                   int32_t* slots);

typedef struct pi2_stream pi2_stream; /* pi2.powers.SupportsStreaming */

typedef struct { /* pi2.powers.FfnPlace */
  int64_t file, offset;
  int32_t ffn;
} pi2_place;

typedef struct { /* pi2.powers.StreamCount */
  int64_t active, present, reads, bytes_read;
  double wall_s, wait_s, gate_s, up_down_s;
} pi2_stream_count;

typedef struct { /* pi2.powers.SPANS; cluster is the id of its first neuron */
  int32_t ffn, cluster;
  uint8_t stage, thread;
  int32_t neurons;
  double start, end;
} pi2_span;

/* `slab` has `slots` bundles, and `count` neurons an FFN; states (slots) are pi2.powers.SlotState.  Gates are
 * read apart in whole pages of `page` bytes.  `overlap` 0: nothing is computed while something is being read;
 * `bundled` 0: a read a row, matrix by matrix.  NULL: `abi` is of another version. */
PI2_API pi2_stream* pi2_cpu_stream_open(pi2_cpu* cpu, const pi2_ffn* slab, uint8_t* states, int64_t slots,
                                        const pi2_storage_abi* abi, int64_t page, int32_t two_phase,
                                        int64_t cluster, int32_t trace, int32_t overlap, int32_t bundled);
/* Begins a call: starts to read what is missing.  Before it is finished, the context may compute something
 * else and the stream may prefetch; x (d_model) stays where it is. */
PI2_API void pi2_cpu_stream_begin(pi2_stream* stream, const pi2_place* place, const int32_t* neurons,
                                  const int32_t* slots, int64_t k, const float* x);
/* 0, or the errno that `failure` has: then all that was begun is over, and what was not read is EMPTY. */
PI2_API int32_t pi2_cpu_stream_finish(pi2_stream* stream, float* out, pi2_stream_count* count,
                                      pi2_storage_failure* failure);
PI2_API int32_t pi2_cpu_stream_prefetch(pi2_stream* stream, const pi2_place* place, const int32_t* neurons,
                                        const int32_t* slots, int64_t k, pi2_storage_failure* failure);
/* slots NULL: all, and a call that was begun is given up.  Returns the bytes that were read. */
PI2_API int64_t pi2_cpu_stream_settle(pi2_stream* stream, const int32_t* slots, int64_t k, int32_t cancel);
/* How many spans there are, or, with `into`, moves them there. */
PI2_API int64_t pi2_cpu_stream_spans(pi2_stream* stream, pi2_span* into);
PI2_API void pi2_cpu_stream_close(pi2_stream* stream);

/* A whole attention block with its residual connection (pi2.powers.SupportsAttention); x and out (n, d). keys
 * and values (kv_heads, room, head_dim), PI2_F32 or PI2_F16, get n more positions from `start` on; cosines
 * and sines (n, rope_dims / 2) are those of these positions. */
PI2_API void pi2_cpu_attention(pi2_cpu* cpu, const pi2_attention* a, const float* x, int64_t n, void* keys,
                               void* values, int32_t kv_dtype, int64_t room, int64_t start,
                               const float* cosines, const float* sines, float* out);

#ifdef __cplusplus
}
#endif
#endif
