// The C interface: files, and reads that are checked, planned and handed to the engine.
#include <errno.h>

#include <atomic>

#include "engine.h"
#include "pi2_ufs.h"

namespace {

using pi2::File;

int64_t submit(void* self, int64_t file, const pi2_storage_read* reads, int64_t n, int32_t priority,
               pi2_storage_failure* failure);
int32_t wait(void* self, int64_t ticket, double seconds, pi2_storage_failure* failure);
void cancel(void* self, int64_t ticket);

}  // namespace

struct pi2_ufs {
  explicit pi2_ufs(const pi2_ufs_options& o)
      : options(o), queue(o.model, o.engine == PI2_UFS_URING ? 1 : o.threads, o.deadline) {
    options.model = nullptr;  // the caller's; the queue has a copy
  }

  int64_t add(std::unique_ptr<File> file, int error) {
    if (error != 0) {
      file->close();
      return -error;
    }
    std::lock_guard lock(mutex);
    file->id = static_cast<int64_t>(files.size());
    engine->add_file(*file);
    files.push_back(std::move(file));
    return files.back()->id;
  }
  const File* find(int64_t id) {
    std::lock_guard lock(mutex);
    return id >= 0 && id < static_cast<int64_t>(files.size()) ? files[static_cast<std::size_t>(id)].get()
                                                              : nullptr;
  }

  pi2_ufs_options options;
  pi2::Queue queue;
  std::unique_ptr<pi2::Engine> engine;
  std::atomic<bool> held{false};  // the engine was not woken for the last submit
  std::mutex mutex;               // of `files`
  std::vector<std::unique_ptr<File>> files;
  pi2_storage_abi abi{PI2_STORAGE_ABI_VERSION, sizeof(pi2_storage_abi), this, submit, wait, cancel};
};

namespace {

// The errno of the first read that cannot be, or 0.
int32_t refuse(const File& file, const pi2_storage_read* reads, int64_t n, int64_t* offset) {
  for (int64_t i = 0; i < n; ++i) {
    *offset = reads[i].offset;
    if (reads[i].offset < 0 || reads[i].nbytes < 0) return EINVAL;
    if (reads[i].offset > file.size || reads[i].nbytes > file.size - reads[i].offset) return ENODATA;
  }
  *offset = n > 0 ? reads[0].offset : -1;
  return n > 0 ? file.check() : 0;
}

int64_t submit(void* self, int64_t id, const pi2_storage_read* reads, int64_t n, int32_t priority,
               pi2_storage_failure* failure) {
  auto* ufs = static_cast<pi2_ufs*>(self);
  const File* file = ufs->find(id);
  *failure = {EBADF, -1};
  if (file == nullptr) return 0;
  failure->code = refuse(*file, reads, n, &failure->offset);
  if (failure->code != 0) return 0;
  auto ops = pi2::plan(*file, {reads, reads + n}, ufs->options.merge, ufs->options.gap,
                       ufs->queue.spares(static_cast<std::size_t>(n)));
  ufs->queue.count_ranges(n, static_cast<int64_t>(ops.size()));
  const bool more = (priority & PI2_STORAGE_MORE) != 0;
  const int64_t ticket = ufs->queue.add(std::move(ops), priority & ~PI2_STORAGE_MORE);
  ufs->held = more;
  if (!more) ufs->engine->wake();
  return ticket;
}

int32_t wait(void* self, int64_t ticket, double seconds, pi2_storage_failure* failure) {
  auto* ufs = static_cast<pi2_ufs*>(self);
  if (ufs->held && ufs->held.exchange(false)) ufs->engine->wake();
  return ufs->queue.wait(ticket, seconds, failure);
}

void cancel(void* self, int64_t ticket) { static_cast<pi2_ufs*>(self)->queue.cancel(ticket); }

}  // namespace

extern "C" int32_t pi2_ufs_uring(void) { return pi2::uring_error(); }

extern "C" pi2_ufs* pi2_ufs_open(const pi2_ufs_options* options, int32_t* error) {
  auto ufs = std::make_unique<pi2_ufs>(*options);
  *error = 0;
  ufs->engine = options->engine == PI2_UFS_URING
                    ? pi2::open_uring(ufs->queue, options->depth, options->cpu, error)
                    : pi2::open_threads(ufs->queue, options->threads, options->cpu);
  return *error == 0 ? ufs.release() : nullptr;
}

extern "C" void pi2_ufs_close(pi2_ufs* ufs) {
  ufs->queue.stop();
  ufs->engine->wake();
  ufs->engine.reset();
  for (auto& file : ufs->files) file->close();
  delete ufs;
}

extern "C" int64_t pi2_ufs_open_file(pi2_ufs* ufs, const char* path) {
  auto file = std::make_unique<File>();
  const pi2_ufs_options& o = ufs->options;
  const int error = file->open(path, o.block, o.engine != PI2_UFS_BUFFERED, o.must_be_direct != 0);
  return ufs->add(std::move(file), error);
}

extern "C" int64_t pi2_ufs_open_descriptor(pi2_ufs* ufs, int32_t descriptor, int64_t size) {
  auto file = std::make_unique<File>();
  const int error = file->adopt(descriptor, size, ufs->options.block);
  return ufs->add(std::move(file), error);
}

extern "C" void pi2_ufs_count(pi2_ufs* ufs, pi2_ufs_counts* counts) {
  *counts = {};
  ufs->queue.count(counts);
  counts->registered_buffers = ufs->engine->registered_buffers();
  counts->registered_files = ufs->engine->registered_files();
  std::lock_guard lock(ufs->mutex);
  for (const auto& file : ufs->files) ++(file->direct ? counts->direct_files : counts->buffered_files);
}

extern "C" const pi2_storage_abi* pi2_ufs_abi(const pi2_ufs* ufs) { return &ufs->abi; }
