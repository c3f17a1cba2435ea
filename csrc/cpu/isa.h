// The instruction sets that the kernels are compiled for, and the choice among them on the processor at hand.
#pragma once

#include <cstdlib>
#include <cstring>

namespace resnet_fused {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

// The best set that both the processor and this build have.
static inline Isa detected_isa() {
#if defined(RESNET_FUSED_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  // Every processor with AVX2 has F16C, which older compilers cannot ask for.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

// detected_isa(), lowered (never raised) by RESNET_FUSED_CPU_CAPABILITY=baseline|avx2|avx512|avx512_bf16.
static inline Isa selected_isa() {
  const Isa best = detected_isa();
  const char* wish = std::getenv("RESNET_FUSED_CPU_CAPABILITY");
  if (wish != nullptr)
    for (int i = 0; i < static_cast<int>(best); ++i)
      if (std::strcmp(wish, kIsaNames[i]) == 0) return static_cast<Isa>(i);
  return best;
}

}  // namespace resnet_fused
