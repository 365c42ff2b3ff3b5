// io_uring by raw system calls: one thread submits and reaps, and sleeps in the kernel when there is nothing
// to do.
#include <errno.h>

#include "engine.h"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace pi2 {
namespace {

constexpr int64_t kSlot = kShort;    // bytes of a registered buffer
constexpr int64_t kArena = 2 << 20;  // of all: a huge page on most systems
constexpr int kFiles = 64;           // registered files; those beyond are read by descriptor
constexpr int kShare = 8;      // of what is in flight, one part is waited for while there is more to send
constexpr int kStart = 8;      // reads after which an idle device begins, while the others are being sent
constexpr uint64_t kWake = 0;  // user_data of the poll on the event; operations have their address

int setup(unsigned entries, io_uring_params* p) {
  return static_cast<int>(syscall(SYS_io_uring_setup, entries, p));
}

uint32_t load(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
void store(uint32_t* p, uint32_t value) { __atomic_store_n(p, value, __ATOMIC_RELEASE); }

// The two rings that the kernel shares with us; one thread uses them.
class Ring {
 public:
  explicit Ring(int depth) {
    io_uring_params p{};
    p.flags = IORING_SETUP_CLAMP;
    fd_ = setup(static_cast<unsigned>(depth + 2), &p);  // and the poll on the event
    if (fd_ < 0) return;
    sq_bytes_ = p.sq_off.array + p.sq_entries * sizeof(uint32_t);
    cq_bytes_ = p.cq_off.cqes + p.cq_entries * sizeof(io_uring_cqe);
    sqe_bytes_ = p.sq_entries * sizeof(io_uring_sqe);
    sq_ = map(sq_bytes_, IORING_OFF_SQ_RING);
    cq_ = map(cq_bytes_, IORING_OFF_CQ_RING);
    sqes_ = map(sqe_bytes_, IORING_OFF_SQES);
    if (!sq_ || !cq_ || !sqes_) {
      error_ = ENOMEM;
      return;
    }
    head_ = at<uint32_t>(cq_, p.cq_off.head);
    tail_ = at<uint32_t>(cq_, p.cq_off.tail);
    cq_mask_ = *at<uint32_t>(cq_, p.cq_off.ring_mask);
    cqes_ = at<io_uring_cqe>(cq_, p.cq_off.cqes);
    sq_tail_ = at<uint32_t>(sq_, p.sq_off.tail);
    sq_mask_ = *at<uint32_t>(sq_, p.sq_off.ring_mask);
    array_ = at<uint32_t>(sq_, p.sq_off.array);
    entries = static_cast<int>(p.sq_entries);
    error_ = 0;
  }
  ~Ring() {
    if (sq_) munmap(sq_, sq_bytes_);
    if (cq_) munmap(cq_, cq_bytes_);
    if (sqes_) munmap(sqes_, sqe_bytes_);
    if (fd_ >= 0) ::close(fd_);
  }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  int error() const { return error_; }
  unsigned unsent() const { return unsent_; }
  int entries = 0;

  // There is always room: no more than `entries` are in flight.
  void push(const io_uring_sqe& sqe) {
    const uint32_t index = local_tail_ & sq_mask_;
    static_cast<io_uring_sqe*>(sqes_)[index] = sqe;
    array_[index] = index;
    store(sq_tail_, ++local_tail_);
    ++unsent_;
  }
  // Sends what was pushed, waits for so many answers at least.  0, or an errno that does not go away.
  int enter(int answers) {
    const auto sent = syscall(SYS_io_uring_enter, fd_, unsent_, static_cast<unsigned>(answers),
                              IORING_ENTER_GETEVENTS, nullptr, 0);
    if (sent >= 0) unsent_ -= static_cast<unsigned>(sent);
    return sent >= 0 || errno == EINTR || errno == EAGAIN || errno == EBUSY ? 0 : errno;
  }
  bool reap(io_uring_cqe* cqe) {
    const uint32_t head = *head_;
    if (head == load(tail_)) return false;
    *cqe = cqes_[head & cq_mask_];
    store(head_, head + 1);
    return true;
  }
  bool enlist(unsigned opcode, const void* what, unsigned count) const {
    return syscall(SYS_io_uring_register, fd_, opcode, what, count) >= 0;
  }

 private:
  void* map(std::size_t bytes, uint64_t what) const {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_,
                   static_cast<off_t>(what));
    return p == MAP_FAILED ? nullptr : p;
  }
  template <typename T>
  static T* at(void* base, uint32_t offset) {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(base) + offset);
  }

