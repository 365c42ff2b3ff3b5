// Threads that wait for work in a spin, then asleep; work is claimed in chunks by an atomic counter.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace pi2 {

class Pool {
 public:
  // `threads` in all, the caller's included; thread i is pinned to cpus[i] where cpus is given, the caller's
  // for as long as it works here: what it does, or starts, elsewhere is none of ours.
  Pool(int threads, const int32_t* cpus);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls task(context, thread, i) for every i in [0, chunks), in any order and on any thread; returns when
  // all are done.
  using Task = void (*)(void* context, int thread, int64_t chunk);
  void run(Task task, void* context, int64_t chunks);

  // Lets the other threads begin with that, a chunk for each of `size`, and returns; false if there are none
  // or they have begun with something else.  Until `join`, the caller does what it runs alone.
  bool start(Task task, void* context);
  // The caller takes part in what was started; returns when it is done.
  void join();

  template <class Body>
  void for_each(int64_t chunks, Body&& body) {
    run([](void* b, int, int64_t i) { (*static_cast<Body*>(b))(i); }, &body, chunks);
  }

  // The same as body(thread, i), thread in [0, size()): for scratch of its own.
  template <class Body>
  void for_each_on(int64_t chunks, Body&& body) {
    run([](void* b, int thread, int64_t i) { (*static_cast<Body*>(b))(thread, i); }, &body, chunks);
  }

 private:
  void work(uint32_t job, int thread);
  void publish(Task task, void* context, int64_t chunks);
  void loop(int thread, int cpu);

  int caller_ = -1;       // the core of the calling thread
  bool started_ = false;  // the caller's: between `start` and `join`
  // Of the present job.  Whoever has claimed a chunk of it may read them: it is not over before that is done.
  std::atomic<Task> task_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int64_t> chunks_{0}, done_{0};
  std::atomic<uint64_t> next_{0};  // job << 32 | next chunk: a worker that comes too late claims nothing
  std::atomic<uint32_t> job_{0};   // counts the jobs; a change wakes the workers
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace pi2
