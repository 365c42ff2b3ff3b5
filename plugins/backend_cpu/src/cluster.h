// One token's FFN as a sum over ranges of neurons: of fixed ids, so the bits depend on nothing else.
#pragma once
#include <cstdint>

#include "ffn.h"

namespace pi2 {

// What a call names: neurons ids[0 .. count), ascending, of which i lies in slot slots[i] of the bundles.
struct Candidates {
  const int32_t* ids;    // NULL: 0 .. count - 1
  const int32_t* slots;  // NULL: likewise
  int64_t count;

  int64_t first_from(int64_t neuron) const;  // the first candidate whose id is not below
};

constexpr int64_t kLargest = 512;  // neurons in a range at most

// Neurons in a range, of an FFN that has so many.
int64_t range_size(int64_t neurons);

// One call: h of the candidates, then each range's sum of its active neurons' down rows, then the sum of
// these.
class OneToken {
 public:
  // x, out (d_model); `f.count` neurons make up the FFN.  `scratch` is this token's until it is computed.
  OneToken(pi2_cpu& cpu, const pi2_ffn& f, const Candidates& candidates, const float* x,
           TokenScratch& scratch);
  // Before the first neuron is computed.
  void prepare();

  int64_t ranges() const { return ranges_; }
  int64_t active(int64_t range) const { return scratch_.active[range]; }
  int64_t begin(int64_t range) const { return candidates_.first_from(range * size_); }
  const uint8_t* bundle(int64_t i) const { return ::bundle(f_, candidates_.slots, i); }
  // h of k candidates, as far as the gates know it; `on`, which may be `which`, gets those that are not zero.
  // Of `known` >= k candidates it is known that they come next: memory is asked for them.
  int64_t gates(const int32_t* which, int64_t k, int64_t known, int32_t* on);
  // The rest of h, of candidates whose gate is not zero.
  void ups(const int32_t* which, int64_t k, int64_t known);
  // The sum of the range's down rows, in ascending order, once h is known of all its candidates.
  void downs(int64_t range);
  // All of that for one range, some neurons at a time.
  void compute(int64_t range);
  // out = the sum of all ranges in their order; returns the number of active neurons.
  int64_t total(float* out);

 private:
  void dot(int32_t dtype, int64_t offset, const int32_t* which, int64_t k, int64_t known, float* sums);
  // Behind the range's sum, what k candidates add to it.
  void add_downs(int64_t range, const int32_t* which, int64_t k, int64_t known);

  pi2_cpu& cpu_;
  const pi2_ffn& f_;
  Candidates candidates_;
  const float* x_;
  TokenScratch& scratch_;
  int64_t size_, ranges_;
  float* hidden_;  // (candidates)
};

}  // namespace pi2
