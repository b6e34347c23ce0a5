// Chooses the kernels for the CPU that the process runs on. Compiled for the machine's baseline, unlike the kernels.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace warpform::cpu {

#if defined(WARPFORM_CPU_X86)
namespace v3 {
extern const Kernels kKernels;
}
namespace v4 {
extern const Kernels kKernels;
}
#elif defined(WARPFORM_CPU_AARCH64)
namespace neon {
extern const Kernels kKernels;
}
#endif

namespace {

struct Choice {
  const Kernels* kernels;
  const char* missing;
};

Choice choose() {
  const char* wanted = std::getenv("WARPFORM_CPU_ISA");
  const auto allows = [&](const char* name) {
    return wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, name) == 0;
  };
  if (!allows("0") || wanted == nullptr || *wanted == '\0') {
#if defined(WARPFORM_CPU_X86)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("lzcnt");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4 && allows("v4")) return {&v4::kKernels, nullptr};
    // v4 asks for at most that: a CPU without AVX-512 takes v3.
    if (v3 && (allows("v3") || allows("v4"))) return {&v3::kKernels, nullptr};
    if (!v3) return {nullptr, "this CPU has no AVX2, which the CPU kernels need"};
#elif defined(WARPFORM_CPU_AARCH64)
    if (allows("neon")) return {&neon::kKernels, nullptr};
#else
    return {nullptr, "warpform was built without CPU kernels for this kind of processor"};
#endif
  }
  return {nullptr, "WARPFORM_CPU_ISA names none of the CPU kernels"};
}

const Choice& choice() {
  static const Choice made = choose();
  return made;
}

}  // namespace

const Kernels* kernels() { return choice().kernels; }
const char* kernels_missing() { return choice().missing; }

}  // namespace warpform::cpu
