// Neurons that stream in from flash: what outlives a call (stream.cpp), and one call (pipeline.cpp).
#pragma once
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <vector>

#include "cluster.h"

namespace pi2 {

enum SlotState : uint8_t { kEmpty = 0, kLoading = 1, kGate = 2, kPresent = 3 };  // pi2.powers.SlotState
enum Stage : uint8_t { kGateRead = 0, kGateCompute = 1, kUpDownRead = 2, kUpDownCompute = 3 };
constexpr uint8_t kStorageThread = 255;
constexpr int64_t kTicket = 16;  // neurons waited for together: a ticket costs about as much as a read

inline double now() {  // the clock of Python's perf_counter
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A guess that is being read: whole bundles into these slots.
struct Prefetch {
  int64_t ticket;
  std::vector<int32_t> slots;
};

class Pipeline;

}  // namespace pi2

struct pi2_stream {
  pi2_cpu* cpu;
  pi2_ffn f;
  uint8_t* states;  // (slots)
  int64_t slots;
  const pi2_storage_abi* abi;
  int64_t split;  // bytes of a bundle that are read first, whole pages with the gate in them; 0: never apart
  int64_t cluster;  // neurons
  bool two_phase, trace;
  bool overlap;        // compute while others are being read
  bool bundled;        // a neuron is one read; else a read a row, one matrix after the other
  std::mutex mutex{};  // of the next two: a call computes while others prefetch and settle
  std::vector<pi2::Prefetch> prefetches{};
  std::vector<int32_t> prefetch_of{};  // (slots): while LOADING, a place in prefetches
  std::vector<pi2_span> spans{};
  std::vector<int32_t> sorted[3]{};  // scratch: candidates of a range, by what is to be done
  TokenScratch token{};
  std::unique_ptr<pi2::Pipeline> running{};  // the call that was begun
  std::atomic<bool> hangs{false};  // the device has not answered in time and may yet write anywhere: no calls

  // Bytes [first, last) of a bundle that hold its rows of matrix `part` (gate, up, down): all of it together.
  void rows(int part, int64_t* first, int64_t* last) const;
  uint8_t* bundle(int32_t slot) const { return const_cast<uint8_t*>(f.bundles) + slot * f.stride; }
  // Starts to read bytes [first, last) of k bundles; 0 with `failure` filled if that cannot be.
  int64_t submit(const pi2_place& place, const int32_t* neurons, const int32_t* slots, int64_t k,
                 int64_t first, int64_t last, int32_t priority, pi2_storage_failure* failure) const;
  // Ends a call that nobody will finish.
  void abandon();
  // Sets the states of a prefetch that is over; returns the bytes that it has read.
  int64_t settle(pi2::Prefetch& prefetch, bool read);
};
