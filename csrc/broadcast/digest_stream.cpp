#include "broadcast/digest_stream.h"

#if defined(__x86_64__)
// GCC 12 takes the undefined operands of its own header for a mistake of the caller (GCC 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#endif

#include <array>
#include <cstring>

#include "broadcast/mix.h"

namespace kimisys::broadcast {

#if defined(__x86_64__)
#define KIMISYS_AVX512 __attribute__((target("arch=x86-64-v4")))

namespace {

using Lanes = std::uint64_t __attribute__((vector_size(64)));

KIMISYS_AVX512 [[gnu::always_inline]] inline __m128i quarter(__m512i line, std::size_t index) {
  switch (index) {
    case 0:
      return _mm512_castsi512_si128(line);
    case 1:
      return _mm512_extracti32x4_epi32(line, 1);
    case 2:
      return _mm512_extracti32x4_epi32(line, 2);
    default:
      return _mm512_extracti32x4_epi32(line, 3);
  }
}

// Eight elements of a line, zero-extended. Not __builtin_convertvector: GCC 12 takes words of one
// and two bytes apart one by one.
template <std::size_t kSize>
KIMISYS_AVX512 [[gnu::always_inline]] inline Lanes widened(__m512i line, std::size_t group) {
  if constexpr (kSize == 1) {
    const __m128i part = quarter(line, group / 2);
    const __m128i half = group % 2 == 0 ? part : _mm_unpackhi_epi64(part, part);
    return reinterpret_cast<Lanes>(_mm512_cvtepu8_epi64(half));
  } else if constexpr (kSize == 2) {
    return reinterpret_cast<Lanes>(_mm512_cvtepu16_epi64(quarter(line, group)));
  } else if constexpr (kSize == 4) {
    const __m256i half =
        group == 0 ? _mm512_castsi512_si256(line) : _mm512_extracti64x4_epi64(line, 1);
    return reinterpret_cast<Lanes>(_mm512_cvtepu32_epi64(half));
  } else {
    const auto bits = reinterpret_cast<Lanes>(line);
    return bits ^ (bits >> 32U);
  }
}

template <typename Word>
KIMISYS_AVX512 std::uint64_t stream_words(std::byte* destination, const std::byte* source,
                                          std::int64_t count, std::uint64_t counter,
                                          std::uint64_t step) {
  constexpr std::int64_t kLanes = 8;
  constexpr std::int64_t kLine = 64;
  constexpr auto kSize = static_cast<std::int64_t>(sizeof(Word));
  constexpr std::size_t kGroups = kLine / kLanes / kSize;
  std::uint64_t sum = 0;
  const auto one = [&](std::int64_t i) __attribute__((always_inline)) {
    Word word;
    std::memcpy(&word, source + i * kSize, sizeof(Word));
    std::memcpy(destination + i * kSize, &word, sizeof(Word));
    sum += mix(counter + static_cast<std::uint64_t>(i) * step, kSize == 8 ? fold(word) : word);
  };
  std::int64_t i = 0;
  while (i < count && reinterpret_cast<std::uintptr_t>(destination + i * kSize) % kLine != 0) {
    one(i++);
  }
  Lanes counters = {0, 1, 2, 3, 4, 5, 6, 7};
  counters = counters * step + (counter + static_cast<std::uint64_t>(i) * step);
  const std::uint64_t stride = kLanes * step;
  Lanes sums[2] = {};
  for (; i + kLine / kSize <= count; i += kLine / kSize) {
    // Loaded once: what is stored is what is summed.
    const __m512i line = _mm512_loadu_si512(source + i * kSize);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(destination + i * kSize), line);
#pragma GCC unroll 8
    for (std::size_t g = 0; g < kGroups; ++g) {
      const Lanes bits = widened<sizeof(Word)>(line, g);
      Lanes word = (counters ^ bits) * kFirst;
      word = (word ^ (word >> 32U)) * kSecond;
      sums[g % 2] += word ^ (word >> 29U);
      counters += stride;
    }
  }
  for (; i < count; ++i) one(i);
  const Lanes all = sums[0] + sums[1];
  for (std::size_t lane = 0; lane < kLanes; ++lane) sum += all[lane];
  return sum;
}

constexpr std::array<Stream, 4> kStreamAvx512 = {
    &stream_words<std::uint8_t>, &stream_words<std::uint16_t>, &stream_words<std::uint32_t>,
    &stream_words<std::uint64_t>};

}  // namespace

Stream stream_of(std::string_view implementation, std::size_t width) {
  return implementation == "avx512" ? kStreamAvx512[width] : nullptr;
}
#else
Stream stream_of(std::string_view, std::size_t) { return nullptr; }
#endif

}  // namespace kimisys::broadcast
