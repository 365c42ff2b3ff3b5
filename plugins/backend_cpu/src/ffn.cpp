// The FFN of one token as a sum over its neurons: gate first, up where the gate is not zero, down as a sum of
// rows.
#include "ffn.h"

#include <algorithm>

namespace {

constexpr int64_t kNeurons = 16;  // claimed at a time: some 10 us of work
constexpr int64_t kSlice =
    256;  // columns of down summed at a time: 16 outputs stay in registers, rows stream

constexpr int64_t kAhead = 4;  // neurons: a dot takes some 40 ns, memory some 100 ns

// Asks memory for what the dots of a neuron certainly read: bundles lie too far apart for the hardware, which
// stops at the end of a page.
void prefetch(const pi2_ffn& f, const uint8_t* b) {
  const bool sparse = f.gate != PI2_NONE && (f.activation == PI2_RELU || f.activation == PI2_RELU2);
  const int64_t first = f.gate == PI2_NONE ? f.up_offset : f.gate_offset;
  for (int64_t at = first; at < (sparse ? f.up_offset : f.down_offset); at += 64) __builtin_prefetch(b + at);
}

// h of one neuron.
float neuron(const pi2_cpu& cpu, const pi2_ffn& f, const uint8_t* b, const float* x) {
  const bool gated = f.gate != PI2_NONE;
  const float first =
      dot(cpu, gated ? f.gate : f.up, b + (gated ? f.gate_offset : f.up_offset), x, 0, f.d_model);
  const float h = activate(f.activation, first + bias(f, b, 0));
  if (!gated || h == 0.0f) return h;
  const float up = dot(cpu, f.up, b + f.up_offset, x, 0, f.d_model) + bias(f, b, 1);
  return h * (f.up_relu && up <= 0 ? 0.0f : up);
}

// The down rows of the active neurons, in ascending order, column slice by column slice.  The
// order of every output's sum is that of the active neurons alone, whatever the threads and the candidates.
int64_t combine(pi2_cpu& cpu, const pi2_ffn& f, const int32_t* rows, int64_t n_rows, float* out) {
  cpu.down.clear();
  cpu.coefficients.clear();
  for (int64_t i = 0; i < n_rows; ++i) {
    if (cpu.hidden[i] == 0.0f) continue;
    cpu.down.push_back(bundle(f, rows, i) + f.down_offset);
    cpu.coefficients.push_back(cpu.hidden[i]);
  }
  const auto active = static_cast<int64_t>(cpu.down.size());
  cpu.pool.for_each((f.d_model + kSlice - 1) / kSlice, [&](int64_t slice) {
    const int64_t first = slice * kSlice, last = std::min(f.d_model, first + kSlice);
    cpu.kernels->combine(static_cast<pi2::DType>(f.down), cpu.down.data(), cpu.coefficients.data(), active,
                         f.d_model, first, last, out);
  });
  return active;
}

}  // namespace

extern "C" int64_t pi2_cpu_ffn(pi2_cpu* cpu, const pi2_ffn* f, const float* x, int64_t n, const int32_t* rows,
                               int64_t n_rows, float* out) {
  if (n == 0) return 0;
  if (n > 1) return ffn_many(*cpu, *f, x, n, rows, n_rows, out);
  if (cpu->integers_for(f->gate) || cpu->integers_for(f->up)) cpu->quantise(x, 1, f->d_model);
  cpu->hidden.resize(n_rows);
  cpu->pool.for_each((n_rows + kNeurons - 1) / kNeurons, [&](int64_t chunk) {
    const int64_t end = std::min(n_rows, (chunk + 1) * kNeurons);
    for (int64_t i = chunk * kNeurons; i < end; ++i) {
      if (i + kAhead < n_rows) prefetch(*f, bundle(*f, rows, i + kAhead));
      cpu->hidden[i] = neuron(*cpu, *f, bundle(*f, rows, i), x);
    }
  });
  return combine(*cpu, *f, rows, n_rows, out);
}
