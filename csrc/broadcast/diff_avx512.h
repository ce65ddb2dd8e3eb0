// The dense comparisons in AVX-512 with VBMI2 (Zen 4, Ice Lake and later).
#pragma once

#include "broadcast/diff_kernels.h"

#if defined(__x86_64__)
namespace kimisys::broadcast {

// The caller asks the processor for x86-64-v4 and avx512vbmi2.
Comparisons avx512_comparisons();

}  // namespace kimisys::broadcast
#endif
