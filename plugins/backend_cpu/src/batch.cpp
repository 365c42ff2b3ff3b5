// Many tokens at once: weights are unpacked once for all of them, and multiplied panel by tile (panels.h).
#include "batch.h"

#include <algorithm>
#include <cmath>

#include "panels.h"

namespace {

using pi2::Kind;

constexpr int64_t kRows = 64;      // of weights, claimed at a time with
constexpr int64_t kGroup = 128;    // tokens: their tiles come from the L2 cache for one panel after the other
constexpr int64_t kColumns = 256;  // of h, looked through at a time
constexpr int64_t kPanelBytes = 20 << 10;  // unpacked at a time: most of an L1 cache
Kind kind_of(const pi2_cpu& cpu, int32_t dtype) {
  if (!cpu.integers_for(dtype)) return Kind::kFloat;
  return dtype == PI2_Q4_0 ? Kind::kNibbles : Kind::kBytes;
}

int64_t tile_bytes(const pi2_cpu& cpu, Kind kind, int64_t cols) {
  return ceil_div(cols, pi2::kBlock) * cpu.kernels->panels->tile_bytes[static_cast<int>(kind)];
}

int64_t chunks_of(int64_t n_rows, int64_t n) { return ceil_div(n_rows, kRows) * ceil_div(n, kGroup); }

// x (n, cols) as tiles for weights of these formats; PI2_NONE among them is passed over.
void pack(pi2_cpu& cpu, const float* x, int64_t n, int64_t cols, std::initializer_list<int32_t> dtypes) {
  bool quantised = false, packed[pi2::kKinds] = {};
  for (const int32_t dtype : dtypes) {
    if (dtype == PI2_NONE) continue;
    const Kind kind = kind_of(cpu, dtype);
    const int k = static_cast<int>(kind);
    if (packed[k]) continue;
    packed[k] = true;
    if (kind != Kind::kFloat && !quantised) cpu.quantise(x, n, cols, cpu.batch);
    quantised |= kind != Kind::kFloat;
    const int64_t bytes = tile_bytes(cpu, kind, cols), tiles = ceil_div(n, pi2::kTokens);
    cpu.tiles[k].resize(tiles * bytes);
    cpu.pool.for_each(tiles, [&](int64_t i) {
      const int64_t count = std::min<int64_t>(pi2::kTokens, n - i * pi2::kTokens);
      const float *floats[pi2::kTokens], *scales[pi2::kTokens];
      const int8_t* quants[pi2::kTokens];
      for (int64_t t = 0; t < count; ++t) {
        floats[t] = x + (i * pi2::kTokens + t) * cols;
        if (kind == Kind::kFloat) continue;
        const pi2::Quantised token = cpu.batch.token(i * pi2::kTokens + t);
        quants[t] = token.quants;
        scales[t] = token.scales;
      }
      uint8_t* to = cpu.tiles[k].data() + i * bytes;
      if (kind == Kind::kFloat) cpu.kernels->panels->pack_floats(floats, count, cols, to);
      else cpu.kernels->panels->pack_quants(kind, quants, scales, count, cols / pi2::kBlock, to);
    });
  }
}

// One chunk of the packed tokens times rows of w (rows NULL: all): store(t, j, count, sums) gets every
// token's products with rows j .. j + count - 1.
template <class Store>
void multiply_chunk(const pi2_cpu& cpu, const pi2_matrix& w, const int32_t* rows, int64_t n_rows, int64_t n,
                    int64_t chunk, Store&& store) {
  const pi2::Panels& panels = *cpu.kernels->panels;
  const Kind kind = kind_of(cpu, w.dtype);
  const int k = static_cast<int>(kind);
  const int64_t groups = ceil_div(n, kGroup), blocks = ceil_div(w.cols, pi2::kBlock);
  const int64_t step = kPanelBytes / panels.panel_bytes[k], bytes = tile_bytes(cpu, kind, w.cols);
  const int64_t first_row = chunk / groups * kRows, last_row = std::min(n_rows, first_row + kRows);
  const int64_t first = chunk % groups * kGroup, last = std::min(n, first + kGroup);
  const int64_t tiles = ceil_div(last - first, pi2::kTokens), tile_sums = pi2::kTokens * panels.rows;
  alignas(64) uint8_t panel[kPanelBytes];
  alignas(64) float sums[kRows * kGroup];  // (panels, tiles, tokens of a tile, rows of a panel)
  std::fill_n(sums, kRows * kGroup, 0.0f);
  for (int64_t b = 0; b < blocks; b += step) {
    const int64_t count = std::min(step, blocks - b);
    float* at = sums;
    for (int64_t j = first_row; j < last_row; j += panels.rows) {
      const uint8_t* pointers[pi2::kMaxPanelRows];
      for (int64_t r = 0; r < panels.rows; ++r) {
        const int64_t row = std::min(j + r, last_row - 1);
        pointers[r] = w.data + (rows ? rows[row] : row) * w.row_bytes;
      }
      panels.pack_rows(kind, static_cast<pi2::DType>(w.dtype), pointers, w.cols, b, count, panel);
      const uint8_t* tile = cpu.tiles[k].data() + first / pi2::kTokens * bytes + b * panels.tile_bytes[k];
      for (int64_t i = 0; i < tiles; ++i, tile += bytes, at += tile_sums)
        panels.multiply(kind, panel, tile, count, at);
    }
  }
  float* at = sums;
  for (int64_t j = first_row; j < last_row;
       j += panels.rows, at += (tiles * pi2::kTokens - (last - first)) * panels.rows)
    for (int64_t t = first; t < last; ++t, at += panels.rows)
      store(t, j, std::min<int64_t>(panels.rows, last_row - j), at);
}

// h = the activation of sums.
void activate_all(int32_t kind, const float* sums, int64_t count, float* h) {
  if (kind == PI2_RELU)
    for (int64_t i = 0; i < count; ++i) h[i] = activate(PI2_RELU, sums[i]);
  else
    for (int64_t i = 0; i < count; ++i) h[i] = activate(kind, sums[i]);
}

// The FFN of n tokens over `k` neurons, whose h are in cpu.hidden (n, k).
struct Many {
  pi2_cpu& cpu;
  const pi2_ffn& f;
  int64_t n;
  const int32_t* rows;
  int64_t k;

