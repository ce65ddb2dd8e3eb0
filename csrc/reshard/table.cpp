#include "reshard/table.h"

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

namespace kimisys::reshard {
namespace {

constexpr std::int64_t kWidest = 16;

// Runs shorter than this are not worth the rows of their unaligned ends.
constexpr std::int64_t kShortestCut = 64;

std::int64_t address(const std::byte* pointer) {
  return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(pointer));
}

// The largest power of two, up to kWidest, that divides them all: `bits` is their bitwise or.
std::int64_t alignment(std::int64_t bits) {
  return std::int64_t{1} << std::countr_zero(static_cast<std::uint64_t>(bits | kWidest));
}

const Block::Axis& last_axis(const Block& block) { return block.axes[block.dims - 1]; }

bool has_dense_rows(const Block& block) {
  return last_axis(block).source_stride == itemsize(block.source_dtype) &&
         last_axis(block).destination_stride == itemsize(block.destination_dtype);
}

// The strides of one side of all axes but the last `skipped`, or-ed.
std::int64_t source_bits(const Block& block, std::size_t skipped) {
  std::int64_t bits = 0;
  for (std::size_t d = 0; d + skipped < block.dims; ++d) bits |= block.axes[d].source_stride;
  return bits;
}

std::int64_t destination_bits(const Block& block, std::size_t skipped) {
  std::int64_t bits = 0;
  for (std::size_t d = 0; d + skipped < block.dims; ++d) bits |= block.axes[d].destination_stride;
  return bits;
}

// How the words of a row lie, and how many elements of the last axis one of them takes.
struct Shape {
  Word word;
  std::int64_t source_unit;
  std::int64_t destination_unit;
  std::int64_t elements;
};

Shape cast_shape(const Block& block) {
  const bool narrows = block.source_dtype == DType::kFloat32;
  const std::int64_t from = itemsize(block.source_dtype);
  const std::int64_t to = itemsize(block.destination_dtype);
  const auto fits = [&](std::int64_t count, std::size_t skipped) {
    return (address(block.source) | source_bits(block, skipped)) % (count * from) == 0 &&
           (address(block.destination) | destination_bits(block, skipped)) % (count * to) == 0;
  };
  if (has_dense_rows(block) && last_axis(block).extent % 4 == 0 && fits(4, 1)) {
    return {narrows ? Word::kNarrow4 : Word::kWiden4, 4 * from, 4 * to, 4};
  }
  if (fits(1, 0)) return {narrows ? Word::kNarrow : Word::kWiden, from, to, 1};
  return {narrows ? Word::kNarrowBytes : Word::kWidenBytes, 1, 1, 1};
}

// Words of `width` bytes; 16 -> kCopy16, ..., 1 -> kCopy1.
Word copy_word(std::int64_t width) {
  return static_cast<Word>(4 - std::countr_zero(static_cast<std::uint64_t>(width)));
}

class Table {
 public:
  Table(std::size_t rows, std::int64_t row_bytes) : row_bytes_(row_bytes) {
    numbers_.reserve(rows * kTableColumns);
  }

  // A collapsed block.
  void add(Block block) {
    std::int64_t bytes = itemsize(block.destination_dtype);
    for (std::size_t d = 0; d < block.dims; ++d) bytes *= block.axes[d].extent;
    if (bytes > row_bytes_) return halve(block);
    if (block.source_dtype != block.destination_dtype) return add_cast(block);
    if (has_dense_rows(block)) return add_runs(block);
    const std::int64_t item = itemsize(block.source_dtype);
    add_copy(block, std::min(item, alignment(address(block.source) | address(block.destination) |
                                             source_bits(block, 0) | destination_bits(block, 0))));
  }

  std::vector<std::int64_t> take() { return std::move(numbers_); }

 private:
  // At a multiple of 16 elements, so that both halves are aligned where the whole was.
  void halve(const Block& block) {
    const auto* const first = block.axes.begin();
    const auto* const outermost =
        std::find_if(first, first + static_cast<std::ptrdiff_t>(block.dims),
                     [](const Block::Axis& axis) { return axis.extent > 1; });
    const auto axis = static_cast<std::size_t>(outermost - first);
    const std::int64_t half = outermost->extent / 2;
    cut(block, axis, half >= kWidest ? half / kWidest * kWidest : half);
  }

  void cut(const Block& block, std::size_t axis, std::int64_t at) {
    Block part = block;
    part.axes[axis].extent = at;
    add(part);
    part = block;
    part.axes[axis].extent -= at;
    if (part.source != nullptr) part.source += at * part.axes[axis].source_stride;
    part.destination += at * part.axes[axis].destination_stride;
    add(part);
  }

