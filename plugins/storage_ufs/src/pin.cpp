// Which core reads: flash is slower when a little core asks for it (PowerInfer-2 §2.3.2, table 1).
#include "engine.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace pi2 {

#if defined(__linux__)

void pin(int cpu) {
  if (cpu < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  sched_setaffinity(0, sizeof set, &set);  // of this thread
}

#else

void pin(int) {}

#endif

}  // namespace pi2
