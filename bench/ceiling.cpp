// What a copy can reach on this machine: one contiguous run, moved by as many threads. Compiled by
// ceiling.py with the processor's own instructions; no part of the package.
#include <cstddef>
#include <cstring>

#include "base/thread_pool.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

constexpr std::size_t kShare = std::size_t{8} << 20;

template <typename Move>
void in_shares(std::byte* destination, const std::byte* source, std::size_t nbytes, Move move) {
  kimisys::parallel_for((nbytes + kShare - 1) / kShare, 0, [&](std::size_t i) {
    const std::size_t begin = i * kShare;
    const std::size_t end = begin + kShare < nbytes ? begin + kShare : nbytes;
    move(destination + begin, source + begin, end - begin);
  });
}

}  // namespace

extern "C" {

void ceiling_memcpy(std::byte* destination, const std::byte* source, std::size_t nbytes) {
  in_shares(destination, source, nbytes,
            [](std::byte* to, const std::byte* from, std::size_t n) { std::memcpy(to, from, n); });
}

#if defined(__AVX512F__)
using Vector = __m512i;
static void stream(Vector* to, const std::byte* from) {
  _mm512_stream_si512(to, _mm512_loadu_si512(from));
}
#elif defined(__AVX2__)
using Vector = __m256i;
static void stream(Vector* to, const std::byte* from) {
  _mm256_stream_si256(to, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#else
using Vector = __m128i;
static void stream(Vector* to, const std::byte* from) {
  _mm_stream_si128(to, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#endif

// The destination is aligned to a cache line and nbytes is a multiple of one.
void ceiling_stream(std::byte* destination, const std::byte* source, std::size_t nbytes) {
  in_shares(destination, source, nbytes, [](std::byte* to, const std::byte* from, std::size_t n) {
    for (std::size_t i = 0; i < n; i += sizeof(Vector)) {
      stream(reinterpret_cast<Vector*>(to + i), from + i);
    }
    _mm_sfence();
  });
}

}  // extern "C"
