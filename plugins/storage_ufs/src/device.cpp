#include "device.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr double kSmall = 4096, kLarge = 512 * 1024;

// A straight line in log(x), from y0 at x0 to y1 at x1, level outside.
double between(double x, double x0, double x1, double y0, double y1) {
  if (x1 <= x0) return x <= x0 ? y0 : y1;
  const double t = std::clamp(std::log(x / x0) / std::log(x1 / x0), 0.0, 1.0);
  return y0 * std::pow(y1 / y0, t);
}

}  // namespace

// The distance that recent reads of this file and the new one span.
double pi2_ufs_device::span(int64_t file, int64_t offset) const {
  int64_t low = offset, high = offset;
  for (const Seen& seen : recent_) {
    if (seen.file != file) continue;
    low = std::min(low, seen.offset);
    high = std::max(high, seen.offset);
  }
  return static_cast<double>(high - low);
}

double pi2_ufs_device::bandwidth(int64_t file, int64_t offset, int64_t nbytes) const {
  const double size = std::clamp(static_cast<double>(nbytes), kSmall, kLarge);
  const Seen& last = recent_[last_];
  double speed;
  if (last.file == file && last.end == offset) {
    speed = between(size, kSmall, kLarge, model_.sequential_small, model_.sequential_large);
  } else {
    speed = between(size, kSmall, kLarge, model_.random_small, model_.random_large);
    const double range = std::max(span(file, offset), 1.0);
    speed *= between(range, model_.near_range, model_.far_range, 1.0, model_.far_factor);
  }
  return speed * model_.core_factor * (queues_ > 1 ? model_.queues_factor : 1.0);
}

double pi2_ufs_device::read(double now, int64_t file, int64_t offset, int64_t nbytes) {
  // less than 4 KiB takes as long as 4 KiB
  const double bytes = std::max(static_cast<double>(nbytes), kSmall);
  free_ = std::max(now, free_) + bytes / bandwidth(file, offset, nbytes);
  last_ = (last_ + 1) % recent_.size();
  recent_[last_] = {file, offset, offset + nbytes};
  return free_;
}

extern "C" pi2_ufs_device* pi2_ufs_device_open(const pi2_ufs_model* model, int32_t queues) {
  return new pi2_ufs_device(*model, queues);
}

extern "C" void pi2_ufs_device_close(pi2_ufs_device* device) { delete device; }

extern "C" double pi2_ufs_device_read(pi2_ufs_device* device, double now, int64_t file, int64_t offset,
                                      int64_t nbytes) {
  return device->read(now, file, offset, nbytes);
}
