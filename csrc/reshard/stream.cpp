#include "reshard/stream.h"

#include <algorithm>
#include <cstring>

#include "base/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kimisys::reshard {
namespace {

[[maybe_unused]] constexpr std::size_t kLineBytes = 64;

// Bytes before the next cache line.
[[maybe_unused]] std::size_t bytes_to_line(const std::byte* address) {
  return (kLineBytes - reinterpret_cast<std::uintptr_t>(address) % kLineBytes) % kLineBytes;
}

}  // namespace

#if defined(__SSE2__)
void stream_bytes(std::byte* destination, const std::byte* source, std::size_t nbytes) {
  constexpr std::size_t kVectors = kLineBytes / sizeof(__m128i);
  std::size_t i = std::min(nbytes, bytes_to_line(destination));
  std::memcpy(destination, source, i);
  for (; i + kLineBytes <= nbytes; i += kLineBytes) {
    const auto* from = reinterpret_cast<const __m128i*>(source + i);
    auto* to = reinterpret_cast<__m128i*>(destination + i);
    __m128i line[kVectors];
    for (std::size_t k = 0; k < kVectors; ++k) line[k] = _mm_loadu_si128(from + k);
    for (std::size_t k = 0; k < kVectors; ++k) _mm_stream_si128(to + k, line[k]);
  }
  // A part of a line, streamed, would cost a write of its own: it goes through the caches.
  std::memcpy(destination + i, source + i, nbytes - i);
}

void finish_streaming() { _mm_sfence(); }
#else
void stream_bytes(std::byte* destination, const std::byte* source, std::size_t nbytes) {
  std::memcpy(destination, source, nbytes);
}

void finish_streaming() {}
#endif

#if defined(__x86_64__)
#define KIMISYS_AVX512 __attribute__((target("arch=x86-64-v4")))

namespace {

void narrow_one(std::byte* destination, const std::byte* source) {
  std::uint32_t wide = 0;
  std::memcpy(&wide, source, sizeof(wide));
  const std::uint16_t narrow = bfloat16_bits(wide);
  std::memcpy(destination, &narrow, sizeof(narrow));
}

void widen_one(std::byte* destination, const std::byte* source) {
  std::uint16_t narrow = 0;
  std::memcpy(&narrow, source, sizeof(narrow));
  const std::uint32_t wide = float32_bits(narrow);
  std::memcpy(destination, &wide, sizeof(wide));
}

// GCC's vectors rather than intrinsics: the rounding then reads as in bfloat16_bits. 16 elements.
using Wide = std::uint32_t __attribute__((vector_size(64)));
using Narrow = std::uint16_t __attribute__((vector_size(32)));

KIMISYS_AVX512 Narrow narrow_16(const std::byte* source) {
  Wide bits;
  std::memcpy(&bits, source, sizeof(bits));
  const Wide rounded = (bits + 0x7fffU + ((bits >> 16U) & 1U)) >> 16U;
  const Wide quiet = Wide{} + 0x7fc0U;
  return __builtin_convertvector((bits & 0x7fffffffU) > 0x7f800000U ? quiet : rounded, Narrow);
}

KIMISYS_AVX512 Wide widen_16(const std::byte* source) {
  Narrow bits;
  std::memcpy(&bits, source, sizeof(bits));
  return __builtin_convertvector(bits, Wide) << 16U;
}

}  // namespace

KIMISYS_AVX512 void stream_bytes_avx512(std::byte* destination, const std::byte* source,
                                        std::size_t nbytes) {
  std::size_t i = std::min(nbytes, bytes_to_line(destination));
  if (i != 0) std::memcpy(destination, source, i);
  for (; i + kLineBytes <= nbytes; i += kLineBytes) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(destination + i),
                        _mm512_loadu_si512(source + i));
  }
  if (i != nbytes) std::memcpy(destination + i, source + i, nbytes - i);
}

KIMISYS_AVX512 void stream_narrow_avx512(std::byte* destination, const std::byte* source,
                                         std::size_t n) {
  constexpr std::size_t kLine = kLineBytes / 2;
  const std::size_t head = std::min(n, bytes_to_line(destination) / 2);
  std::size_t i = 0;
  for (; i < head; ++i) narrow_one(destination + 2 * i, source + 4 * i);
  for (; i + kLine <= n; i += kLine) {
    const Narrow left = narrow_16(source + 4 * i);
    const Narrow right = narrow_16(source + 4 * i + sizeof(Wide));
    auto* line = reinterpret_cast<__m256i*>(destination + 2 * i);
    _mm256_stream_si256(line, reinterpret_cast<__m256i>(left));
    _mm256_stream_si256(line + 1, reinterpret_cast<__m256i>(right));
  }
  for (; i < n; ++i) narrow_one(destination + 2 * i, source + 4 * i);
}

KIMISYS_AVX512 void stream_widen_avx512(std::byte* destination, const std::byte* source,
                                        std::size_t n) {
  constexpr std::size_t kLine = kLineBytes / 4;
  const std::size_t head = std::min(n, bytes_to_line(destination) / 4);
  std::size_t i = 0;
  for (; i < head; ++i) widen_one(destination + 4 * i, source + 2 * i);
  for (; i + kLine <= n; i += kLine) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(destination + 4 * i),
                        reinterpret_cast<__m512i>(widen_16(source + 2 * i)));
  }
  for (; i < n; ++i) widen_one(destination + 4 * i, source + 2 * i);
}
#endif

}  // namespace kimisys::reshard
