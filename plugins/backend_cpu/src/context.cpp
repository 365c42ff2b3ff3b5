// Which instruction sets there are, and opening a context on one of them.  Built without instruction set
// flags.
#include "context.h"

#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace {

#if defined(__x86_64__)
// What CPUID says that the CPU has, and XGETBV that the system saves.
struct Features {
  bool avx2 = false, avx512 = false, vnni = false;

  Features() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const unsigned basics = bit_FMA | bit_AVX | bit_OSXSAVE | bit_F16C;
    if ((c & basics) != basics || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    unsigned saved, high;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    constexpr unsigned kYmm = 0x06, kZmm = 0xe6;  // SSE and AVX; with mask registers and both parts of zmm
    avx2 = (saved & kYmm) == kYmm && (b & bit_AVX2);
    avx512 = avx2 && (saved & kZmm) == kZmm && (b & bit_AVX512F) && (b & bit_AVX512BW);
    vnni = avx512 && (c & bit_AVX512VNNI);
#if defined(PI2_EMULATE_AVX512)  // tests/avx512.sh: the kernels are made of other instructions
    avx512 = vnni = avx2;
#endif
  }
};
#endif

// Best first.
std::vector<const pi2::Kernels*> available() {
  std::vector<const pi2::Kernels*> found;
#if defined(__x86_64__)
  const Features cpu;
  if (cpu.vnni) found.push_back(pi2::kernels_avx512_vnni());
  if (cpu.avx512) found.push_back(pi2::kernels_avx512());
  if (cpu.avx2) found.push_back(pi2::kernels_avx2());
#endif
#if defined(__aarch64__)
  const bool dotprod = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
  if (dotprod && (getauxval(AT_HWCAP2) & HWCAP2_I8MM)) found.push_back(pi2::kernels_neon_i8mm());
  if (dotprod) found.push_back(pi2::kernels_neon_dotprod());
  found.push_back(pi2::kernels_neon());
#endif
  found.push_back(pi2::kernels_scalar());
  return found;
}

}  // namespace

extern "C" const char* pi2_cpu_isas(void) {
  static const std::string names = [] {
    std::string joined;
    for (const auto* kernels : available())
      joined += (joined.empty() ? "" : "\n") + std::string(kernels->isa);
    return joined;
  }();
  return names.c_str();
}

extern "C" pi2_cpu* pi2_cpu_open(int32_t threads, const int32_t* cpus, const char* isa, int32_t integer) {
  if (threads < 1) return nullptr;
  if (isa == nullptr) isa = std::getenv("PI2_CPU_ISA");
  for (const auto* kernels : available())
    if (isa == nullptr || std::strcmp(isa, kernels->isa) == 0)
      return new pi2_cpu(kernels, threads, cpus, integer != 0);
  return nullptr;
}

extern "C" void pi2_cpu_close(pi2_cpu* cpu) { delete cpu; }

extern "C" const char* pi2_cpu_isa(const pi2_cpu* cpu) { return cpu->kernels->isa; }
