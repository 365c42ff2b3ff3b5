// One token's FFN while its missing neurons are being read (PowerInfer-2 §4.3): whatever is there is computed
// by whoever is free, with no barrier between matrices or clusters.  Once the reads have begun, the caller
// may do something else before it comes back for the result; the other threads compute meanwhile.
#pragma once
#include <condition_variable>
#include <deque>
#include <mutex>

#include "stream.h"

namespace pi2 {

class Pipeline {
 public:
  // x (d_model) stays the caller's until `finish`.
  Pipeline(pi2_stream& stream, const pi2_place& place, const Candidates& candidates, const float* x);
  // Starts to read.
  void begin();
  // 0, or what went wrong first, as an errno.
  int32_t finish(float* out, pi2_stream_count* count, pi2_storage_failure* failure);
  // Waits for what is being read, and computes no more.
  void abandon();

 private:
  enum class Kind : uint8_t {
    kResident,  // some of its candidates have no more than their gates
    kGuess,     // a prefetch reads them
    kWhole,
    kGates,
    kRest,  // their gates are not zero
    kDown   // a range whose h is known
  };
  struct Unit {
    Kind kind = Kind::kDown;
    int64_t range = 0, first = 0, count = 0;  // candidates order_[first .. first + count)
    int part = 0;                             // matrix that is being read, if a neuron is not one read
  };
  // What one ticket brings, to all of these.
  struct Read {
    int64_t ticket = 0;
    int32_t prefetch = -1;  // >= 0: that of a guess
    double start = 0;
    std::vector<Unit> units;
  };
  using Lock = std::unique_lock<std::mutex>;

  void plan();
  void plan_range(int64_t range);
  void add_clusters(int64_t range, const std::vector<int32_t>& missing);
  void add_guesses(int64_t range, std::vector<int32_t>& loading);
  Unit append(Kind kind, int64_t range, const int32_t* which, int64_t count);

  void work_all();
  void work(uint8_t thread);
  bool over() const { return left_ == 0 || (failed_ && in_flight_.empty()); }
  bool can_submit() const;
  bool reading() const { return submitting_ || !waiting_.empty() || !in_flight_.empty(); }
  // Bytes of a bundle that the read of a unit brings.
  void bytes(const Unit& unit, int64_t* first, int64_t* last) const;
  void submit(Lock& lock);
  Read next_read();
  bool take(Unit* unit);
  void compute(Lock& lock, Unit unit, uint8_t thread);
  void poll(Lock& lock, bool may_block);
  void arrived(Read& read, int32_t code, const pi2_storage_failure& failure);
  void arrived(Unit unit, bool guess);
  void fail(const pi2_storage_failure& failure);
  void cancel();
  void begin_work();
  void end_work();
  void trace(const Unit& unit, Stage stage, uint8_t thread, int64_t neurons, double start, double end);
  int32_t slot(int32_t candidate) const { return candidates_.slots[candidate]; }
  uint8_t& state(int32_t candidate) const { return s_.states[slot(candidate)]; }

  pi2_stream& s_;
  pi2_place place_;
  std::vector<int32_t> ids_, slots_;
  Candidates candidates_;  // these
  OneToken token_;

  std::mutex mutex_;  // of all that follows
  std::condition_variable changed_;
  std::vector<int32_t> order_;      // candidates, unit by unit; a unit's are its owner's to reorder
  std::vector<int64_t> remaining_;  // (ranges): candidates whose h is not known
  int64_t left_ = 0;                // ranges that are not summed
  std::deque<Unit> waiting_;        // to be submitted
  std::vector<Read> in_flight_;
  std::deque<Unit> ready_, residents_, downs_;
  bool submitting_ = false, polling_ = false, failed_ = false;
  pi2_storage_failure failure_{0, -1};
  int working_ = 0;                     // threads that are not waiting
  bool started_ = false, all_ = false;  // other threads have begun; the caller has come back
  double began_ = 0, idle_since_ = 0, scanned_ = 0;
  pi2_stream_count count_{};
};

}  // namespace pi2
