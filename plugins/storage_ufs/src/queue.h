// Operations on their way: submitted by anybody, served by an engine's threads, waited for by ticket.
#pragma once
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "device.h"
#include "plan.h"

namespace pi2 {

class Queue {
 public:
  Queue(const pi2_ufs_model* model, int queues, double deadline);

  // For those who want something read.
  int64_t add(std::vector<Op> ops, int32_t priority);
  std::vector<Op> spares(std::size_t most);  // operations that are over, to be used again
  int32_t wait(int64_t ticket, double seconds, pi2_storage_failure* failure);
  void cancel(int64_t ticket);

  // For the engine's threads.
  Op next();       // the most urgent; none also while a more urgent one is in flight
  Op next_wait();  // waits for one; none: stopped
  void finish(Op op, int32_t code);
  void stop();              // drops what has not started
  void fail(int32_t code);  // the engine is broken: stops, and all that is under way ends with `code`
  bool stopped();

  void count(pi2_ufs_counts* counts);
  void count_ranges(int64_t ranges, int64_t operations);

 private:
  using Clock = std::chrono::steady_clock;
  Op pop();
  void drop(const Ticket* ticket);  // null: all; held mutex
  void settle(Operation& op, int32_t code);
  void pretend(const Operation& op);

  std::mutex mutex_;
  std::condition_variable work_, done_, halt_;
  std::map<int32_t, std::deque<Op>> waiting_;
  std::map<int32_t, int64_t> flying_;  // by priority: how many have left `waiting_` and are not over
  std::unordered_map<int64_t, std::shared_ptr<Ticket>> tickets_;
  std::vector<Op> spares_;
  int64_t last_ticket_ = 0;
  bool stopped_ = false;
  int32_t broken_ = 0;
  double deadline_;
  pi2_ufs_counts counts_{};
  std::unique_ptr<pi2_ufs_device> device_;
  Clock::time_point began_ = Clock::now();
};

}  // namespace pi2
