#include "reshard/matrix.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "base/thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kimisys::reshard {
namespace {

// A tile's row is a cache line: each line is read once and written once, whole, so that rows whose
// distance is a power of two do not push each other out of the caches.
constexpr std::size_t kTile = 32;

// Half of a large L3 cache: what is written beyond it would be evicted before it is read, so that
// fetching the lines first, as ordinary stores do, is traffic for nothing.
constexpr std::size_t kStreamFrom = std::size_t{16} << 20;

struct Tile {
  const std::uint16_t* source;
  std::size_t source_pitch;
  std::uint16_t* destination;
  std::size_t pitch;
  std::size_t ahead;  // elements from here to the tile that comes next in these rows, or 0
};

using Row = std::uint16_t __attribute__((vector_size(2 * kTile)));

// {a[first], b[first], a[first + 1], b[first + 1], ...}
template <std::size_t kFirst, std::size_t... kIndex>
[[gnu::always_inline]] inline void zip(const Row& a, const Row& b, Row& zipped,
                                       std::index_sequence<kIndex...>) {
  zipped = __builtin_shuffle(
      a, b, Row{static_cast<std::uint16_t>(kFirst + kIndex / 2 + (kIndex % 2) * kTile)...});
}

// Each round of zips doubles the number of neighbours that come from one column.
[[gnu::always_inline]] inline void turn(const Tile& tile) {
  constexpr auto kIndex = std::make_index_sequence<kTile>();
  std::array<Row, kTile> lines;
  for (std::size_t i = 0; i < kTile; ++i) {
    std::memcpy(&lines[i], tile.source + i * tile.source_pitch, sizeof(Row));
  }
#pragma GCC unroll 5
  for (std::size_t round = 1; round < kTile; round *= 2) {
    std::array<Row, kTile> zipped;
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kTile / 2; ++i) {
      zip<0>(lines[i], lines[i + kTile / 2], zipped[2 * i], kIndex);
      zip<kTile / 2>(lines[i], lines[i + kTile / 2], zipped[2 * i + 1], kIndex);
    }
    lines = zipped;
  }
  for (std::size_t i = 0; i < kTile; ++i) {
    std::memcpy(tile.destination + i * tile.pitch, &lines[i], sizeof(Row));
  }
}

using Turn = void (*)(const Tile&);

void turn_generic(const Tile& tile) { turn(tile); }

#if defined(__x86_64__)
__attribute__((target("arch=x86-64-v3"))) void turn_avx2(const Tile& tile) { turn(tile); }

// A vector of four rows' pieces of eight columns: lane j holds row `row + 8 * j`.
__attribute__((target("arch=x86-64-v4"), always_inline)) inline __m512i load_lanes(
    const std::uint16_t* piece, std::size_t pitch) {
  const auto lane = [&](std::size_t j) __attribute__((target("arch=x86-64-v4"), always_inline)) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(piece + 8 * j * pitch));
  };
  __m512i lanes = _mm512_castsi128_si512(lane(0));
  lanes = _mm512_mask_broadcast_i32x4(lanes, 0x00f0, lane(1));
  lanes = _mm512_mask_broadcast_i32x4(lanes, 0x0f00, lane(2));
  return _mm512_mask_broadcast_i32x4(lanes, 0xf000, lane(3));
}

template <bool kStream>
__attribute__((target("arch=x86-64-v4"), always_inline)) inline void store_line(
    std::uint16_t* destination, __m512i line) {
  if constexpr (kStream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(destination), line);
  } else {
    _mm512_storeu_si512(destination, line);
  }
}

// Masked loads bring rows into their lanes, which leaves three of the five rounds to shuffles, all
// within lanes, and eight registers at a time instead of all. Full masks: gcc 12 warns of undefined
// operands in the forms without (its bug 105593).
template <bool kStream>
__attribute__((target("arch=x86-64-v4"))) void turn_avx512(const Tile& tile) {
  for (std::size_t i = 0; tile.ahead != 0 && i < kTile; ++i) {
    __builtin_prefetch(tile.source + i * tile.source_pitch + tile.ahead);
  }
#pragma GCC unroll 4
  for (std::size_t column = 0; column < kTile; column += 8) {
    __m512i rows[8];
    __m512i pairs[8];
    __m512i fours[8];
    for (std::size_t i = 0; i < 8; ++i) {
      rows[i] = load_lanes(tile.source + i * tile.source_pitch + column, tile.source_pitch);
    }
    for (std::size_t i = 0; i < 8; i += 2) {
      pairs[i] = _mm512_unpacklo_epi16(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_epi16(rows[i], rows[i + 1]);
    }
    for (std::size_t i = 0; i < 8; i += 4) {
      fours[i] = _mm512_maskz_unpacklo_epi32(0xffff, pairs[i], pairs[i + 2]);
      fours[i + 1] = _mm512_maskz_unpackhi_epi32(0xffff, pairs[i], pairs[i + 2]);
      fours[i + 2] = _mm512_maskz_unpacklo_epi32(0xffff, pairs[i + 1], pairs[i + 3]);
      fours[i + 3] = _mm512_maskz_unpackhi_epi32(0xffff, pairs[i + 1], pairs[i + 3]);
    }
    for (std::size_t i = 0; i < 4; ++i) {
      std::uint16_t* line = tile.destination + (column + 2 * i) * tile.pitch;
      store_line<kStream>(line, _mm512_maskz_unpacklo_epi64(0xff, fours[i], fours[i + 4]));
      store_line<kStream>(line + tile.pitch,
                          _mm512_maskz_unpackhi_epi64(0xff, fours[i], fours[i + 4]));
    }
  }
}

Turn choose_turn(bool stream) {
  if (__builtin_cpu_supports("x86-64-v4")) return stream ? turn_avx512<true> : turn_avx512<false>;
  return __builtin_cpu_supports("x86-64-v3") ? turn_avx2 : turn_generic;
}

void fence() { _mm_sfence(); }
#else
Turn choose_turn(bool) { return turn_generic; }

void fence() {}
#endif

}  // namespace

void transpose_matrix(const std::uint16_t* source, std::uint16_t* destination, std::size_t rows,
                      std::size_t columns, std::size_t threads) {
  // Streaming stores want whole, aligned lines.
  const bool aligned =
      reinterpret_cast<std::uintptr_t>(destination) % sizeof(Row) == 0 && rows % kTile == 0;
  const bool stream = aligned && rows * columns * sizeof(std::uint16_t) >= kStreamFrom;
  const Turn turn_tile = choose_turn(stream);
  const std::size_t bands = (rows + kTile - 1) / kTile;
  parallel_for(bands, threads, [=](std::size_t band) {
    const std::size_t row = band * kTile;
    const std::size_t height = std::min(kTile, rows - row);
    for (std::size_t column = 0; column < columns; column += kTile) {
      const std::size_t width = std::min(kTile, columns - column);
      const std::uint16_t* from = source + row * columns + column;
      std::uint16_t* to = destination + column * rows + row;
      if (height == kTile && width == kTile) {
        const std::size_t ahead = column + 2 * kTile <= columns ? kTile : 0;
        turn_tile({from, columns, to, rows, ahead});
        continue;
      }
      for (std::size_t i = 0; i < width; ++i) {
        for (std::size_t j = 0; j < height; ++j) to[i * rows + j] = from[j * columns + i];
      }
    }
    if (stream) fence();  // whoever waits for this loop sees what was streamed
  });
}

}  // namespace kimisys::reshard
