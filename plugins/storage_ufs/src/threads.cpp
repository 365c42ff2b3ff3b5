// The fallback: blocking reads on threads of the library's own.
#include <errno.h>
#include <sys/uio.h>

#include <thread>

#include "engine.h"

namespace pi2 {
namespace {

int32_t read_whole(Operation& op) {
  if (!op.find_buffer()) return ENOMEM;
  for (;;) {
    op.aim();
    const int64_t got =
        preadv(op.file->fd, op.targets.data(), static_cast<int>(op.targets.size()), op.offset + op.done);
    int32_t code;
    if (op.advance(got < 0 ? -errno : got, &code)) return code;
  }
}

class Threads final : public Engine {
 public:
  Threads(Queue& queue, int threads, int cpu) : queue_(queue) {
    for (int i = 0; i < threads; ++i) {
      threads_.emplace_back([this, cpu] {
        pin(cpu);
        serve();
      });
    }
  }
  ~Threads() override {
    for (auto& thread : threads_) thread.join();
  }

 private:
  void serve() {
    while (Op op = queue_.next_wait()) {
      const int32_t code = read_whole(*op);
      queue_.finish(std::move(op), code);
    }
  }

  Queue& queue_;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Engine> open_threads(Queue& queue, int threads, int cpu) {
  return std::make_unique<Threads>(queue, threads, cpu);
}

}  // namespace pi2
