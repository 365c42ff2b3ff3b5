// Who reads: an io_uring with one thread, or a pool of threads.
#pragma once
#include <memory>

#include "queue.h"

namespace pi2 {

class Engine {
 public:
  virtual ~Engine() = default;  // after Queue::stop and wake: waits for its threads
  virtual void wake() {}        // there is work, or the end has come
  virtual void add_file(const File&) {}
  virtual bool registered_buffers() const { return false; }
  virtual bool registered_files() const { return false; }
};

// `cpu`: the core that the threads are pinned to; -1: none.
std::unique_ptr<Engine> open_threads(Queue& queue, int threads, int cpu);
// Null with *error set if the kernel refuses.
std::unique_ptr<Engine> open_uring(Queue& queue, int depth, int cpu, int32_t* error);
int uring_error();  // 0: there is io_uring
void pin(int cpu);  // the calling thread; nothing for -1

}  // namespace pi2
