// The fallback: blocking reads on threads of the library's own.
#include <errno.h>
#include <unistd.h>

#include <thread>

#include "engine.h"

namespace pi2 {
namespace {

int32_t read_whole(Operation& op) {
  if (!op.find_buffer()) return ENOMEM;
  for (;;) {
    const auto left = static_cast<std::size_t>(op.length - op.done);
    const int64_t got = pread(op.file->fd, op.buffer + op.done, left, op.offset + op.done);
    int32_t code;
    if (op.advance(got < 0 ? -errno : got, &code)) return code;
  }
}

class Threads final : public Engine {
 public:
  Threads(Queue& queue, int threads) : queue_(queue) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { serve(); });
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

std::unique_ptr<Engine> open_threads(Queue& queue, int threads) {
  return std::make_unique<Threads>(queue, threads);
}

}  // namespace pi2
