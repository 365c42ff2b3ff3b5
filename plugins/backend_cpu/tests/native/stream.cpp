// Streams over a flash in memory whose thread ends reads in any order, and fails some: under the sanitizers,
// in any number of threads, against a slab that has everything.
#include <errno.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "data.h"

namespace {

class Flash {
 public:
  Flash(std::vector<uint8_t> file, uint32_t seed) : file_(std::move(file)), random_{std::mt19937(seed)} {
    thread_ = std::thread([this] { serve(); });
  }
  ~Flash() {
    if (!tickets_.empty()) fail("reads that nobody waited for");
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    work_.notify_all();
    thread_.join();
  }
  std::atomic<int64_t> fail_one_in{0};  // 0: none; what was prefetched may still be read when it changes
  pi2_storage_abi abi{PI2_STORAGE_ABI_VERSION, sizeof(pi2_storage_abi), this, submit, wait, cancel};

 private:
  struct Ticket {
    std::vector<pi2_storage_read> reads;
    bool over = false, cancelled = false;
    pi2_storage_failure result{0, -1};
  };

  static int64_t submit(void* self, int64_t, const pi2_storage_read* reads, int64_t n, int32_t,
                        pi2_storage_failure*) {
    auto& flash = *static_cast<Flash*>(self);
    std::lock_guard<std::mutex> lock(flash.mutex_);
    flash.tickets_[++flash.last_].reads.assign(reads, reads + n);
    flash.work_.notify_one();
    return flash.last_;
  }
  static int32_t wait(void* self, int64_t id, double seconds, pi2_storage_failure* failure) {
    auto& flash = *static_cast<Flash*>(self);
    std::unique_lock<std::mutex> lock(flash.mutex_);
    Ticket& ticket = flash.tickets_.at(id);
    const auto over = [&] { return ticket.over; };
    if (seconds < 0) flash.done_.wait(lock, over);
    else if (!flash.done_.wait_for(lock, std::chrono::duration<double>(seconds), over))
      return PI2_STORAGE_PENDING;
    *failure = ticket.result;
    flash.tickets_.erase(id);
    return failure->code;
  }
  static void cancel(void* self, int64_t id) {
    auto& flash = *static_cast<Flash*>(self);
    std::lock_guard<std::mutex> lock(flash.mutex_);
    flash.tickets_.at(id).cancelled = true;
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stop_) {
      std::vector<int64_t> open;
      for (const auto& [id, ticket] : tickets_)
        if (!ticket.over) open.push_back(id);
      if (open.empty()) {
        work_.wait(lock);
        continue;
      }
      Ticket& ticket =
          tickets_.at(open[static_cast<size_t>(random_.below(static_cast<int64_t>(open.size())))]);
      const int64_t one_in = fail_one_in;
      if (ticket.cancelled) ticket.result = {ECANCELED, -1};
      else if (one_in > 0 && random_.one_in(one_in)) ticket.result = {EIO, ticket.reads[0].offset};
      else copy(lock, ticket);
      ticket.over = true;
      done_.notify_all();
    }
  }
  void copy(std::unique_lock<std::mutex>& lock, const Ticket& ticket) {  // as a device does: without the lock
    lock.unlock();
    for (const auto& read : ticket.reads)
      std::memcpy(read.into, file_.data() + read.offset, static_cast<size_t>(read.nbytes));
    lock.lock();
  }

  const std::vector<uint8_t> file_;
  Random random_;
  std::mutex mutex_;
  std::condition_variable work_, done_;
  std::map<int64_t, Ticket> tickets_;
  int64_t last_ = 0;
  bool stop_ = false;
  std::thread thread_;
};

constexpr int64_t kPage = 512;

// Bundles of whole pages, of which the gate's can be read apart.
pi2_ffn some_ffn(Random& r) {
  pi2_ffn f{};
  f.gate = static_cast<int32_t>(r.below(3));
  f.up = static_cast<int32_t>(r.below(3));
  f.down = static_cast<int32_t>(r.below(4));
  f.d_model = 32 * (4 + r.below(6));
  f.count = r.pick<int64_t>({1, 7, 96, 97, 300});
  f.up_offset = row_bytes(f.gate, f.d_model);
  f.down_offset = f.up_offset + row_bytes(f.up, f.d_model);
  f.stride = (f.down_offset + row_bytes(f.down, f.d_model) + kPage - 1) / kPage * kPage;
  f.bias_offset = -1;
  f.activation = r.one_in(3) ? PI2_SILU : PI2_RELU;
  f.up_relu = r.one_in(3);
  return f;
}

std::vector<uint8_t> some_bundles(Random& r, const pi2_ffn& f) {
  std::vector<uint8_t> bundles(static_cast<size_t>(f.count * f.stride));
  for (int64_t i = 0; i < f.count; ++i) {
    uint8_t* b = bundles.data() + i * f.stride;
    fill_row(r, f.gate, f.d_model, b);
    fill_row(r, f.up, f.d_model, b + f.up_offset);
    fill_row(r, f.down, f.d_model, b + f.down_offset);
  }
  return bundles;
}

