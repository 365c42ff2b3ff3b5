#include "plan.h"

#include <errno.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace pi2 {
namespace {

constexpr int kAttempts = 1000;  // of a read that the kernel says to try again, or that stays short

int64_t down(int64_t x, int64_t block) { return x / block * block; }
int64_t up(int64_t x, int64_t block) { return (x + block - 1) / block * block; }

constexpr std::size_t kTargets = 256;  // pieces of one read: fewer than the kernel takes (IOV_MAX, 1024)

void complete(const File& file, Operation& op) {
  op.file = &file;
  int64_t at = op.offset;
  const auto whole = [&](const pi2_storage_read& piece) {
    const bool follows = piece.offset == at;
    at += piece.nbytes;
    return follows && piece.nbytes % file.block == 0 &&
           reinterpret_cast<uintptr_t>(piece.into) % static_cast<uintptr_t>(file.block) == 0;
  };
  op.in_place = op.pieces.size() <= kTargets && std::all_of(op.pieces.begin(), op.pieces.end(), whole) &&
                at == op.offset + op.length;
}

}  // namespace

void FreeAligned::operator()(uint8_t* p) const { std::free(p); }

Op renewed(Op op) {
  Operation fresh;
  fresh.pieces.swap(op->pieces);
  fresh.pieces.clear();
  fresh.targets.swap(op->targets);
  *op = std::move(fresh);
  return op;
}

std::vector<Op> plan(const File& file, std::vector<pi2_storage_read> reads, int64_t merge, int64_t gap,
                     std::vector<Op> spares) {
  std::stable_sort(reads.begin(), reads.end(),
                   [](const auto& a, const auto& b) { return a.offset < b.offset; });
  std::vector<Op> ops;
  ops.reserve(reads.size());
  Operation* open = nullptr;
  for (pi2_storage_read rest : reads) {
    while (rest.nbytes > 0) {
      const int64_t begin = down(rest.offset, file.block);
      const auto joins = [&] {
        // a range that was cut may have left us behind where the next one begins
        if (open == nullptr || begin < open->offset || rest.offset >= open->offset + merge) return false;
        const int64_t apart = begin - (open->offset + open->length);
        return apart <= 0 || (apart <= gap && up(rest.offset + rest.nbytes, file.block) - open->offset <=
                                                  std::min(merge, kShort));
      };
      if (!joins()) {
        if (spares.empty()) spares.push_back(std::make_unique<Operation>());
        ops.push_back(std::move(spares.back()));
        spares.pop_back();
        open = ops.back().get();
        open->offset = begin;
      }
      const int64_t limit = open->offset + merge;
      pi2_storage_read piece = rest;
      piece.nbytes = std::min(rest.nbytes, limit - rest.offset);
      const int64_t end = piece.offset + piece.nbytes;
      open->length = std::max(open->length, up(end, file.block) - open->offset);
      open->needed = std::max(open->needed, end - open->offset);
      open->pieces.push_back(piece);
      rest.offset += piece.nbytes;
      rest.into += piece.nbytes;
      rest.nbytes -= piece.nbytes;
    }
  }
  for (auto& op : ops) complete(file, *op);
  return ops;
}

bool Operation::find_buffer() {
  if (in_place || buffer != nullptr) return true;
  const auto align = static_cast<std::size_t>(std::max<int64_t>(file->block, 4096));
  owned.reset(static_cast<uint8_t*>(std::aligned_alloc(align, up(length, static_cast<int64_t>(align)))));
  buffer = owned.get();
  return buffer != nullptr;
}

void Operation::aim() {
  targets.clear();
  if (!in_place) {
    targets.push_back({buffer + done, static_cast<std::size_t>(length - done)});
    return;
  }
  for (const auto& piece : pieces) {
    const int64_t read = std::clamp<int64_t>(offset + done - piece.offset, 0, piece.nbytes);
    if (read < piece.nbytes)
      targets.push_back({piece.into + read, static_cast<std::size_t>(piece.nbytes - read)});
  }
}

bool Operation::advance(int64_t result, int32_t* code) {
  *code = 0;
  const bool again = result == -EINTR || result == -EAGAIN;
  if (result < 0 && !again) {
    *code = static_cast<int32_t>(-result);
    return true;
  }
  if (result > 0 && done + result >= needed) {
    done += result;
    return true;
  }
  if (result == 0) {
    *code = ENODATA;
    return true;
  }
  if (++attempts > kAttempts) {
    *code = EIO;
    return true;
  }
  if (result > 0) {
    const int64_t next = down(done + result, file->block);  // direct reads begin at a block
    if (next == done && ++standstills > 1) *code = ENODATA;
    done = next;
  }
  return *code != 0;
}

void Operation::deliver() const {
  if (in_place) return;
  for (const auto& piece : pieces)
    std::memcpy(piece.into, buffer + (piece.offset - offset), static_cast<std::size_t>(piece.nbytes));
}

int64_t Operation::wanted_at() const { return std::max(pieces[0].offset, offset + done); }

}  // namespace pi2
