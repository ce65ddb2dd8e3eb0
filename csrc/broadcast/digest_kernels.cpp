#include "broadcast/digest_kernels.h"

#include <cstring>
#include <vector>

#include "broadcast/mix.h"

namespace kimisys::broadcast {
namespace {

template <typename Word>
[[gnu::always_inline]] inline std::uint64_t sum_run(const std::byte* data, std::int64_t count,
                                                    std::int64_t byte_stride, std::uint64_t counter,
                                                    std::uint64_t step) {
  std::uint64_t sum = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    Word bits;
    std::memcpy(&bits, data + i * byte_stride, sizeof(Word));
    sum += mix(counter, sizeof(Word) == 8 ? fold(bits) : bits);
    counter += step;
  }
  return sum;
}

// A dense run is told apart at compile time: with a known stride the compiler vectorises the loads.
template <typename Word>
[[gnu::always_inline]] inline std::uint64_t sum_any(const std::byte* data, std::int64_t count,
                                                    std::int64_t byte_stride, std::uint64_t counter,
                                                    std::uint64_t step) {
  constexpr auto kDense = static_cast<std::int64_t>(sizeof(Word));
  if (byte_stride == kDense) return sum_run<Word>(data, count, kDense, counter, step);
  return sum_run<Word>(data, count, byte_stride, counter, step);
}

// The same loop compiled for one instruction set under one name.
#define KIMISYS_DIGEST_KERNEL(Name, text, attribute)                                            \
  struct Name {                                                                                 \
    template <typename Word>                                                                    \
    attribute static std::uint64_t sum(const std::byte* data, std::int64_t count,               \
                                       std::int64_t byte_stride, std::uint64_t counter,         \
                                       std::uint64_t step) {                                    \
      return sum_any<Word>(data, count, byte_stride, counter, step);                            \
    }                                                                                           \
    static constexpr DigestKernel kernel() {                                                    \
      return {                                                                                  \
          text,                                                                                 \
          {&sum<std::uint8_t>, &sum<std::uint16_t>, &sum<std::uint32_t>, &sum<std::uint64_t>}}; \
    }                                                                                           \
  }

KIMISYS_DIGEST_KERNEL(Generic, "generic", );

#if defined(__x86_64__)
KIMISYS_DIGEST_KERNEL(Avx2, "avx2", __attribute__((target("arch=x86-64-v3"))));
KIMISYS_DIGEST_KERNEL(Avx512, "avx512", __attribute__((target("arch=x86-64-v4"))));

std::vector<DigestKernel> supported_kernels() {
  std::vector<DigestKernel> kernels;
  if (__builtin_cpu_supports("x86-64-v4")) kernels.push_back(Avx512::kernel());
  if (__builtin_cpu_supports("x86-64-v3")) kernels.push_back(Avx2::kernel());
  kernels.push_back(Generic::kernel());
  return kernels;
}
#else
std::vector<DigestKernel> supported_kernels() { return {Generic::kernel()}; }
#endif

}  // namespace

std::span<const DigestKernel> digest_kernels() {
  static const std::vector<DigestKernel> kernels = supported_kernels();
  return kernels;
}

}  // namespace kimisys::broadcast