  int fd_ = -1, error_ = errno;
  void *sq_ = nullptr, *cq_ = nullptr, *sqes_ = nullptr;
  std::size_t sq_bytes_ = 0, cq_bytes_ = 0, sqe_bytes_ = 0;
  uint32_t *head_ = nullptr, *tail_ = nullptr, *sq_tail_ = nullptr, *array_ = nullptr;
  uint32_t cq_mask_ = 0, sq_mask_ = 0, local_tail_ = 0;
  unsigned unsent_ = 0;
  io_uring_cqe* cqes_ = nullptr;
};

class Uring final : public Engine {
 public:
  Uring(Queue& queue, int depth, int cpu)
      : queue_(queue), ring_(depth), event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (error() != 0) return;
    depth_ = std::min(depth, ring_.entries - 1);
    enlist_buffers();
    const std::vector<int> none(kFiles, -1);
    files_ = ring_.enlist(IORING_REGISTER_FILES, none.data(), kFiles);
    thread_ = std::thread([this, cpu] {
      pin(cpu);
      serve();
    });
  }
  ~Uring() override {
    if (thread_.joinable()) thread_.join();
    if (event_ >= 0) ::close(event_);
  }

  int error() const { return ring_.error() != 0 ? ring_.error() : event_ < 0 ? EMFILE : 0; }
  void wake() override {
    if (woken_.exchange(true)) return;  // it has not looked since somebody else did
    const uint64_t one = 1;
    while (write(event_, &one, sizeof one) < 0 && errno == EINTR) {
    }
  }
  void add_file(const File& file) override {
    if (!files_ || file.id >= kFiles) return;
    io_uring_files_update update{};
    update.offset = static_cast<uint32_t>(file.id);
    update.fds = reinterpret_cast<uint64_t>(&file.fd);
    if (!ring_.enlist(IORING_REGISTER_FILES_UPDATE, &update, 1)) files_ = false;
  }
  bool registered_buffers() const override { return arena_ != nullptr; }
  bool registered_files() const override { return files_; }

 private:
  void enlist_buffers();
  void listen();
  void issue(Op op);
  void answer(const io_uring_cqe& cqe);
  void serve();

  Queue& queue_;
  Ring ring_;
  int event_, depth_ = 0, flying_ = 0;
  std::atomic<bool> files_{false}, woken_{false};
  std::unique_ptr<uint8_t[], FreeAligned> arena_;  // (kArena)
  std::vector<int> slots_;                         // free ones
  std::thread thread_;
};

// The kernel pins these once instead of at every read; it may refuse, by its limit on locked memory.
void Uring::enlist_buffers() {
  arena_.reset(static_cast<uint8_t*>(std::aligned_alloc(kArena, kArena)));
#ifdef MADV_HUGEPAGE
  if (arena_)
    madvise(arena_.get(), kArena, MADV_HUGEPAGE);  // to the device, a read is one piece of memory then
#endif
  std::vector<iovec> vectors;
  for (int64_t at = 0; arena_ && at < kArena; at += kSlot) vectors.push_back({arena_.get() + at, kSlot});
  if (!arena_ ||
      !ring_.enlist(IORING_REGISTER_BUFFERS, vectors.data(), static_cast<unsigned>(vectors.size()))) {
    arena_.reset();
    return;
  }
  for (int i = 0; i < static_cast<int>(vectors.size()); ++i) slots_.push_back(i);
}

