#include "pipeline.h"

#include <errno.h>

namespace pi2 {
namespace {

constexpr double kScan = 30e-6;  // seconds between two looks at the reads while there is work

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

void Pipeline::begin_work() {
  if (working_++ == 0 && all_) count_.wait_s += now() - idle_since_;
}

void Pipeline::end_work() {
  if (--working_ == 0) idle_since_ = now();
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

void Pipeline::trace(const Unit& unit, Stage stage, uint8_t thread, int64_t neurons, double start,
                     double end) {
  if (!s_.trace) return;
  const int32_t cluster =
      candidates_.ids[unit.kind == Kind::kDown ? token_.begin(unit.range) : order_[unit.first]];
  s_.spans.push_back({place_.ffn, cluster, stage, thread, static_cast<int32_t>(neurons), start, end});
}

}  // namespace pi2
