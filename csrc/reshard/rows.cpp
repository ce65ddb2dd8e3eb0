#include "reshard/rows.h"

#include <cstring>

// Casts are compiled once for each level of vector instructions and picked when the library loads.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define KIMISYS_EACH_VECTOR_LEVEL \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KIMISYS_EACH_VECTOR_LEVEL
#endif

namespace kimisys::reshard {
namespace {

template <std::size_t kItem>
void copy_dense(std::int64_t n, const std::byte* source, std::int64_t /*source_stride*/,
                std::byte* destination, std::int64_t /*destination_stride*/) {
  std::memcpy(destination, source, static_cast<std::size_t>(n) * kItem);
}

template <std::size_t kItem>
void copy_strided(std::int64_t n, const std::byte* source, std::int64_t source_stride,
                  std::byte* destination, std::int64_t destination_stride) {
  for (std::int64_t i = 0; i < n; ++i) {
    std::memcpy(destination + i * destination_stride, source + i * source_stride, kItem);
  }
}

// memcpy of one element is how unaligned loads and stores are written; with constant strides GCC
// vectorises the loop.
template <typename From, typename To, To (*kConvert)(From)>
inline __attribute__((always_inline)) void cast(std::int64_t n, const std::byte* source,
                                                std::int64_t source_stride, std::byte* destination,
                                                std::int64_t destination_stride) {
  for (std::int64_t i = 0; i < n; ++i) {
    From value;
    std::memcpy(&value, source + i * source_stride, sizeof(From));
    const To converted = kConvert(value);
    std::memcpy(destination + i * destination_stride, &converted, sizeof(To));
  }
}

KIMISYS_EACH_VECTOR_LEVEL
void narrow_dense(std::int64_t n, const std::byte* __restrict source, std::int64_t,
                  std::byte* __restrict destination, std::int64_t) {
  cast<std::uint32_t, std::uint16_t, bfloat16_bits>(n, source, 4, destination, 2);
}

KIMISYS_EACH_VECTOR_LEVEL
void widen_dense(std::int64_t n, const std::byte* __restrict source, std::int64_t,
                 std::byte* __restrict destination, std::int64_t) {
  cast<std::uint16_t, std::uint32_t, float32_bits>(n, source, 2, destination, 4);
}

template <std::size_t kItem>
Row copy_row(bool dense) {
  return dense ? copy_dense<kItem> : copy_strided<kItem>;
}

}  // namespace

Row choose_row(DType from, DType to, bool dense) {
  if (from != to) {
    if (from == DType::kFloat32) {
      return dense ? narrow_dense : cast<std::uint32_t, std::uint16_t, bfloat16_bits>;
    }
    return dense ? widen_dense : cast<std::uint16_t, std::uint32_t, float32_bits>;
  }
  switch (itemsize(from)) {
    case 1:
      return copy_row<1>(dense);
    case 2:
      return copy_row<2>(dense);
    case 4:
      return copy_row<4>(dense);
    default:
      return copy_row<8>(dense);
  }
}

}  // namespace kimisys::reshard