void Uring::listen() {
  io_uring_sqe sqe{};
  sqe.opcode = IORING_OP_POLL_ADD;
  sqe.fd = event_;
  sqe.poll_events = POLLIN;
  sqe.user_data = kWake;
  ring_.push(sqe);
}

void Uring::issue(Op op) {
  if (op->buffer == nullptr && !op->in_place && op->length <= kSlot && !slots_.empty()) {
    op->slot = slots_.back();
    slots_.pop_back();
    op->buffer = arena_.get() + op->slot * kSlot;
  }
  if (!op->find_buffer()) return queue_.finish(std::move(op), ENOMEM);
  io_uring_sqe sqe{};
  sqe.opcode = op->slot >= 0 ? IORING_OP_READ_FIXED : IORING_OP_READV;
  sqe.buf_index = static_cast<uint16_t>(std::max(op->slot, 0));
  const bool fixed = files_ && op->file->id < kFiles;
  sqe.fd = fixed ? static_cast<int>(op->file->id) : op->file->fd;
  sqe.flags = fixed ? IOSQE_FIXED_FILE : 0;
  op->aim();
  if (op->slot >= 0) {
    sqe.addr = reinterpret_cast<uint64_t>(op->targets[0].iov_base);
    sqe.len = static_cast<uint32_t>(op->targets[0].iov_len);
  } else {
    sqe.addr = reinterpret_cast<uint64_t>(op->targets.data());
    sqe.len = static_cast<uint32_t>(op->targets.size());
  }
  sqe.off = static_cast<uint64_t>(op->offset + op->done);
  sqe.user_data = reinterpret_cast<uint64_t>(op.release());  // comes back in answer()
  ring_.push(sqe);
  ++flying_;
}

void Uring::answer(const io_uring_cqe& cqe) {
  if (cqe.user_data == kWake) {
    uint64_t calls;
    while (read(event_, &calls, sizeof calls) < 0 && errno == EINTR) {
    }
    woken_.exchange(false);  // before it looks for work, which comes after this
    return listen();
  }
  Op op(reinterpret_cast<Operation*>(cqe.user_data));
  --flying_;
  int32_t code;
  if (!op->advance(cqe.res, &code)) return issue(std::move(op));
  const int slot = op->slot;
  queue_.finish(std::move(op), code);
  if (slot >= 0) slots_.push_back(slot);
}

void Uring::serve() {
  listen();
  for (;;) {
    while (flying_ < depth_) {
      Op op = queue_.next();
      if (!op) break;
      issue(std::move(op));
      if (flying_ == kStart && ring_.unsent() >= kStart) ring_.enter(0);  // again below: that tells of errors
    }
    if (flying_ == 0 && queue_.stopped()) return;
    const bool more = flying_ == depth_;
    if (const int error = ring_.enter(more ? std::max(1, flying_ / kShare) : 1))
      return queue_.fail(error);  // nobody shall wait for a broken ring
    io_uring_cqe cqe;
    while (ring_.reap(&cqe)) answer(cqe);
  }
}

}  // namespace

int uring_error() {
  io_uring_params p{};
  const int fd = setup(2, &p);
  if (fd < 0) return errno;
  ::close(fd);
  return 0;
}

std::unique_ptr<Engine> open_uring(Queue& queue, int depth, int cpu, int32_t* error) {
  auto engine = std::make_unique<Uring>(queue, depth, cpu);
  *error = engine->error();
  if (*error != 0) return nullptr;
  return engine;
}

}  // namespace pi2

#else

namespace pi2 {
int uring_error() { return ENOSYS; }
std::unique_ptr<Engine> open_uring(Queue&, int, int, int32_t* error) {
  *error = ENOSYS;
  return nullptr;
}
}  // namespace pi2

#endif
