// What a streamed call has to do: what is there, what is on its way, and what is missing, range by range.
#include <algorithm>

#include "pipeline.h"

namespace pi2 {

void Pipeline::plan() {
  order_.reserve(static_cast<size_t>(candidates_.count));
  remaining_.resize(static_cast<size_t>(token_.ranges()));
  for (int64_t range = 0; range < token_.ranges(); ++range) plan_range(range);
}

void Pipeline::plan_range(int64_t range) {
  const int64_t first = token_.begin(range), last = token_.begin(range + 1);
  remaining_[range] = last - first;
  if (first == last) return token_.downs(range);
  ++left_;
  auto& [resident, loading, missing] = s_.sorted;
  for (auto& some : s_.sorted) some.clear();
  for (auto i = static_cast<int32_t>(first); i < last; ++i) {
    const uint8_t is = state(i);
    count_.present += is == kPresent;
    if (is == kPresent || (is == kGate && s_.split != 0)) resident.push_back(i);
    else if (is == kLoading) loading.push_back(i);
    else missing.push_back(i);
  }
  for (const int32_t i : missing) state(i) = kEmpty;  // a gate that cannot be read apart is read again
  if (!resident.empty())
    residents_.push_back(
        append(Kind::kResident, range, resident.data(), static_cast<int64_t>(resident.size())));
  add_guesses(range, loading);
  add_clusters(range, missing);
}

Pipeline::Unit Pipeline::append(Kind kind, int64_t range, const int32_t* which, int64_t count) {
  Unit unit;
  unit.kind = kind;
  unit.range = range;
  unit.first = static_cast<int64_t>(order_.size());
  unit.count = count;
  unit.part = s_.f.gate == PI2_NONE ? 1 : 0;
  order_.insert(order_.end(), which, which + count);
  return unit;
}

void Pipeline::add_clusters(int64_t range, const std::vector<int32_t>& missing) {
  const auto k = static_cast<int64_t>(missing.size());
  for (int64_t i = 0; i < k; i += s_.cluster)
    waiting_.push_back(append(s_.two_phase ? Kind::kGates : Kind::kWhole, range, missing.data() + i,
                              std::min(s_.cluster, k - i)));
}

// A unit of each guess that has some in this range; a ticket, which can be waited for once, has several.
void Pipeline::add_guesses(int64_t range, std::vector<int32_t>& loading) {
  const auto prefetch = [&](int32_t i) { return s_.prefetch_of[slot(i)]; };
  std::stable_sort(loading.begin(), loading.end(),
                   [&](int32_t a, int32_t b) { return prefetch(a) < prefetch(b); });
  for (auto i = loading.begin(); i != loading.end();) {
    const int32_t which = prefetch(*i);
    const auto end = std::find_if(i, loading.end(), [&](int32_t j) { return prefetch(j) != which; });
    auto read = std::find_if(in_flight_.begin(), in_flight_.end(),
                             [&](const Read& r) { return r.prefetch == which; });
    if (read == in_flight_.end())
      read = in_flight_.insert(read, {s_.prefetches[which].ticket, which, now(), {}});
    read->units.push_back(append(Kind::kGuess, range, &*i, end - i));
    i = end;
  }
}

}  // namespace pi2
