#include "pool.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace pi2 {
namespace {

// About 50 us of pausing: longer than the gap between two calls of one layer, shorter than a time slice.
constexpr int kSpins = 2000;
constexpr uint64_t kNone = 0xffffffff;  // as the next chunk: there is none yet
constexpr int kSpinsBeforeYield = 200;  // on a busy machine the thread waited for may need this very core

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

#if defined(__linux__)
void pin(int cpu) {
  if (cpu < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // best effort: the core may have gone off
}

// The calling thread on one core, until the end of the scope.
class Pinned {
 public:
  explicit Pinned(int cpu)
      : changed_(cpu >= 0 && pthread_getaffinity_np(pthread_self(), sizeof before_, &before_) == 0) {
    if (changed_) pin(cpu);
  }
  ~Pinned() {
    if (changed_) pthread_setaffinity_np(pthread_self(), sizeof before_, &before_);
  }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

 private:
  cpu_set_t before_;
  bool changed_;
};
#else
void pin(int) {}
struct Pinned {
  explicit Pinned(int) {}
};
#endif

}  // namespace

Pool::Pool(int threads, const int32_t* cpus) : caller_(cpus ? cpus[0] : -1) {
  for (int i = 1; i < threads; ++i) {
    const int cpu = cpus ? cpus[i] : -1;
    workers_.emplace_back([this, i, cpu] { loop(i, cpu); });
  }
}

Pool::~Pool() {
  stop_.store(true);
  job_.fetch_add(1);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  for (auto& worker : workers_) worker.join();
}

void Pool::run(Task task, void* context, int64_t chunks) {
  if (workers_.empty() || started_ || chunks < 2) {
    for (int64_t i = 0; i < chunks; ++i) task(context, 0, i);
    return;
  }
  publish(task, context, chunks);
  join();
}

bool Pool::start(Task task, void* context) {
  if (workers_.empty() || started_) return false;
  publish(task, context, size());
  started_ = true;
  return true;
}

void Pool::publish(Task task, void* context, int64_t chunks) {
  const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
  next_.store(uint64_t{job} << 32 | kNone);  // before chunks_ grows: a late worker may still look at both
  task_.store(task, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  chunks_.store(chunks, std::memory_order_release);
  done_.store(0, std::memory_order_relaxed);
  next_.store(static_cast<uint64_t>(job) << 32, std::memory_order_release);
  job_.store(job);  // sequentially consistent, as is the load of sleepers_: no wake-up is lost
  if (sleepers_.load() > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
}

void Pool::join() {
  const Pinned here(caller_);
  work(job_.load(std::memory_order_relaxed), 0);
  // For chunks, not for workers: one that a busy machine has not let run yet holds nobody up.
  const int64_t chunks = chunks_.load(std::memory_order_relaxed);
  for (int spins = 0; done_.load(std::memory_order_acquire) != chunks; ++spins) {
    if (spins < kSpinsBeforeYield) pause();
    else std::this_thread::yield();
  }
  started_ = false;
}

void Pool::work(uint32_t job, int thread) {
  for (;;) {
    uint64_t next = next_.load(std::memory_order_acquire);
    do {
      const auto chunk = static_cast<int64_t>(next & 0xffffffffU);
      if (next >> 32 != job || chunk >= chunks_.load(std::memory_order_acquire)) return;
    } while (!next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel));
    task_.load(std::memory_order_relaxed)(context_.load(std::memory_order_relaxed), thread,
                                          static_cast<int64_t>(next & 0xffffffffU));
    done_.fetch_add(1, std::memory_order_release);
  }
}

void Pool::loop(int thread, int cpu) {
  pin(cpu);
  uint32_t seen = 0;
  for (;;) {
    for (int spins = 0; job_.load(std::memory_order_acquire) == seen && spins < kSpins; ++spins) {
      if (spins % kSpinsBeforeYield == kSpinsBeforeYield - 1) std::this_thread::yield();
      else pause();
    }
    if (job_.load() == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      sleepers_.fetch_add(1);
      wake_.wait(lock, [&] { return job_.load() != seen; });
      sleepers_.fetch_sub(1);
    }
    seen = job_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    work(seen, thread);
  }
}

}  // namespace pi2
