#include "reshard/rows.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <vector>

#include "reshard/stream.h"

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

using Stream = void (*)(std::byte* destination, const std::byte* source, std::size_t nbytes);

template <Stream kStream, std::size_t kItem>
void copy_streaming(std::int64_t n, const std::byte* source, std::int64_t, std::byte* destination,
                    std::int64_t) {
  kStream(destination, source, static_cast<std::size_t>(n) * kItem);
}

template <Stream kStream>
constexpr std::array<Row, 4> kStreamingCopy = {
    copy_streaming<kStream, 1>, copy_streaming<kStream, 2>, copy_streaming<kStream, 4>,
    copy_streaming<kStream, 8>};

// Casts into a piece of the first-level cache and streams from there.
template <Row kCast, std::int64_t kFrom, std::int64_t kTo>
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

template <typename Casts>
constexpr RowSet make_row_set(std::string_view name) {
  return {name,
          {Casts::narrow, Casts::widen},
          {cast_streaming<Casts::narrow, 4, 2>, cast_streaming<Casts::widen, 2, 4>},
          kStreamingCopy<stream_bytes>};
}

KIMISYS_DENSE_CASTS(Generic, );
#if defined(__x86_64__)
KIMISYS_DENSE_CASTS(Avx2, __attribute__((target("arch=x86-64-v3"))));
KIMISYS_DENSE_CASTS(Avx512, __attribute__((target("arch=x86-64-v4"))));

// Casts streamed from registers where the destination's elements lie whole in its lines.
template <Stream kStream, Row kOtherwise, std::size_t kTo>
void cast_in_lines(std::int64_t n, const std::byte* source, std::int64_t source_stride,
                   std::byte* destination, std::int64_t destination_stride) {
  if (reinterpret_cast<std::uintptr_t>(destination) % kTo != 0) {
    return kOtherwise(n, source, source_stride, destination, destination_stride);
  }
  kStream(destination, source, static_cast<std::size_t>(n));
}

std::vector<RowSet> supported_row_sets() {
  std::vector<RowSet> sets;
  if (__builtin_cpu_supports("x86-64-v4")) {
    RowSet set = make_row_set<Avx512>("avx512");
    set.streaming = {cast_in_lines<stream_narrow_avx512, cast_streaming<Avx512::narrow, 4, 2>, 2>,
                     cast_in_lines<stream_widen_avx512, cast_streaming<Avx512::widen, 2, 4>, 4>};
    set.streaming_copy = kStreamingCopy<stream_bytes_avx512>;
    sets.push_back(set);
  }
  if (__builtin_cpu_supports("x86-64-v3")) sets.push_back(make_row_set<Avx2>("avx2"));
  sets.push_back(make_row_set<Generic>("generic"));
  return sets;
}
#else
std::vector<RowSet> supported_row_sets() { return {make_row_set<Generic>("generic")}; }
#endif

constexpr RowSet::Casts kStridedCasts = {cast<std::uint32_t, std::uint16_t, bfloat16_bits>,
                                         cast<std::uint16_t, std::uint32_t, float32_bits>};
constexpr std::array<Row, 4> kStridedCopy = {copy_strided<1>, copy_strided<2>, copy_strided<4>,
                                             copy_strided<8>};
constexpr std::array<Row, 4> kDenseCopy = {copy_dense<1>, copy_dense<2>, copy_dense<4>,
                                           copy_dense<8>};

}  // namespace

std::span<const RowSet> row_sets() {
  static const std::vector<RowSet> sets = supported_row_sets();
  return sets;
}

Row choose_row(DType from, DType to, RowKind kind, const RowSet& set) {
  if (from != to) {
    const RowSet::Casts& casts = kind == RowKind::kStrided ? kStridedCasts
                                 : kind == RowKind::kDense ? set.dense
                                                           : set.streaming;
    return from == DType::kFloat32 ? casts.narrow : casts.widen;
  }
  const std::array<Row, 4>& copies = kind == RowKind::kStrided ? kStridedCopy
                                     : kind == RowKind::kDense ? kDenseCopy
                                                               : set.streaming_copy;
  return copies[static_cast<std::size_t>(std::countr_zero(static_cast<unsigned>(itemsize(from))))];
}

}  // namespace kimisys::reshard
