// The second half of an FFN of many tokens: sums of down rows.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "batch.h"
#include "panels.h"

namespace {

using pi2::kBlock;
using pi2::kTokens;

constexpr int64_t kGroup = 256;   // tokens: their sums come from the L2 cache
constexpr int64_t kNeurons = 64;  // decoded at a time with
constexpr int64_t kSlice = 64;    // columns: as floats they fill half an L1 cache
constexpr int64_t kBlocks = 4;    // of neurons, packed at a time as integers

// h (n, k) in cpu.hidden and the down rows that they are multiplied with.
struct Down {
  pi2_cpu& cpu;
  const pi2_ffn& f;
  int64_t n;
  const int32_t* rows;
  int64_t k;

  const uint8_t* row(int64_t i) const { return bundle(f, rows, i) + f.down_offset; }
  int64_t groups() const { return ceil_div(n, kGroup); }
};

// Sparse: exact floats, and nothing is computed for zeros.
struct Listed : Down {
  int64_t panels() const { return ceil_div(k, kNeurons); }

  // Lists every token's active neurons of panel p: cpu.listed and cpu.places (panels, n, kNeurons), how many
  // in cpu.found (panels, n).
  int64_t list(int64_t p) const {
    const int64_t count = std::min(kNeurons, k - p * kNeurons);
    int64_t all = 0;
    for (int64_t t = 0; t < n; ++t) {
      const float* h = cpu.hidden.data() + t * k + p * kNeurons;
      float* values = cpu.listed.data() + (p * n + t) * kNeurons;
      uint8_t* places = cpu.places.data() + (p * n + t) * kNeurons;
      int64_t active = 0;
      for (int64_t i = 0; i < count; ++i) {
        values[active] = h[i];
        places[active] = static_cast<uint8_t>(i);
        active += h[i] != 0.0f;
      }
      cpu.found[p * n + t] = static_cast<uint8_t>(active);
      all += active;
    }
    return all;
  }

  // Columns [first, last) for tokens of a group: a panel is decoded once, then each adds what it needs of it.
  void combine(int64_t first, int64_t last, int64_t group, float* out) const {
    const int64_t width = last - first, begin = group * kGroup, end = std::min(n, begin + kGroup);
    alignas(64) float panel[kNeurons * kSlice], sums[kGroup * kSlice];
    std::fill_n(sums, (end - begin) * width, 0.0f);
    for (int64_t p = 0; p < panels(); ++p) {
      const int64_t count = std::min(kNeurons, k - p * kNeurons);
      const uint8_t* down[kNeurons];
      for (int64_t i = 0; i < count; ++i) down[i] = row(p * kNeurons + i);
      cpu.kernels->decode(static_cast<pi2::DType>(f.down), down, count, f.d_model, first, last, panel);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t at = p * n + t;
        cpu.kernels->panels->add_listed(cpu.listed.data() + at * kNeurons, cpu.places.data() + at * kNeurons,
                                        cpu.found[at], panel, width, sums + (t - begin) * width);
      }
    }
    for (int64_t t = begin; t < end; ++t)
      std::copy_n(sums + (t - begin) * width, width, out + t * f.d_model + first);
  }

  int64_t run(float* out) const {
    cpu.listed.resize(panels() * n * kNeurons);
    cpu.places.resize(panels() * n * kNeurons);
    cpu.found.resize(panels() * n);
    std::atomic<int64_t> active{0};
    cpu.pool.for_each(panels(), [&](int64_t p) { active.fetch_add(list(p), std::memory_order_relaxed); });
    cpu.pool.for_each(ceil_div(f.d_model, kSlice) * groups(), [&](int64_t chunk) {
      const int64_t first = chunk / groups() * kSlice;
      combine(first, std::min(f.d_model, first + kSlice), chunk % groups(), out);
    });
    return active.load();
  }
};

// Dense: h times the weights' scales in 16 bits, for a block of neurons, tokens and columns at a time.
struct Packed : Down {
  int64_t blocks() const { return ceil_div(k, kBlock); }
  int64_t tiles() const { return ceil_div(n, kTokens); }

