/* The C interface of pi2's flash reader: what ctypes calls.  Reads themselves go through pi2_abi.h. */
#ifndef PI2_UFS_H
#define PI2_UFS_H
#include "pi2_abi.h"

#define PI2_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum pi2_ufs_engine { PI2_UFS_URING = 0, PI2_UFS_THREADS = 1, PI2_UFS_BUFFERED = 2 };

typedef struct pi2_ufs pi2_ufs;

typedef struct { /* A flash device to pretend; bytes and bytes per second (README.md says where from) */
  double sequential_small, sequential_large; /* at 4 KiB and at 512 KiB */
  double random_small, random_large;
  double near_range, far_range, far_factor; /* random reads slow down as the range they fall in grows */
  double queues_factor;                     /* when more than one thread issues */
  double core_factor;                       /* the issuing core's share of the biggest core's bandwidth */
} pi2_ufs_model;

typedef struct {
  int32_t engine, depth, threads; /* depth: reads in flight (uring); threads: of the pool (others) */
  int32_t must_be_direct;         /* != 0: a file system that refuses O_DIRECT is an error */
  int32_t cpu;                    /* the core that the reading threads are pinned to; -1: none */
  int64_t block, merge;           /* bytes: least read (power of two), largest merged read */
  int64_t gap;                    /* bytes that nobody wants, read along between two short reads */
  double deadline;                /* seconds: how long a wait "for ever" is */
  const pi2_ufs_model* model;     /* NULL: as fast as the device is */
} pi2_ufs_options;

typedef struct {
  int64_t ranges, reads, merged, bytes; /* asked for, sent to the kernel, saved by merging, read */
  int64_t direct_files, buffered_files;
  int64_t registered_buffers, registered_files; /* 1: the kernel took them */
} pi2_ufs_counts;

/* 0, or the errno with which the kernel refuses io_uring. */
PI2_API int32_t pi2_ufs_uring(void);

/* NULL with *error set (an errno) if the engine is not to be had. */
PI2_API pi2_ufs* pi2_ufs_open(const pi2_ufs_options* options, int32_t* error);
/* Cancels what has not started, waits for the rest.  Nobody may be inside of another call. */
PI2_API void pi2_ufs_close(pi2_ufs* ufs);

/* Handles >= 0, or -errno.  The second takes over a descriptor of something that has `size` bytes, as
 * Android's content providers give. */
PI2_API int64_t pi2_ufs_open_file(pi2_ufs* ufs, const char* path);
PI2_API int64_t pi2_ufs_open_descriptor(pi2_ufs* ufs, int32_t descriptor, int64_t size);

PI2_API void pi2_ufs_count(pi2_ufs* ufs, pi2_ufs_counts* counts);
PI2_API const pi2_storage_abi* pi2_ufs_abi(const pi2_ufs* ufs);

/* The model alone, on a clock of the caller's: when a read that starts at `now` would be done. */
typedef struct pi2_ufs_device pi2_ufs_device;
PI2_API pi2_ufs_device* pi2_ufs_device_open(const pi2_ufs_model* model, int32_t queues);
PI2_API void pi2_ufs_device_close(pi2_ufs_device* device);
PI2_API double pi2_ufs_device_read(pi2_ufs_device* device, double now, int64_t file, int64_t offset,
                                   int64_t nbytes);

#ifdef __cplusplus
}
#endif
#endif
