#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>

namespace pi2 {
namespace {

constexpr int64_t kPage = 4096;

// What O_DIRECT asks of offsets and addresses; 4096 satisfies every device that does not say.
int64_t alignment(int fd) {
#if defined(STATX_DIOALIGN)
  struct statx s;
  if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &s) == 0 && (s.stx_mask & STATX_DIOALIGN) &&
      s.stx_dio_offset_align > 0)
    return std::max<int64_t>({512, s.stx_dio_offset_align, s.stx_dio_mem_align});
#endif
  return fd < 0 ? 512 : kPage;
}

bool same(const timespec& a, const timespec& b) { return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec; }

}  // namespace

int File::open(const char* path, int64_t least, bool want_direct, bool must_be_direct) {
  const int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;  // a FIFO must not hang here
  if (want_direct) fd = ::open(path, flags | O_DIRECT);
  direct = fd >= 0;
  if (!direct) {
    if (want_direct && (errno != EINVAL || must_be_direct)) return errno;
    fd = ::open(path, flags);
    if (fd < 0) return errno;
    posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);  // no reading ahead of what nobody asked for
  }
  // io_uring would take it for: fail rather than wait
  if (fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK) != 0) return errno;
  struct stat s;
  if (fstat(fd, &s) != 0) return errno;
  if (S_ISDIR(s.st_mode)) return EISDIR;
  if (!S_ISREG(s.st_mode) && !S_ISBLK(s.st_mode)) return EINVAL;
  size = S_ISBLK(s.st_mode) ? lseek(fd, 0, SEEK_END) : s.st_size;
  if (size < 0) return errno;
  block = direct ? std::max(least, alignment(fd)) : least;
  changed = s.st_mtim;
  named = S_ISREG(s.st_mode);
  return 0;
}

int File::adopt(int descriptor, int64_t bytes, int64_t least) {
  struct stat s;
  if (fstat(descriptor, &s) != 0) return errno;
  fd = descriptor;
  size = bytes;
  block = std::max(least, kPage);
  direct = (fcntl(fd, F_GETFL) & O_DIRECT) != 0;
  changed = s.st_mtim;
  return 0;
}

int File::check() const {
  struct stat s;
  if (fstat(fd, &s) != 0) return errno;
  if (named && (s.st_nlink == 0 || s.st_size != size)) return ESTALE;
  return same(s.st_mtim, changed) ? 0 : ESTALE;
}

void File::forget(int64_t offset, int64_t nbytes) const {
  if (direct) return;
  const int64_t begin = offset / kPage * kPage, end = (offset + nbytes + kPage - 1) / kPage * kPage;
  posix_fadvise(fd, begin, end - begin, POSIX_FADV_DONTNEED);
}

void File::close() {
  if (fd >= 0) ::close(fd);
  fd = -1;
}

}  // namespace pi2