  // Block b of neurons: cpu.listed (blocks, tiles, kTokens, kBlock) gets h as shares of the largest, which
  // are in cpu.sizes (blocks, tiles, kTokens).  What is not finite makes the size, and all results, NaN.
  int64_t normalise(int64_t b) const {
    const int64_t count = std::min<int64_t>(kBlock, k - b * kBlock);
    int64_t active = 0;
    for (int64_t t = 0; t < tiles() * kTokens; ++t) {
      const float* h = cpu.hidden.data() + t * k + b * kBlock;
      float* shares = cpu.listed.data() + (b * tiles() * kTokens + t) * kBlock;
      std::fill_n(shares, kBlock, 0.0f);
      float largest = 0;
      for (int64_t i = 0; i < count && t < n; ++i) {
        active += h[i] != 0.0f;
        largest = std::fabs(h[i]) <= largest ? largest : std::fabs(h[i]);
      }
      const bool finite = largest <= std::numeric_limits<float>::max();
      const float lift = largest < 1e-30f ? 0x1p100f : 1.0f;  // else the inverse of a tiny number is infinite
      const float inverse = finite && largest > 0 ? 1.0f / (largest * lift) : 0.0f;
      for (int64_t i = 0; i < count && inverse > 0; ++i) shares[i] = h[i] * lift * inverse;
      cpu.sizes[b * tiles() * kTokens + t] = finite ? largest : std::numeric_limits<float>::quiet_NaN();
    }
    return active;
  }

  // Columns of block `column` for the tiles of a group.
  void combine(int64_t column, int64_t group, float* out) const {
    const pi2::Panels& panels = *cpu.kernels->panels;
    const int64_t first = group * kGroup / kTokens, last = std::min(tiles(), first + kGroup / kTokens);
    const int64_t bytes = panels.panel_bytes[1], parts = kBlock / panels.rows, part = kTokens * panels.rows;
    alignas(64) uint8_t packed[kBlocks * 4096], tile[kBlocks * 512];
    alignas(64) float sums[kGroup * kBlock], factors[kBlocks][kBlock];
    std::fill_n(sums, (last - first) * kTokens * kBlock, 0.0f);
    for (int64_t b = 0; b < blocks(); b += kBlocks) {
      const int64_t here = std::min(kBlocks, blocks() - b);
      for (int64_t j = 0; j < here; ++j) pack_block(b + j, column, packed, j, factors[j]);
      for (int64_t i = first; i < last; ++i) {
        for (int64_t j = 0; j < here; ++j) {
          const int64_t at = ((b + j) * tiles() + i) * kTokens;
          panels.pack_activations(cpu.listed.data() + at * kBlock, cpu.sizes.data() + at, factors[j],
                                  tile + j * panels.tile_bytes[1]);
        }
        for (int64_t p = 0; p < parts; ++p)
          panels.multiply(pi2::Kind::kBytes, packed + p * kBlocks * bytes, tile, here,
                          sums + ((i - first) * parts + p) * part);
      }
    }
    for (int64_t t = first * kTokens; t < std::min(n, last * kTokens); ++t)
      for (int64_t p = 0; p < parts; ++p)
        std::copy_n(sums + ((t / kTokens - first) * parts + p) * part + t % kTokens * panels.rows,
                    panels.rows, out + t * f.d_model + column * kBlock + p * panels.rows);
  }

  // packed: (parts, kBlocks) panels of a block.
  void pack_block(int64_t b, int64_t column, uint8_t* packed, int64_t place, float* factors) const {
    const pi2::Panels& panels = *cpu.kernels->panels;
    const int64_t bytes = panels.panel_bytes[1], count = std::min<int64_t>(kBlock, k - b * kBlock);
    const uint8_t* down[kBlock];
    for (int64_t i = 0; i < count; ++i) down[i] = row(b * kBlock + i);
    alignas(64) uint8_t panel[4096];
    panels.pack_columns(static_cast<pi2::DType>(f.down), down, count, f.d_model, column, panel, factors);
    for (int64_t p = 0; p < kBlock / panels.rows; ++p)
      std::copy_n(panel + p * bytes, bytes, packed + (p * kBlocks + place) * bytes);
  }

  int64_t run(float* out) const {
    cpu.listed.resize(blocks() * tiles() * kTokens * kBlock);
    cpu.sizes.resize(blocks() * tiles() * kTokens);
    std::atomic<int64_t> active{0};
    cpu.pool.for_each(blocks(),
                      [&](int64_t b) { active.fetch_add(normalise(b), std::memory_order_relaxed); });
    cpu.pool.for_each(f.d_model / kBlock * groups(),
                      [&](int64_t chunk) { combine(chunk / groups(), chunk % groups(), out); });
    return active.load();
  }
};

}  // namespace

int64_t combine_many(pi2_cpu& cpu, const pi2_ffn& f, int64_t n, const int32_t* rows, int64_t k, float* out) {
  const Down down{cpu, f, n, rows, k};
  if (!has_zeros(f) && cpu.integers_for(f.down) && cpu.kernels->panels->pack_columns)
    return Packed{down}.run(out);
  return Listed{down}.run(out);
}
