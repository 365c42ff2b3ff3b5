// What a streamed call reads: sent in batches, looked for by whoever has nothing else to do.
#include <errno.h>

#include <algorithm>
#include <thread>

#include "pipeline.h"

namespace pi2 {
namespace {

constexpr size_t kInFlight = 64;  // tickets: more than any device's queue holds
constexpr double kNap = 50e-6;   // seconds that one thread sleeps for a read when there is nothing to compute
constexpr double kPatience = 1;  // seconds after which it sleeps for the oldest until the storage's deadline

}  // namespace

bool Pipeline::can_submit() const {
  return !failed_ && !submitting_ && !waiting_.empty() && in_flight_.size() < kInFlight;
}

void Pipeline::bytes(const Unit& unit, int64_t* first, int64_t* last) const {
  if (unit.kind == Kind::kWhole && !s_.bundled) return s_.rows(unit.part, first, last);
  *first = unit.kind == Kind::kRest ? s_.split : 0;
  *last = unit.kind == Kind::kGates ? s_.split : s_.f.stride;
}

// The next units of one kind, as many as one ticket is worth.
Pipeline::Read Pipeline::next_read() {
  Read read;
  int64_t neurons = 0;
  do {
    neurons += waiting_.front().count;
    read.units.push_back(waiting_.front());
    waiting_.pop_front();
  } while (!waiting_.empty() && neurons + waiting_.front().count <= kTicket &&
           waiting_.front().kind == read.units[0].kind && waiting_.front().part == read.units[0].part);
  return read;
}

// As many as may be in flight; others compute meanwhile.
void Pipeline::submit(Lock& lock) {
  submitting_ = true;
  begin_work();
  std::vector<int32_t> neurons, slots;
  while (!failed_ && !waiting_.empty() && in_flight_.size() < kInFlight) {
    Read read = next_read();
    const bool more = !waiting_.empty() && in_flight_.size() + 1 < kInFlight;
    lock.unlock();
    neurons.clear();
    slots.clear();
    for (const Unit& unit : read.units)
      for (int64_t i = unit.first; i < unit.first + unit.count; ++i) {
        neurons.push_back(candidates_.ids[order_[i]]);
        slots.push_back(slot(order_[i]));
      }
    int64_t first, last;
    bytes(read.units[0], &first, &last);
    pi2_storage_failure failure{0, -1};
    read.start = now();
    read.ticket = s_.submit(place_, neurons.data(), slots.data(), static_cast<int64_t>(neurons.size()), first,
                            last, PI2_STORAGE_DEMAND | (more ? PI2_STORAGE_MORE : 0), &failure);
    lock.lock();
    if (read.ticket == 0) {
      fail(failure);
    } else {
      if (failed_) s_.abi->cancel(s_.abi->self, read.ticket);  // somebody else's failure, meanwhile
      in_flight_.push_back(std::move(read));
    }
  }
  end_work();
  submitting_ = false;
  changed_.notify_all();
  lock.unlock();
  std::this_thread::yield();  // to the storage's thread, if it has to wait for this very core
  lock.lock();
}

// One thread looks which reads are over; with nothing to do, it sleeps for the oldest a little.
void Pipeline::poll(Lock& lock, bool may_block) {
  struct Result {
    int32_t code;
    pi2_storage_failure failure;
  };
  polling_ = true;
  std::vector<int64_t> tickets;
  for (const Read& read : in_flight_) tickets.push_back(read.ticket);
  std::vector<Result> results(tickets.size());
  const double began = in_flight_.front().start;
  lock.unlock();
  std::this_thread::yield();
  bool some = false;
  const auto look = [&](size_t i, double seconds) {
    results[i].code = s_.abi->wait(s_.abi->self, tickets[i], seconds, &results[i].failure);
    some |= results[i].code != PI2_STORAGE_PENDING;
  };
  for (size_t i = 0; i < tickets.size(); ++i) look(i, 0);
  if (!some && may_block) look(0, now() - began > kPatience ? -1 : kNap);
  lock.lock();
  std::vector<Read> reads;
  reads.swap(in_flight_);
  for (size_t i = 0; i < reads.size(); ++i) {  // others have only added to their end
    if (i < results.size() && results[i].code != PI2_STORAGE_PENDING)
      arrived(reads[i], results[i].code, results[i].failure);
    else in_flight_.push_back(std::move(reads[i]));
  }
  if (failed_) cancel();
  scanned_ = now();
  polling_ = false;
  changed_.notify_all();
}

void Pipeline::arrived(Read& read, int32_t code, const pi2_storage_failure& failure) {
  for (const Unit& unit : read.units)
    trace(unit, unit.kind == Kind::kRest ? kUpDownRead : kGateRead, kStorageThread, unit.count, read.start,
          now());
  const bool guess = read.prefetch >= 0;
  if (guess) {
    std::lock_guard<std::mutex> guard(s_.mutex);
    Prefetch& prefetch = s_.prefetches[read.prefetch];
    count_.reads += static_cast<int64_t>(prefetch.slots.size());
    count_.bytes_read += s_.settle(prefetch, code == 0);
  }
  if (code != 0 && !guess) return fail(failure);
  if (failed_) return;
  for (Unit unit : read.units) {
    if (code == 0) {
      arrived(unit, guess);
    } else {  // it was only a guess: now it is wanted
      unit.kind = s_.two_phase ? Kind::kGates : Kind::kWhole;
      waiting_.push_front(unit);
    }
  }
}

void Pipeline::arrived(Unit unit, bool guess) {
  if (!guess) {
    int64_t first, last;
    bytes(unit, &first, &last);
    count_.reads += unit.count;
    count_.bytes_read += unit.count * (last - first);
    if (last < s_.f.stride && unit.kind == Kind::kWhole) {  // on to the next matrix
      ++unit.part;
      waiting_.push_back(unit);
      return;
    }
    for (int64_t i = unit.first; i < unit.first + unit.count; ++i)
      state(order_[i]) = unit.kind == Kind::kGates ? kGate : kPresent;
  }
  ready_.push_back(unit);
}

// The first failure is the call's; what is in flight is waited for all the same.
void Pipeline::fail(const pi2_storage_failure& failure) {
  if (failed_) return;
  failed_ = true;
  failure_ = failure;
  waiting_.clear();
  if (failure.code == ETIMEDOUT) {  // waiting for the others would take as long
    s_.hangs = true;
    in_flight_.clear();
  }
  if (!polling_) cancel();  // else some may be over: whoever looks does it afterwards
}

void Pipeline::cancel() {
  for (const Read& read : in_flight_) s_.abi->cancel(s_.abi->self, read.ticket);
}

}  // namespace pi2
