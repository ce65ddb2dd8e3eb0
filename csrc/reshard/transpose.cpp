#include "reshard/transpose.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace kimisys::reshard {
namespace {

// Elements on a side of the squares that are transposed inside the caches. They go through dense
// buffers, because strides that are powers of two would map the lines of a whole column to a few
// cache sets.
constexpr std::int64_t kSquare = 64;

// Elements on a side of a tile of squares: its pages stay in the translation cache, and several
// lines of a page are used before it is left.
constexpr std::int64_t kTile = 4 * kSquare;

struct alignas(64) Square {
  std::array<std::byte, kSquare * kSquare * 8> bytes = {};
};

// Each thread keeps its two: making and clearing them would cost more than a small part's copies.
thread_local Square t_before;
thread_local Square t_after;

// As many words as 16 bytes hold.
using Words1 = std::uint8_t __attribute__((vector_size(16)));
using Words2 = std::uint16_t __attribute__((vector_size(16)));
using Words4 = std::uint32_t __attribute__((vector_size(16)));
using Words8 = std::uint64_t __attribute__((vector_size(16)));

template <typename Words>
using WordOf = std::remove_cvref_t<decltype(Words{}[0])>;

// {a[first], b[first], a[first + 1], b[first + 1], ...}
template <std::size_t kFirst, typename Words, std::size_t... kIndex>
Words zip(Words a, Words b, std::index_sequence<kIndex...>) {
  constexpr std::size_t kCount = sizeof...(kIndex);
  return __builtin_shuffle(
      a, b, Words{static_cast<WordOf<Words>>(kFirst + kIndex / 2 + (kIndex % 2) * kCount)...});
}

// Transposes as many rows of 16 bytes as there are words in them. Each round of zips doubles the
// number of neighbours that come from one column.
template <typename Words>
void transpose_words(const std::byte* source, std::byte* destination, std::size_t pitch) {
  constexpr std::size_t kCount = sizeof(Words) / sizeof(WordOf<Words>);
  constexpr auto kIndex = std::make_index_sequence<kCount>();
  std::array<Words, kCount> rows;
  for (std::size_t i = 0; i < kCount; ++i) std::memcpy(&rows[i], source + i * pitch, sizeof(Words));
  for (std::size_t round = 1; round < kCount; round *= 2) {
    std::array<Words, kCount> zipped;
    for (std::size_t i = 0; i < kCount / 2; ++i) {
      zipped[2 * i] = zip<0>(rows[i], rows[i + kCount / 2], kIndex);
      zipped[2 * i + 1] = zip<kCount / 2>(rows[i], rows[i + kCount / 2], kIndex);
    }
    rows = zipped;
  }
  for (std::size_t i = 0; i < kCount; ++i) {
    std::memcpy(destination + i * pitch, &rows[i], sizeof(Words));
  }
}

template <typename Words>
void transpose_square(const Square& source, Square& destination) {
  constexpr std::size_t kItem = sizeof(WordOf<Words>);
  constexpr std::size_t kPitch = kSquare * kItem;
  constexpr std::size_t kCount = sizeof(Words) / kItem;
  for (std::size_t row = 0; row < kSquare; row += kCount) {
    for (std::size_t column = 0; column < kSquare; column += kCount) {
      transpose_words<Words>(source.bytes.data() + row * kPitch + column * kItem,
                             destination.bytes.data() + column * kPitch + row * kItem, kPitch);
    }
  }
}

using TransposeSquare = void (*)(const Square& source, Square& destination);

TransposeSquare choose_square(std::int64_t item) {
  switch (item) {
    case 1:
      return transpose_square<Words1>;
    case 2:
      return transpose_square<Words2>;
    case 4:
      return transpose_square<Words4>;
    default:
      return transpose_square<Words8>;
  }
}

// The two innermost axes of one transposing copy.
class Plane {
 public:
  Plane(const Block& block, std::size_t across, bool may_stream, const RowSet& rows)
      : i_(block.axes[across]),
        j_(block.axes[block.dims - 1]),
        item_(itemsize(block.source_dtype)),
        read_(choose_row(block.source_dtype, block.source_dtype, RowKind::kDense, rows)),
        write_(choose_row(block.source_dtype, block.destination_dtype,
                          may_stream ? RowKind::kStreaming : RowKind::kDense, rows)),
        turn_(choose_square(item_)) {}

  void copy(const std::byte* source, std::byte* destination) {
    for (std::int64_t i = 0; i < i_.extent; i += kTile) {
      for (std::int64_t j = 0; j < j_.extent; j += kTile) {
        copy_tile(source, destination, i, j);
      }
    }
  }

 private:
  void copy_tile(const std::byte* source, std::byte* destination, std::int64_t i0,
                 std::int64_t j0) {
    for (std::int64_t i = i0; i < std::min(i0 + kTile, i_.extent); i += kSquare) {
      for (std::int64_t j = j0; j < std::min(j0 + kTile, j_.extent); j += kSquare) {
        copy_square(source + i * i_.source_stride + j * j_.source_stride,
                    destination + i * i_.destination_stride + j * j_.destination_stride,
                    std::min(kSquare, i_.extent - i), std::min(kSquare, j_.extent - j));
      }
    }
  }

  // What of a square lies outside the block is transposed too, and never written.
  void copy_square(const std::byte* source, std::byte* destination, std::int64_t rows,
                   std::int64_t columns) {
    const std::int64_t pitch = kSquare * item_;
    for (std::int64_t j = 0; j < columns; ++j) {
      read_(rows, source + j * j_.source_stride, item_, before_.bytes.data() + j * pitch, item_);
    }
    turn_(before_, after_);
    for (std::int64_t i = 0; i < rows; ++i) {
      write_(columns, after_.bytes.data() + i * pitch, item_,
             destination + i * i_.destination_stride, j_.destination_stride);
    }
  }

  Block::Axis i_;  // dense in the source
  Block::Axis j_;  // dense in the destination
  std::int64_t item_;
  Row read_;
  Row write_;
  TransposeSquare turn_;
  Square& before_ = t_before;
  Square& after_ = t_after;
};

void copy_planes(const std::vector<Block::Axis>& outer, std::size_t axis, const std::byte* source,
                 std::byte* destination, Plane& plane) {
  if (axis == outer.size()) return plane.copy(source, destination);
  const Block::Axis& it = outer[axis];
  for (std::int64_t n = 0; n < it.extent; ++n) {
    copy_planes(outer, axis + 1, source + n * it.source_stride,
                destination + n * it.destination_stride, plane);
  }
}

}  // namespace

void copy_transposed(const Block& block, std::size_t across, bool may_stream, const RowSet& rows) {
  Plane plane(block, across, may_stream, rows);
  std::vector<Block::Axis> outer;
  for (std::size_t d = 0; d + 1 < block.dims; ++d) {
    if (d != across) outer.push_back(block.axes[d]);
  }
  copy_planes(outer, 0, block.source, block.destination, plane);
}

}  // namespace kimisys::reshard
