// From the ranges that somebody wants to the reads that the device gets.
#pragma once
#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "file.h"
#include "pi2_abi.h"

namespace pi2 {

struct Ticket {
  int64_t left = 0;  // operations
  int32_t code = 0;
  int64_t offset = -1;
  bool dropped = false;  // cancelled, or failed: the rest need not be read
};

struct FreeAligned {
  void operator()(uint8_t* p) const;
};

// One read of whole blocks, and the parts of it that somebody wants.
struct Operation {
  std::shared_ptr<Ticket> ticket;
  const File* file = nullptr;
  int64_t offset = 0, length = 0;  // multiples of the block
  int64_t needed = 0;              // up to the end of the last piece, from `offset`
  std::vector<pi2_storage_read> pieces;
  bool in_place =
      false;  // straight into the pieces, which are whole blocks, one behind the other in the file
  int32_t priority = 0;

  uint8_t* buffer = nullptr;                      // (length), aligned; null: in place
  std::unique_ptr<uint8_t[], FreeAligned> owned;  // `buffer`, unless it is a slot
  std::vector<iovec> targets;                     // what is left to read, and where to; see aim()
  int slot = -1;                                  // of the registered buffers
  int64_t done = 0;                               // bytes read so far
  int attempts = 0, standstills = 0;

  // Makes sure that there is memory to read into; false: out of memory.
  bool find_buffer();
  // Fills `targets` with the memory for the bytes from offset + done on.
  void aim();
  // What a read returned: bytes, or -errno.  True: over, with `code`; false: go on at offset + done.
  bool advance(int64_t result, int32_t* code);
  void deliver() const;  // copies the pieces out, unless they were read in place
  int64_t wanted_at() const;
};

using Op = std::unique_ptr<Operation>;

// As if it were new, but for the memory of its lists.
Op renewed(Op op);

constexpr int64_t kShort = 32 * 1024;  // bytes of a read that may have gaps

// Widens to blocks, joins what touches or overlaps up to `merge` bytes, cuts what is longer; what lies no
// more than `gap` bytes apart is joined up to `kShort` bytes: a read costs more than they do.  Empty ranges
// vanish.  `reads` lie inside of the file.  Operations come from `spares` as long as there are some.
std::vector<Op> plan(const File& file, std::vector<pi2_storage_read> reads, int64_t merge, int64_t gap,
                     std::vector<Op> spares);

}  // namespace pi2