  pi2_matrix part(int32_t dtype, int64_t offset) const {
    return {f.bundles + offset, f.count, f.d_model, f.stride, dtype};
  }

  // sums + biases of the neurons from the j-th on, in place; which: 0 for the first product, 1 for the
  // second.
  void add_biases(float* sums, const int32_t* ids, int64_t j, int64_t count, int which) const {
    if (f.bias_offset < 0) return;
    for (int64_t i = 0; i < count; ++i) sums[i] += bias(f, bundle(f, ids, j + i), which);
  }

  void first_products() const {
    const bool gated = f.gate != PI2_NONE;
    const pi2_matrix w = gated ? part(f.gate, f.gate_offset) : part(f.up, f.up_offset);
    cpu.pool.for_each(chunks_of(k, n), [&](int64_t chunk) {
      multiply_chunk(cpu, w, rows, k, n, chunk, [&](int64_t t, int64_t j, int64_t count, float* sums) {
        add_biases(sums, rows, j, count, 0);
        activate_all(f.activation, sums, count, cpu.hidden.data() + t * k + j);
      });
    });
  }

  // Up, for all neurons or for `places`, those that are active for any token.
  void second_products(const std::vector<int32_t>* places) const {
    const int32_t* ids = rows;
    if (places) {
      cpu.chosen.resize(places->size());
      for (size_t i = 0; i < places->size(); ++i) cpu.chosen[i] = rows ? rows[(*places)[i]] : (*places)[i];
      ids = cpu.chosen.data();
    }
    const int64_t all = places ? static_cast<int64_t>(places->size()) : k;
    cpu.pool.for_each(chunks_of(all, n), [&](int64_t chunk) {
      multiply_chunk(cpu, part(f.up, f.up_offset), ids, all, n, chunk,
                     [&](int64_t t, int64_t j, int64_t count, float* ups) {
                       add_biases(ups, ids, j, count, 1);
                       if (f.up_relu)
                         for (int64_t i = 0; i < count; ++i) ups[i] = ups[i] <= 0 ? 0.0f : ups[i];
                       float* h = cpu.hidden.data() + t * k;
                       if (places) times_at(h, places->data() + j, ups, count);
                       else times(h + j, ups, count);
                     });
    });
  }

  // A zero stays one, whatever it meets.
  static void times(float* h, const float* ups, int64_t count) {
    for (int64_t i = 0; i < count; ++i) h[i] = h[i] == 0.0f ? h[i] : h[i] * ups[i];
  }
  static void times_at(float* h, const int32_t* places, const float* ups, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = h[places[i]];
      h[places[i]] = value == 0.0f ? value : value * ups[i];
    }
  }

  // Neurons, among the k, that are active for any token.
  void find_active(std::vector<int32_t>& places) const {
    cpu.any_active.assign(k, 0);
    cpu.pool.for_each(ceil_div(k, kColumns), [&](int64_t chunk) {
      const int64_t first = chunk * kColumns, last = std::min(k, first + kColumns);
      for (int64_t t = 0; t < n; ++t)
        for (int64_t i = first; i < last; ++i) cpu.any_active[i] |= cpu.hidden[t * k + i] != 0.0f;
    });
    places.clear();
    for (int64_t i = 0; i < k; ++i)
      if (cpu.any_active[i]) places.push_back(static_cast<int32_t>(i));
  }
};

}  // namespace

void pi2_cpu::multiply_many(const float* x, int64_t n, const Product* products, int count) {
  int64_t chunks = 0;
  for (int i = 0; i < count; ++i) chunks += chunks_of(products[i].n_rows, n);
  const int last = count - 1;
  pack(*this, x, n, products->w->cols,
       {products[0].w->dtype, products[std::min(1, last)].w->dtype, products[last].w->dtype});
  pool.for_each(chunks, [&](int64_t chunk) {
    const Product* p = products;
    for (; chunk >= chunks_of(p->n_rows, n); ++p) chunk -= chunks_of(p->n_rows, n);
    multiply_chunk(*this, *p->w, p->rows, p->n_rows, n, chunk,
                   [&](int64_t t, int64_t j, int64_t here, float* sums) {
                     std::copy_n(sums, here, p->out + t * p->n_rows + j);
                   });
  });
}

int64_t ffn_many(pi2_cpu& cpu, const pi2_ffn& f, const float* x, int64_t n, const int32_t* rows,
                 int64_t n_rows, float* out) {
  pack(cpu, x, n, f.d_model, {f.gate, f.up});
  cpu.hidden.resize(n * n_rows);
  const Many many{cpu, f, n, rows, n_rows};
  many.first_products();
  if (f.gate != PI2_NONE) {
    std::vector<int32_t>& places = cpu.active_places;
    if (has_zeros(f)) many.find_active(places);
    const bool few = has_zeros(f) && static_cast<int64_t>(places.size()) < n_rows - n_rows / 8;
    many.second_products(few ? &places : nullptr);
  }
  return combine_many(cpu, f, n, rows, n_rows, out);
}
