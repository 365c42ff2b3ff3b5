/* The fast road between native plugins: versioned structs of function pointers, passed as addresses.
 *
 * A storage tier hands out the address of a pi2_storage_abi (pi2.powers.SupportsStorageAbi); a native
 * consumer checks `version`, and reads through it without Python in between.  Every function is thread-safe.
 * The struct is valid until the tier is closed.
 */
#ifndef PI2_ABI_H
#define PI2_ABI_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { PI2_STORAGE_ABI_VERSION = 1 };
enum { PI2_STORAGE_DEMAND = 0, PI2_STORAGE_PREFETCH = 1 }; /* priorities: lower goes first */
/* To be added to a priority: another submit follows at once.  The tier need not start before that, or before
 * somebody waits: one thread that is woken for many reads is cheaper than one that is woken for each. */
enum { PI2_STORAGE_MORE = 1 << 8 };
enum { PI2_STORAGE_PENDING = -1 };

typedef struct {
  int64_t offset, nbytes; /* in the file */
  uint8_t* into;          /* nbytes of the caller's; the reads of one submit may not overlap in memory */
} pi2_storage_read;

typedef struct {
  int32_t
      code; /* 0, or an errno; ENODATA: the file ends before the read; ESTALE: it was changed or replaced */
  int64_t offset; /* where in the file; -1: nowhere in particular */
} pi2_storage_failure;

typedef struct {
  uint32_t version; /* PI2_STORAGE_ABI_VERSION */
  uint32_t size;    /* sizeof(pi2_storage_abi) of the provider */
  void* self;       /* first argument of every function */

  /* Starts n reads of a file (a handle of StorageTier.open_file) and returns a ticket > 0, or 0 with
   * `failure` filled if a read lies outside of the file.  `into` belongs to the reads until the ticket is
   * spent; `reads` does not. */
  int64_t (*submit)(void* self, int64_t file, const pi2_storage_read* reads, int64_t n, int32_t priority,
                    pi2_storage_failure* failure);

  /* Waits at most `seconds` (0: polls; negative: as long as the tier thinks that a device may take).
   * PI2_STORAGE_PENDING: still reading; ETIMEDOUT: the device hangs, and `into` may never be used again;
   * else the ticket is spent and the result is failure->code: 0 means that every byte is there. */
  int32_t (*wait)(void* self, int64_t ticket, double seconds, pi2_storage_failure* failure);

  /* Drops what has not started; the ticket must still be waited for, and tells ECANCELED unless all was read.
   */
  void (*cancel)(void* self, int64_t ticket);
} pi2_storage_abi;

#ifdef __cplusplus
}
#endif
#endif
