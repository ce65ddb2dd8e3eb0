#include "reshard/matrix.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "base/thread_pool.h"

namespace kimisys::reshard {
namespace {

// A tile's row is a cache line: each line is read once and written once, whole, so that rows whose
// distance is a power of two do not push each other out of the caches.
constexpr std::size_t kTile = 32;

using Row = std::uint16_t __attribute__((vector_size(2 * kTile)));

// {a[first], b[first], a[first + 1], b[first + 1], ...}
template <std::size_t kFirst, std::size_t... kIndex>
[[gnu::always_inline]] inline void zip(const Row& a, const Row& b, Row& zipped,
                                       std::index_sequence<kIndex...>) {
  zipped = __builtin_shuffle(
      a, b, Row{static_cast<std::uint16_t>(kFirst + kIndex / 2 + (kIndex % 2) * kTile)...});
}

// Each round of zips doubles the number of neighbours that come from one column.
[[gnu::always_inline]] inline void turn(const std::uint16_t* source, std::size_t source_pitch,
                                        std::uint16_t* destination, std::size_t pitch) {
  constexpr auto kIndex = std::make_index_sequence<kTile>();
  std::array<Row, kTile> lines;
  for (std::size_t i = 0; i < kTile; ++i) {
    std::memcpy(&lines[i], source + i * source_pitch, sizeof(Row));
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
    std::memcpy(destination + i * pitch, &lines[i], sizeof(Row));
  }
}

using Turn = void (*)(const std::uint16_t*, std::size_t, std::uint16_t*, std::size_t);

void turn_generic(const std::uint16_t* source, std::size_t source_pitch, std::uint16_t* destination,
                  std::size_t pitch) {
  turn(source, source_pitch, destination, pitch);
}

#if defined(__x86_64__)
__attribute__((target("arch=x86-64-v4"))) void turn_avx512(const std::uint16_t* source,
                                                           std::size_t source_pitch,
                                                           std::uint16_t* destination,
                                                           std::size_t pitch) {
  turn(source, source_pitch, destination, pitch);
}

__attribute__((target("arch=x86-64-v3"))) void turn_avx2(const std::uint16_t* source,
                                                         std::size_t source_pitch,
                                                         std::uint16_t* destination,
                                                         std::size_t pitch) {
  turn(source, source_pitch, destination, pitch);
}

Turn choose_turn() {
  if (__builtin_cpu_supports("x86-64-v4")) return turn_avx512;
  return __builtin_cpu_supports("x86-64-v3") ? turn_avx2 : turn_generic;
}
#else
Turn choose_turn() { return turn_generic; }
#endif

}  // namespace

void transpose_matrix(const std::uint16_t* source, std::uint16_t* destination, std::size_t rows,
                      std::size_t columns, std::size_t threads) {
  const Turn turn_tile = choose_turn();
  const std::size_t bands = (rows + kTile - 1) / kTile;
  parallel_for(bands, threads, [=](std::size_t band) {
    const std::size_t row = band * kTile;
    const std::size_t height = std::min(kTile, rows - row);
    for (std::size_t column = 0; column < columns; column += kTile) {
      const std::size_t width = std::min(kTile, columns - column);
      const std::uint16_t* from = source + row * columns + column;
      std::uint16_t* to = destination + column * rows + row;
      if (height == kTile && width == kTile) {
        turn_tile(from, columns, to, rows);
        continue;
      }
      for (std::size_t i = 0; i < width; ++i) {
        for (std::size_t j = 0; j < height; ++j) to[i * rows + j] = from[j * columns + i];
      }
    }
  });
}

}  // namespace kimisys::reshard
