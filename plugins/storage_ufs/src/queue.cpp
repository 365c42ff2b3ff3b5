#include "queue.h"

#include <errno.h>

#include <algorithm>
#include <iterator>

namespace pi2 {
namespace {

constexpr std::size_t kSpares = 256;  // more than are ever in flight

}  // namespace

Queue::Queue(const pi2_ufs_model* model, int queues, double deadline) : deadline_(deadline) {
  if (model != nullptr) device_ = std::make_unique<pi2_ufs_device>(*model, queues);
}

int64_t Queue::add(std::vector<Op> ops, int32_t priority) {
  auto ticket = std::make_shared<Ticket>();
  ticket->left = static_cast<int64_t>(ops.size());
  std::lock_guard lock(mutex_);
  if (stopped_ && !ops.empty()) {
    ticket->code = ECANCELED;
    ticket->left = 0;
    ops.clear();
  }
  const int64_t id = ++last_ticket_;
  tickets_.emplace(id, ticket);
  for (auto& op : ops) {
    op->ticket = ticket;
    op->priority = priority;
    waiting_[priority].push_back(std::move(op));
    work_.notify_one();
  }
  return id;
}

std::vector<Op> Queue::spares(std::size_t most) {
  std::lock_guard lock(mutex_);
  const auto first = spares_.end() - static_cast<std::ptrdiff_t>(std::min(most, spares_.size()));
  std::vector<Op> taken(std::make_move_iterator(first), std::make_move_iterator(spares_.end()));
  spares_.erase(first, spares_.end());
  return taken;
}

int32_t Queue::wait(int64_t id, double seconds, pi2_storage_failure* failure) {
  std::unique_lock lock(mutex_);
  const auto found = tickets_.find(id);
  if (found == tickets_.end()) {
    *failure = {EINVAL, -1};
    return EINVAL;
  }
  const std::shared_ptr<Ticket> ticket = found->second;
  const auto over = [&] { return ticket->left == 0 || broken_ != 0; };
  const std::chrono::duration<double> limit(seconds < 0 ? deadline_ : std::min(seconds, 1e8));
  if (seconds != 0) done_.wait_for(lock, std::chrono::duration_cast<Clock::duration>(limit), over);
  if (ticket->left > 0 && broken_ == 0) {
    if (seconds >= 0) return PI2_STORAGE_PENDING;
    drop(ticket.get());
    *failure = {ETIMEDOUT, -1};
    return ETIMEDOUT;
  }
  tickets_.erase(id);
  if (ticket->left > 0) {
    *failure = {broken_, -1};
    return broken_;
  }
  *failure = {ticket->code, ticket->offset};
  return ticket->code;
}

void Queue::cancel(int64_t id) {
  std::lock_guard lock(mutex_);
  const auto found = tickets_.find(id);
  if (found != tickets_.end()) drop(found->second.get());
}

// A device serves what it has in any order, and some report reads that are over only when they have none
// left: what nobody waits for shall not be among what somebody does.
Op Queue::pop() {
  for (auto& [priority, ops] : waiting_) {
    if (flying_[priority] > 0 && ops.empty()) return nullptr;
    if (ops.empty()) continue;
    Op op = std::move(ops.front());
    ops.pop_front();
    flying_[priority] += 1;
    counts_.reads += 1;
    return op;
  }
  return nullptr;
}

Op Queue::next() {
  std::lock_guard lock(mutex_);
  return pop();
}

Op Queue::next_wait() {
  std::unique_lock lock(mutex_);
  for (;;) {
    if (Op op = pop()) return op;
    if (stopped_) return nullptr;
    work_.wait(lock);
  }
}

void Queue::finish(Op op, int32_t code) {
  if (code == 0) {
    pretend(*op);
    op->deliver();
  }
  op->file->forget(op->offset, op->length);
  std::lock_guard lock(mutex_);
  if (code == 0) counts_.bytes += op->done;
  if (--flying_[op->priority] == 0) work_.notify_all();  // less urgent ones may start
  settle(*op, code);
  if (code != 0) drop(op->ticket.get());
  if (op->ticket->left == 0) done_.notify_all();  // nobody waits for less than all of it
  if (spares_.size() < kSpares) spares_.push_back(renewed(std::move(op)));
}

// The lowest offset tells of the failure; being cancelled tells least.
void Queue::settle(Operation& op, int32_t code) {
  Ticket& ticket = *op.ticket;
  ticket.left -= 1;
  if (code == 0 || (code == ECANCELED && ticket.code != 0)) return;
  const int64_t at = op.wanted_at();
  if (ticket.code == 0 || ticket.code == ECANCELED || at < ticket.offset) {
    ticket.code = code;
    ticket.offset = at;
  }
}

void Queue::drop(const Ticket* ticket) {
  const auto dropped = [&](const Op& op) { return ticket == nullptr || op->ticket.get() == ticket; };
  for (auto& [priority, ops] : waiting_) {
    for (Op& op : ops)
      if (dropped(op)) settle(*op, ECANCELED);
    ops.erase(std::remove_if(ops.begin(), ops.end(), dropped), ops.end());
  }
  done_.notify_all();
}

// Holds a read back until the modelled device would have had it.
void Queue::pretend(const Operation& op) {
  if (device_ == nullptr) return;
  std::unique_lock lock(mutex_);
  const double now = std::chrono::duration<double>(Clock::now() - began_).count();
  const double until = device_->read(now, op.file->id, op.offset, op.length);
  const std::chrono::duration<double> at(std::min(until, 1e8));
  halt_.wait_until(lock, began_ + std::chrono::duration_cast<Clock::duration>(at), [&] { return stopped_; });
}

void Queue::stop() {
  std::lock_guard lock(mutex_);
  stopped_ = true;
  drop(nullptr);
  work_.notify_all();
  halt_.notify_all();
}

void Queue::fail(int32_t code) {
  stop();
  std::lock_guard lock(mutex_);
  broken_ = code;
  done_.notify_all();
}

bool Queue::stopped() {
  std::lock_guard lock(mutex_);
  return stopped_;
}

void Queue::count(pi2_ufs_counts* counts) {
  std::lock_guard lock(mutex_);
  counts->ranges = counts_.ranges;
  counts->reads = counts_.reads;
  counts->merged = counts_.merged;
  counts->bytes = counts_.bytes;
}

void Queue::count_ranges(int64_t ranges, int64_t operations) {
  std::lock_guard lock(mutex_);
  counts_.ranges += ranges;
  counts_.merged += std::max<int64_t>(0, ranges - operations);
}

}  // namespace pi2
