// An opened file: how it may be read, and whether it is still the one that was opened.
#pragma once
#include <sys/stat.h>

#include <cstdint>

namespace pi2 {

struct File {
  int64_t id = -1;
  int fd = -1;
  int64_t size = 0;
  int64_t block = 0;  // offsets, lengths and addresses of reads are multiples of it
  bool direct = false;
  bool named = false;  // opened by a path: it can be replaced
  timespec changed{};

  // 0, or the errno; `block` is the least read that the caller wishes.
  int open(const char* path, int64_t block, bool want_direct, bool must_be_direct);
  int adopt(int descriptor, int64_t size, int64_t block);
  // 0, or why not: ESTALE if it was changed or replaced since it was opened.
  int check() const;
  // Drops the pages of a buffered read from the page cache.
  void forget(int64_t offset, int64_t nbytes) const;
  void close();
};

}  // namespace pi2
