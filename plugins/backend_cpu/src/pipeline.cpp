#include "pipeline.h"

#include <errno.h>

#include <algorithm>
#include <thread>

namespace pi2 {
namespace {

constexpr size_t kInFlight = 64;  // clusters: more than any device's queue holds
constexpr double kScan = 30e-6;   // seconds between two looks at the reads while there is work
constexpr double kNap = 50e-6;    // seconds that one thread sleeps for a read when there is none
constexpr double kPatience = 1;   // seconds after which it sleeps for the oldest until the storage's deadline

}  // namespace

Pipeline::Pipeline(pi2_stream& stream, const pi2_place& place, const Candidates& candidates, const float* x)
    : s_(stream),
      place_(place),
      ids_(candidates.ids, candidates.ids + candidates.count),
      slots_(candidates.slots, candidates.slots + candidates.count),
      candidates_{ids_.data(), slots_.data(), candidates.count},
      token_(*stream.cpu, stream.f, candidates_, x, stream.token) {}

void Pipeline::begin() {
  began_ = now();
  token_.prepare();
  plan();
  Lock lock(mutex_);
  if (can_submit()) submit(lock);
  lock.unlock();
  started_ =
      s_.cpu->pool.start([](void* self, int thread,
                            int64_t) { static_cast<Pipeline*>(self)->work(static_cast<uint8_t>(thread)); },
                         this);
}

int32_t Pipeline::finish(float* out, pi2_stream_count* count, pi2_storage_failure* failure) {
  work_all();
  if (!failed_) count_.active = token_.total(out);
  count_.wall_s = now() - began_;
  *count = count_;
  *failure = failure_;
  return failure_.code;
}

void Pipeline::abandon() {
  {
    Lock lock(mutex_);
    fail({ECANCELED, -1});
    changed_.notify_all();
  }
  work_all();
}

void Pipeline::work_all() {
  {
    Lock lock(mutex_);
    all_ = true;
    idle_since_ = now();
  }
  if (started_) s_.cpu->pool.join();
  else
    s_.cpu->pool.for_each_on(s_.cpu->pool.size(),
                             [&](int thread, int64_t) { work(static_cast<uint8_t>(thread)); });
}

void Pipeline::work(uint8_t thread) {
  Lock lock(mutex_);
  while (!over()) {
    Unit unit;
    if (can_submit()) {
      submit(lock);
      continue;
    }
    const bool reading = !polling_ && !in_flight_.empty();
    if (reading && now() - scanned_ > kScan) poll(lock, false);
    if (take(&unit)) compute(lock, unit, thread);
    else if (over() || can_submit()) continue;
    else if (!polling_ && !in_flight_.empty()) poll(lock, true);
    else changed_.wait(lock);
  }
  changed_.notify_all();
}

bool Pipeline::can_submit() const {
  return !failed_ && !submitting_ && !waiting_.empty() && in_flight_.size() < kInFlight;
}

void Pipeline::bytes(const Unit& unit, int64_t* first, int64_t* last) const {
  if (unit.kind == Kind::kWhole && !s_.bundled) return s_.rows(unit.part, first, last);
  *first = unit.kind == Kind::kRest ? s_.split : 0;
  *last = unit.kind == Kind::kGates ? s_.split : s_.f.stride;
}

void Pipeline::begin_work() {
  if (working_++ == 0 && all_) count_.wait_s += now() - idle_since_;
}

void Pipeline::end_work() {
  if (--working_ == 0) idle_since_ = now();
}

// As many as may be in flight; others compute meanwhile.
void Pipeline::submit(Lock& lock) {
  submitting_ = true;
  begin_work();
  while (!failed_ && !waiting_.empty() && in_flight_.size() < kInFlight) {
    Unit unit = waiting_.front();
    waiting_.pop_front();
    const bool more = !waiting_.empty() && in_flight_.size() + 1 < kInFlight;
    lock.unlock();
    std::vector<int32_t> neurons, slots;
    for (int64_t i = unit.first; i < unit.first + unit.count; ++i) {
      neurons.push_back(candidates_.ids[order_[i]]);
      slots.push_back(slot(order_[i]));
    }
    int64_t first, last;
    bytes(unit, &first, &last);
    pi2_storage_failure failure{0, -1};
    unit.start = now();
    unit.ticket = s_.submit(place_, neurons.data(), slots.data(), unit.count, first, last,
                            PI2_STORAGE_DEMAND | (more ? PI2_STORAGE_MORE : 0), &failure);
    lock.lock();
    if (unit.ticket == 0) {
      fail(failure);
    } else {
      in_flight_.push_back(unit);
      if (failed_) s_.abi->cancel(s_.abi->self, unit.ticket);  // somebody else's failure, meanwhile
    }
  }
  end_work();
  submitting_ = false;
  changed_.notify_all();
  lock.unlock();
  std::this_thread::yield();  // to the storage's thread, if it has to wait for this very core
  lock.lock();
}

bool Pipeline::take(Unit* unit) {
  if (failed_ || (!s_.overlap && reading())) return false;
  for (auto* queue : {&ready_, &residents_, &downs_}) {
    if (queue->empty()) continue;
    *unit = queue->front();
    queue->pop_front();
    return true;
  }
  return false;
}

void Pipeline::compute(Lock& lock, Unit unit, uint8_t thread) {
  begin_work();
  lock.unlock();
  int32_t* const which = order_.data() + unit.first;
  int32_t on[kLargest];
  int64_t ups = 0, rest = 0;
  const double start = now();
  double middle = start;
  if (unit.kind == Kind::kDown) {
    token_.downs(unit.range);
  } else if (unit.kind == Kind::kRest) {
    ups = unit.count;
    token_.ups(which, ups, ups);
  } else {
    const int64_t active = token_.gates(which, unit.count, unit.count, on);
    middle = now();
    for (int64_t i = 0; i < active; ++i) {
      if (state(on[i]) == kPresent) on[ups++] = on[i];
      else which[rest++] = on[i];
    }
    token_.ups(on, ups, ups);
  }
  const double end = now();
  lock.lock();
  end_work();
  count_.gate_s += middle - start;
  count_.up_down_s += end - middle;
  if (middle != start) trace(unit, kGateCompute, thread, unit.count, start, middle);
  if (ups > 0 || unit.kind == Kind::kDown)
    trace(unit, kUpDownCompute, thread, unit.kind == Kind::kDown ? token_.active(unit.range) : ups, middle,
          end);
  if (unit.kind == Kind::kDown) {
    --left_;
    return;
  }
  if (rest > 0) {
    Unit more = unit;
    more.kind = Kind::kRest;
    more.count = rest;
    waiting_.push_front(more);
  }
  remaining_[unit.range] -= unit.count - rest;
  if (remaining_[unit.range] == 0) {
    unit.kind = Kind::kDown;
    downs_.push_back(unit);
  }
  changed_.notify_one();
}

// One thread looks which reads are over; with nothing to do, it sleeps for the oldest a little.
void Pipeline::poll(Lock& lock, bool may_block) {
  struct Result {
    int32_t code;
    pi2_storage_failure failure;
  };
  polling_ = true;
  std::vector<int64_t> tickets;
  for (const Unit& unit : in_flight_) tickets.push_back(unit.ticket);
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
  std::vector<Unit> over, still;
  for (size_t i = 0; i < in_flight_.size(); ++i) {  // others have only added to its end
    const bool is_over = i < results.size() && results[i].code != PI2_STORAGE_PENDING;
    (is_over ? over : still).push_back(in_flight_[i]);
  }
  in_flight_ = std::move(still);
  size_t at = 0;
  for (const Unit& unit : over) {
    while (results[at].code == PI2_STORAGE_PENDING) ++at;
    arrived(unit, results[at].code, results[at].failure);
    ++at;
  }
  if (failed_) cancel();
  scanned_ = now();
  polling_ = false;
  changed_.notify_all();
}

void Pipeline::arrived(Unit unit, int32_t code, const pi2_storage_failure& failure) {
  const Stage stage = unit.kind == Kind::kRest ? kUpDownRead : kGateRead;
  trace(unit, stage, kStorageThread, unit.count, unit.start, now());
  if (unit.kind == Kind::kGuess) {
    {
      std::lock_guard<std::mutex> guard(s_.mutex);
      Prefetch& prefetch = s_.prefetches[unit.prefetch];
      count_.reads += static_cast<int64_t>(prefetch.slots.size());
      count_.bytes_read += s_.settle(prefetch, code == 0);
    }
    if (code != 0 && !failed_) {  // it was only a guess: now it is wanted
      unit.kind = s_.two_phase ? Kind::kGates : Kind::kWhole;
      waiting_.push_front(unit);
      return;
    }
  } else if (code == 0) {
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
  } else {
    return fail(failure);
  }
  if (!failed_) ready_.push_back(unit);
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
  for (const Unit& unit : in_flight_) s_.abi->cancel(s_.abi->self, unit.ticket);
}

void Pipeline::trace(const Unit& unit, Stage stage, uint8_t thread, int64_t neurons, double start,
                     double end) {
  if (!s_.trace) return;
  const int32_t cluster =
      candidates_.ids[unit.kind == Kind::kDown ? token_.begin(unit.range) : order_[unit.first]];
  s_.spans.push_back({place_.ffn, cluster, stage, thread, static_cast<int32_t>(neurons), start, end});
}

}  // namespace pi2
