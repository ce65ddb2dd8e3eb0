#include "reshard/rows.h"

#include <algorithm>
#include <array>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
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

// The two dense casts for one set of instructions; GCC vectorises them with what `target` allows.
#define KIMISYS_DENSE_CASTS(Name, target)                                                       \
  struct Name {                                                                                 \
    target static void narrow(std::int64_t n, const std::byte* __restrict source, std::int64_t, \
                              std::byte* __restrict destination, std::int64_t) {                \
      cast<std::uint32_t, std::uint16_t, bfloat16_bits>(n, source, 4, destination, 2);          \
    }                                                                                           \
    target static void widen(std::int64_t n, const std::byte* __restrict source, std::int64_t,  \
                             std::byte* __restrict destination, std::int64_t) {                 \
      cast<std::uint16_t, std::uint32_t, float32_bits>(n, source, 2, destination, 4);           \
    }                                                                                           \
  }

KIMISYS_DENSE_CASTS(Portable, );
#if defined(__x86_64__)
KIMISYS_DENSE_CASTS(Avx2, __attribute__((target("arch=x86-64-v3"))));
KIMISYS_DENSE_CASTS(Avx512, __attribute__((target("arch=x86-64-v4"))));

Row best_dense_cast(Row portable, Row avx2, Row avx512) {
  if (__builtin_cpu_supports("x86-64-v4")) return avx512;
  return __builtin_cpu_supports("x86-64-v3") ? avx2 : portable;
}
const Row kNarrow = best_dense_cast(Portable::narrow, Avx2::narrow, Avx512::narrow);
const Row kWiden = best_dense_cast(Portable::widen, Avx2::widen, Avx512::widen);
#else
const Row kNarrow = Portable::narrow;
const Row kWiden = Portable::widen;
#endif

#if defined(__SSE2__)
// A plain store first reads the line it writes into; a streaming store does not, which saves a
// third of the memory traffic of a copy.
void stream_bytes(std::byte* destination, const std::byte* source, std::size_t n) {
  constexpr std::size_t kVector = sizeof(__m128i);
  constexpr std::size_t kLine = 4;  // vectors of one cache line
  const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(destination) % kVector;
  const std::size_t head = std::min(n, misaligned == 0 ? 0 : kVector - misaligned);
  std::memcpy(destination, source, head);
  const auto* from = reinterpret_cast<const __m128i*>(source + head);
  auto* to = reinterpret_cast<__m128i*>(destination + head);
  const std::size_t vectors = (n - head) / kVector;
  std::size_t i = 0;
  for (; i + kLine <= vectors; i += kLine) {
    __m128i line[kLine];
    for (std::size_t k = 0; k < kLine; ++k) line[k] = _mm_loadu_si128(from + i + k);
    for (std::size_t k = 0; k < kLine; ++k) _mm_stream_si128(to + i + k, line[k]);
  }
  for (; i < vectors; ++i) _mm_stream_si128(to + i, _mm_loadu_si128(from + i));
  const std::size_t done = head + vectors * kVector;
  std::memcpy(destination + done, source + done, n - done);
}
#else
void stream_bytes(std::byte* destination, const std::byte* source, std::size_t n) {
  std::memcpy(destination, source, n);
}
#endif

template <std::size_t kItem>
void copy_streaming(std::int64_t n, const std::byte* source, std::int64_t, std::byte* destination,
                    std::int64_t) {
  stream_bytes(destination, source, static_cast<std::size_t>(n) * kItem);
}

// Casts into a piece of the first-level cache and streams from there.
template <const Row& kCast, std::int64_t kFrom, std::int64_t kTo>
void cast_streaming(std::int64_t n, const std::byte* source, std::int64_t, std::byte* destination,
                    std::int64_t) {
  constexpr std::int64_t kPiece = 1024;
  alignas(64) std::array<std::byte, kPiece * kTo> piece;
  for (std::int64_t i = 0; i < n; i += kPiece) {
    const std::int64_t count = std::min(kPiece, n - i);
    kCast(count, source + i * kFrom, kFrom, piece.data(), kTo);
    stream_bytes(destination + i * kTo, piece.data(), static_cast<std::size_t>(count * kTo));
  }
}

template <std::size_t kItem>
Row copy_row(RowKind kind) {
  if (kind == RowKind::kStrided) return copy_strided<kItem>;
  return kind == RowKind::kDense ? copy_dense<kItem> : copy_streaming<kItem>;
}

Row narrow_row(RowKind kind) {
  if (kind == RowKind::kStrided) return cast<std::uint32_t, std::uint16_t, bfloat16_bits>;
  return kind == RowKind::kDense ? kNarrow : cast_streaming<kNarrow, 4, 2>;
}

Row widen_row(RowKind kind) {
  if (kind == RowKind::kStrided) return cast<std::uint16_t, std::uint32_t, float32_bits>;
  return kind == RowKind::kDense ? kWiden : cast_streaming<kWiden, 2, 4>;
}

}  // namespace

Row choose_row(DType from, DType to, RowKind kind) {
  if (from != to) return from == DType::kFloat32 ? narrow_row(kind) : widen_row(kind);
  switch (itemsize(from)) {
    case 1:
      return copy_row<1>(kind);
    case 2:
      return copy_row<2>(kind);
    case 4:
      return copy_row<4>(kind);
    default:
      return copy_row<8>(kind);
  }
}

void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace kimisys::reshard
