// The inner loops of the digest, one set per instruction set. All give the same sums.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kimisys::broadcast {

// The sum mod 2^64 of mix over `count` elements: element i lies at data + i * byte_stride (any
// alignment) and has the counter `counter + i * step`.
using RunSum = std::uint64_t (*)(const std::byte* data, std::int64_t count,
                                 std::int64_t byte_stride, std::uint64_t counter,
                                 std::uint64_t step);

struct DigestKernel {
  const char* name;
  std::array<RunSum, 4> by_width;  // elements of 1, 2, 4, 8 bytes
};

// The kernels that this processor can run, fastest first.
std::span<const DigestKernel> digest_kernels();

}  // namespace kimisys::broadcast