// What a caller may do before it finishes a call: compute with the context, prefetch into the slot `spare`
// and settle that.
void do_meanwhile(Random& r, pi2_cpu* cpu, const pi2_ffn& full, pi2_stream* stream, const uint8_t* states,
                  int32_t spare) {
  std::vector<float> x(static_cast<size_t>(full.d_model), 1.0f), out(x.size());
  pi2_cpu_ffn(cpu, &full, x.data(), 1, nullptr, full.count, out.data());
  if (states[spare] != 0) return;
  const pi2_place place{0, 0, 1};
  const auto neuron = static_cast<int32_t>(r.below(full.count));
  pi2_storage_failure failure;
  pi2_cpu_stream_prefetch(stream, &place, &neuron, &spare, 1, &failure);
  if (r.one_in(2)) pi2_cpu_stream_settle(stream, &spare, 1, r.one_in(2));
}

void stream_case(Random& r, pi2_cpu* cpu) {
  pi2_ffn full = some_ffn(r), slab = full;
  const auto bundles = some_bundles(r, full);
  std::vector<int32_t> neurons, slots;
  for (int32_t i = 0; i < full.count; ++i) {
    if (r.one_in(3)) continue;
    neurons.push_back(i);
    slots.push_back(static_cast<int32_t>(neurons.size()) - 1);
  }
  std::shuffle(slots.begin(), slots.end(), r.engine);
  const auto k = static_cast<int64_t>(neurons.size());
  std::vector<float> x(static_cast<size_t>(full.d_model)), want(x.size()), out(x.size());
  for (auto& value : x) value = r.normal();
  full.bundles = bundles.data();
  const int64_t active = pi2_cpu_ffn(cpu, &full, x.data(), 1, neurons.data(), k, want.data());

  std::vector<uint8_t> memory(static_cast<size_t>((k + 1) * full.stride), 255), states(slots.size() + 1);
  slab.bundles = memory.data();
  Flash flash(bundles, static_cast<uint32_t>(r.engine()));
  pi2_stream* stream =
      pi2_cpu_stream_open(cpu, &slab, states.data(), k + 1, &flash.abi, kPage, r.one_in(2),
                          r.pick<int64_t>({1, 5, 16}), r.one_in(2), !r.one_in(3), !r.one_in(3));
  const pi2_place place{0, 0, 0};
  for (int call = 0; call < 3; ++call) {
    flash.fail_one_in = call < 2 && r.one_in(2) ? 6 : 0;
    pi2_storage_failure failure{0, -1};
    pi2_stream_count count{};
    for (int64_t i = 0; i < k; ++i)  // some are evicted
      if (states[slots[i]] != 1 && r.one_in(2)) states[slots[i]] = 0;
    if (const int64_t half = k / 2; r.one_in(2) && half > 0) {
      std::vector<int32_t> some, into;
      for (int64_t i = 0; i < half; ++i)
        if (states[slots[i]] == 0) some.push_back(neurons[i]), into.push_back(slots[i]);
      pi2_cpu_stream_prefetch(stream, &place, some.data(), into.data(), static_cast<int64_t>(some.size()),
                              &failure);
      if (r.one_in(4))
        pi2_cpu_stream_settle(stream, into.data(), static_cast<int64_t>(into.size()), r.one_in(2));
    }
    pi2_cpu_stream_begin(stream, &place, neurons.data(), slots.data(), k, x.data());
    if (r.one_in(8)) {  // interrupted
      pi2_cpu_stream_settle(stream, nullptr, 0, r.one_in(2));
      continue;
    }
    if (r.one_in(2)) do_meanwhile(r, cpu, full, stream, states.data(), static_cast<int32_t>(k));
    const int32_t code = pi2_cpu_stream_finish(stream, out.data(), &count, &failure);
    if (code != 0 && flash.fail_one_in == 0 && code != EIO) fail("a stream failed by itself");
    if (code == 0 && (count.active != active || std::memcmp(out.data(), want.data(), 4 * out.size())))
      fail("a stream gave other bits than a slab");
    std::vector<pi2_span> spans(static_cast<size_t>(pi2_cpu_stream_spans(stream, nullptr)));
    pi2_cpu_stream_spans(stream, spans.data());
  }
  pi2_cpu_stream_close(stream);
}

}  // namespace

void stress_streams(int64_t cases) {
  for (const int32_t threads : {1, 2, 4}) {
    pi2_cpu* cpu = pi2_cpu_open(threads, nullptr, nullptr, 1);
    Random r{std::mt19937(static_cast<uint32_t>(threads))};
    for (int64_t i = 0; i < cases; ++i) stream_case(r, cpu);
    pi2_cpu_close(cpu);
    std::printf("%d threads: %lld streams\n", threads, static_cast<long long>(cases));
  }
}
