// A model of a flash device: how long a read takes (PowerInfer-2 §2.3.2, one command queue).
#pragma once
#include <array>
#include <cstddef>

#include "pi2_ufs.h"

struct pi2_ufs_device {
  pi2_ufs_device(const pi2_ufs_model& model, int queues) : model_(model), queues_(queues) {}

  // Reads are served one after the other: the moment at which this one is done, seconds on the caller's
  // clock.
  double read(double now, int64_t file, int64_t offset, int64_t nbytes);

 private:
  double bandwidth(int64_t file, int64_t offset, int64_t nbytes) const;
  double span(int64_t file, int64_t offset) const;

  struct Seen {
    int64_t file = -1, offset = 0, end = 0;
  };
  pi2_ufs_model model_;
  int queues_;
  double free_ = 0;                // when the queue is empty again
  std::array<Seen, 64> recent_{};  // what the data range is the range of
  std::size_t last_ = 0;
};
