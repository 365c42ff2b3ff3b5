// Hammers the C interface under a sanitizer: `stress kernels [calls]` (address, undefined), `stress pool
// [contexts]` (thread), `stress streams [streams]` (both).
#include "data.h"

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const int64_t count = argc > 2 ? std::atoll(argv[2]) : 0;
  if (mode == "kernels" && count > 0) stress_kernels(count);
  else if (mode == "pool" && count > 0) stress_pool(count);
  else if (mode == "streams" && count > 0) stress_streams(count);
  else fail("usage: stress kernels|pool|streams COUNT");
}