  // Dense runs: bytes, whatever the dtype.
  void add_runs(const Block& block) {
    const std::int64_t item = itemsize(block.source_dtype);
    const std::int64_t run = last_axis(block).extent * item;
    const std::int64_t rows = source_bits(block, 1) | destination_bits(block, 1);
    const std::int64_t apart =
        block.source == nullptr ? 0 : address(block.source) - address(block.destination);
    const std::int64_t could = alignment(rows | apart);
    const std::int64_t width = alignment(rows | apart | address(block.destination) | run);
    if (run < kShortestCut || width == could) return add_copy(block, width);
    Block bytes = block;
    bytes.source_dtype = bytes.destination_dtype = DType::kUInt8;
    bytes.axes[bytes.dims - 1] = {run, 1, 1};
    const std::int64_t head = (could - address(block.destination) % could) % could;
    cut(bytes, bytes.dims - 1, head != 0 ? head : run / could * could);
  }

  void add_copy(const Block& block, std::int64_t width) {
    const std::int64_t item = itemsize(block.source_dtype);
    const bool dense = has_dense_rows(block);
    const std::int64_t run = dense ? last_axis(block).extent * item : item;
    begin(block, copy_word(width));
    if (run > width) add_axis(run / width, 1, 1);
    add_outer(block, dense ? 1 : 0, width, width);
  }

  void add_cast(const Block& block) {
    const Shape shape = cast_shape(block);
    begin(block, shape.word);
    if (shape.elements > 1) {
      const std::int64_t words = last_axis(block).extent / shape.elements;
      if (words > 1) add_axis(words, 1, 1);
    }
    add_outer(block, shape.elements > 1 ? 1 : 0, shape.source_unit, shape.destination_unit);
  }

  void begin(const Block& block, Word word) {
    row_ = numbers_.size();
    numbers_.resize(row_ + kTableColumns, 0);
    at(TableColumn::kSource) = address(block.source);
    at(TableColumn::kDestination) = address(block.destination);
    at(TableColumn::kWord) = static_cast<std::int64_t>(word);
    at(TableColumn::kWords) = 1;
  }

  void add_outer(const Block& block, std::size_t skipped, std::int64_t source_unit,
                 std::int64_t destination_unit) {
    for (std::size_t d = block.dims - skipped; d-- > 0;) {
      const Block::Axis& axis = block.axes[d];
      if (axis.extent == 1) continue;
      add_axis(axis.extent, axis.source_stride / source_unit,
               axis.destination_stride / destination_unit);
    }
  }

  void add_axis(std::int64_t extent, std::int64_t source_stride, std::int64_t destination_stride) {
    std::int64_t* axis = &at(TableColumn::kCount +
                             static_cast<std::size_t>(at(TableColumn::kAxes)) * AxisColumn::kCount);
    // The shift is 31 + ceil(log2 extent) and the magic number 2^shift / extent, rounded up: it is
    // less than 2^32, and the error of the product less than 2^shift for every index.
    const auto divisor = static_cast<std::uint64_t>(extent);
    const int shift = 31 + static_cast<int>(std::bit_width(divisor - 1));
    const std::uint64_t magic = ((std::uint64_t{1} << shift) + divisor - 1) / divisor;
    axis[AxisColumn::kExtent] = extent;
    axis[AxisColumn::kMagic] = static_cast<std::int64_t>(magic);
    axis[AxisColumn::kShift] = shift;
    axis[AxisColumn::kSourceStride] = source_stride;
    axis[AxisColumn::kDestinationStride] = destination_stride;
    at(TableColumn::kAxes) += 1;
    at(TableColumn::kWords) *= extent;
  }

  std::int64_t& at(std::size_t column) { return numbers_[row_ + column]; }

  std::int64_t row_bytes_;
  std::vector<std::int64_t> numbers_;
  std::size_t row_ = 0;
};

}  // namespace

std::vector<std::int64_t> make_table(Blocks blocks, std::int64_t row_bytes) {
  Table table(blocks.copies.size() + blocks.blanks.size(), row_bytes);
  for (Block& block : blocks.copies) {
    collapse(block);
    table.add(block);
  }
  for (const Blank& blank : blocks.blanks) {
    Block block{.destination = blank.destination,
                .dims = 1,
                .source_dtype = DType::kUInt8,
                .destination_dtype = DType::kUInt8};
    block.axes[0] = {blank.nbytes, 1, 1};
    table.add(block);
  }
  return table.take();
}

}  // namespace kimisys::reshard
