#include <errno.h>

#include <algorithm>

#include "pipeline.h"

namespace {

constexpr double kForEver = -1;

// Pages that hold the gate, if others remain: two reads of one page would cost more than they spare.
int64_t split_of(const pi2_ffn& f, int64_t page) {
  if (f.gate == PI2_NONE || page <= 0 || f.stride % page != 0) return 0;
  const int64_t end = (row_bytes(f.gate, f.d_model) + page - 1) / page * page;
  return f.bias_offset < 0 && end < f.stride ? end : 0;  // the biases lie at the end of a bundle
}

}  // namespace

void pi2_stream::rows(int part, int64_t* first, int64_t* last) const {
  const int64_t ends[] = {0, f.gate == PI2_NONE ? 0 : f.up_offset, f.down_offset, f.stride};
  *first = ends[part];
  *last = ends[part + 1];
}

int64_t pi2_stream::submit(const pi2_place& place, const int32_t* neurons, const int32_t* into, int64_t k,
                           int64_t first, int64_t last, int32_t priority,
                           pi2_storage_failure* failure) const {
  std::vector<pi2_storage_read> reads(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i)
    reads[i] = {place.offset + neurons[i] * f.stride + first, last - first, bundle(into[i]) + first};
  return abi->submit(abi->self, place.file, reads.data(), k, priority, failure);
}

int64_t pi2_stream::settle(pi2::Prefetch& prefetch, bool read) {
  for (const int32_t slot : prefetch.slots) states[slot] = read ? pi2::kPresent : pi2::kEmpty;
  const auto k = static_cast<int64_t>(prefetch.slots.size());
  prefetch.slots.clear();
  prefetch.ticket = 0;
  return read ? k * f.stride : 0;
}

void pi2_stream::abandon() {
  if (running == nullptr) return;
  running->abandon();
  running.reset();
}

extern "C" pi2_stream* pi2_cpu_stream_open(pi2_cpu* cpu, const pi2_ffn* slab, uint8_t* states, int64_t slots,
                                           const pi2_storage_abi* abi, int64_t page, int32_t two_phase,
                                           int64_t cluster, int32_t trace, int32_t overlap, int32_t bundled) {
  if (abi->version != PI2_STORAGE_ABI_VERSION || abi->size < sizeof(pi2_storage_abi)) return nullptr;
  const int64_t split = split_of(*slab, page);
  auto* stream = new pi2_stream{cpu,        *slab,        states,      slots,
                                abi,        split,        cluster,     two_phase != 0 && split != 0,
                                trace != 0, overlap != 0, bundled != 0};
  stream->prefetch_of.resize(static_cast<size_t>(slots));
  return stream;
}

extern "C" void pi2_cpu_stream_begin(pi2_stream* stream, const pi2_place* place, const int32_t* neurons,
                                     const int32_t* slots, int64_t k, const float* x) {
  stream->abandon();
  if (stream->hangs) return;
  stream->running = std::make_unique<pi2::Pipeline>(*stream, *place, pi2::Candidates{neurons, slots, k}, x);
  stream->running->begin();
}

extern "C" int32_t pi2_cpu_stream_finish(pi2_stream* stream, float* out, pi2_stream_count* count,
                                         pi2_storage_failure* failure) {
  *failure = {ETIMEDOUT, -1};  // why nothing was begun
  if (stream->running == nullptr) return ETIMEDOUT;
  const int32_t code = stream->running->finish(out, count, failure);
  stream->running.reset();
  return code;
}

extern "C" int32_t pi2_cpu_stream_prefetch(pi2_stream* s, const pi2_place* place, const int32_t* neurons,
                                           const int32_t* slots, int64_t k, pi2_storage_failure* failure) {
  *failure = {ETIMEDOUT, -1};
  if (s->hangs) return ETIMEDOUT;
  const auto spent = [](const pi2::Prefetch& p) { return p.ticket == 0; };
  for (int64_t first = 0; first < k;) {
    const int64_t last = std::min(k, first + pi2::kTicket);
    *failure = {0, -1};
    const int64_t ticket = s->submit(*place, neurons + first, slots + first, last - first, 0, s->f.stride,
                                     PI2_STORAGE_PREFETCH | (last < k ? PI2_STORAGE_MORE : 0), failure);
    if (ticket == 0) return failure->code;
    std::lock_guard<std::mutex> guard(s->mutex);
    auto free = std::find_if(s->prefetches.begin(), s->prefetches.end(), spent);
    if (free == s->prefetches.end()) free = s->prefetches.insert(free, pi2::Prefetch{});
    *free = {ticket, {slots + first, slots + last}};
    for (const int32_t slot : free->slots) {
      s->states[slot] = pi2::kLoading;
      s->prefetch_of[slot] = static_cast<int32_t>(free - s->prefetches.begin());
    }
    first = last;
  }
  return 0;
}

extern "C" int64_t pi2_cpu_stream_settle(pi2_stream* s, const int32_t* slots, int64_t k, int32_t cancel) {
  if (slots == nullptr) s->abandon();
  std::vector<char> wanted(s->prefetches.size(), slots == nullptr);
  for (int64_t i = 0; i < k && slots != nullptr; ++i)
    if (s->states[slots[i]] == pi2::kLoading) wanted[s->prefetch_of[slots[i]]] = 1;
  int64_t bytes = 0;
  for (const bool cancelling : {true, false}) {  // first all are cancelled, so that none is read meanwhile
    if (cancelling && !cancel) continue;
    for (size_t i = 0; i < wanted.size(); ++i) {
      pi2::Prefetch& prefetch = s->prefetches[i];
      if (!wanted[i] || prefetch.ticket == 0) continue;
      pi2_storage_failure failure{0, -1};
      if (cancelling) {
        s->abi->cancel(s->abi->self, prefetch.ticket);
        continue;
      }
      const int32_t code =
          s->hangs ? ETIMEDOUT : s->abi->wait(s->abi->self, prefetch.ticket, kForEver, &failure);
      if (code == ETIMEDOUT) s->hangs = true;
      std::lock_guard<std::mutex> guard(s->mutex);
      bytes += s->settle(prefetch, code == 0);
    }
  }
  return bytes;
}

extern "C" int64_t pi2_cpu_stream_spans(pi2_stream* s, pi2_span* into) {
  const auto count = static_cast<int64_t>(s->spans.size());
  if (into == nullptr) return count;
  std::copy(s->spans.begin(), s->spans.end(), into);
  s->spans.clear();
  return count;
}

extern "C" void pi2_cpu_stream_close(pi2_stream* s) {
  pi2_cpu_stream_settle(s, nullptr, 0, 1);
  delete s;
}
