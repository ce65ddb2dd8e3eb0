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
inline __attribute__((always_inline)) void copy_strided(std::int64_t n, const std::byte* source,
                                                        std::int64_t source_stride,
                                                        std::byte* destination,
                                                        std::int64_t destination_stride) {
  for (std::int64_t i = 0; i < n; ++i) {
    std::memcpy(destination + i * destination_stride, source + i * source_stride, kItem);
  }
}

// Every other element (interleaved pairs) is frequent enough for a loop with constant strides.
template <std::size_t kItem>
void copy_gathered(std::int64_t n, const std::byte* __restrict source, std::int64_t source_stride,
                   std::byte* __restrict destination, std::int64_t /*destination_stride*/) {
  constexpr auto kStride = static_cast<std::int64_t>(kItem);
  if (source_stride == 2 * kStride) {
    copy_strided<kItem>(n, source, 2 * kStride, destination, kStride);
  } else {
    copy_strided<kItem>(n, source, source_stride, destination, kStride);
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

// Any row that writes elements of kItem bytes, by way of a piece of the first-level cache that is
// streamed from there.
template <Row kRow, Stream kStream, std::int64_t kItem>
void through_cache(std::int64_t n, const std::byte* source, std::int64_t source_stride,
                   std::byte* destination, std::int64_t) {
  constexpr std::int64_t kPiece = 1024;
  alignas(64) std::array<std::byte, kPiece * kItem> piece;
  for (std::int64_t i = 0; i < n; i += kPiece) {
    const std::int64_t count = std::min(kPiece, n - i);
    kRow(count, source + i * source_stride, source_stride, piece.data(), kItem);
    kStream(destination + i * kItem, piece.data(), static_cast<std::size_t>(count * kItem));
  }
}

KIMISYS_DENSE_CASTS(Generic, );

constexpr Rows kStrided = {cast<std::uint32_t, std::uint16_t, bfloat16_bits>,
                           cast<std::uint16_t, std::uint32_t, float32_bits>,
                           {copy_strided<1>, copy_strided<2>, copy_strided<4>, copy_strided<8>}};

constexpr Rows kGathered = {
    through_cache<cast<std::uint32_t, std::uint16_t, bfloat16_bits>, stream_bytes, 2>,
    through_cache<cast<std::uint16_t, std::uint32_t, float32_bits>, stream_bytes, 4>,
    {through_cache<copy_gathered<1>, stream_bytes, 1>,
     through_cache<copy_gathered<2>, stream_bytes, 2>,
     through_cache<copy_gathered<4>, stream_bytes, 4>,
     through_cache<copy_gathered<8>, stream_bytes, 8>}};

template <typename Casts>
constexpr Rows kDense = {
    Casts::narrow, Casts::widen, {copy_dense<1>, copy_dense<2>, copy_dense<4>, copy_dense<8>}};

template <typename Casts, Stream kStream>
constexpr Rows kStreaming = {through_cache<Casts::narrow, kStream, 2>,
                             through_cache<Casts::widen, kStream, 4>,
                             {copy_streaming<kStream, 1>, copy_streaming<kStream, 2>,
                              copy_streaming<kStream, 4>, copy_streaming<kStream, 8>}};

template <typename Casts, Stream kStream>
constexpr RowSet make_row_set(std::string_view name) {
  return {name, {kStrided, kGathered, kDense<Casts>, kStreaming<Casts, kStream>}};
}

#if defined(__x86_64__)
KIMISYS_DENSE_CASTS(Avx2, __attribute__((target("arch=x86-64-v3"))));
KIMISYS_DENSE_CASTS(Avx512, __attribute__((target("arch=x86-64-v4"))));

// A cast streamed from registers where the destination's elements lie whole in its lines.
template <Stream kCast, Row kOtherwise, std::size_t kItem>
void from_registers(std::int64_t n, const std::byte* source, std::int64_t source_stride,
                    std::byte* destination, std::int64_t destination_stride) {
  if (reinterpret_cast<std::uintptr_t>(destination) % kItem != 0) {
    return kOtherwise(n, source, source_stride, destination, destination_stride);
  }
  kCast(destination, source, static_cast<std::size_t>(n));
}

RowSet make_avx512() {
  RowSet set = make_row_set<Avx512, stream_bytes_avx512>("avx512");
  Rows& streaming = set.kinds[static_cast<std::size_t>(RowKind::kStreaming)];
  streaming.narrow = from_registers<stream_narrow_avx512,
                                    through_cache<Avx512::narrow, stream_bytes_avx512, 2>, 2>;
  streaming.widen =
      from_registers<stream_widen_avx512, through_cache<Avx512::widen, stream_bytes_avx512, 4>, 4>;
  return set;
}

std::vector<RowSet> supported_row_sets() {
  std::vector<RowSet> sets;
  if (__builtin_cpu_supports("x86-64-v4")) sets.push_back(make_avx512());
  if (__builtin_cpu_supports("x86-64-v3")) {
    sets.push_back(make_row_set<Avx2, stream_bytes>("avx2"));
  }
  sets.push_back(make_row_set<Generic, stream_bytes>("generic"));
  return sets;
}
#else
std::vector<RowSet> supported_row_sets() {
  return {make_row_set<Generic, stream_bytes>("generic")};
}
#endif

}  // namespace

std::span<const RowSet> row_sets() {
  static const std::vector<RowSet> sets = supported_row_sets();
  return sets;
}

Row choose_row(DType from, DType to, RowKind kind, const RowSet& set) {
  const Rows& rows = set.kinds[static_cast<std::size_t>(kind)];
  if (from != to) return from == DType::kFloat32 ? rows.narrow : rows.widen;
  const auto item = static_cast<unsigned>(itemsize(from));
  return rows.copy[static_cast<std::size_t>(std::countr_zero(item))];
}

}  // namespace kimisys::reshard
