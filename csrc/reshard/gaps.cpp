#include "reshard/gaps.h"

#include <algorithm>
#include <cstdint>
#include <optional>

namespace kimisys::reshard {
namespace {

constexpr std::int64_t kLine = 64;
constexpr std::int64_t kPage = 4096;

// Bytes of a row that are read before the next has its turn.
constexpr std::int64_t kPiece = 256;

// How rows take turns.
struct Turns {
  std::int64_t rows;   // that take turns
  std::int64_t apart;  // from one of them to the next, in rows
  bool sweep;          // the gaps are read too, so that each turn follows a sweep of the source
};

// Measured on an AMD EPYC (Zen 4) where half of the source is copied, against what streaming
// reaches on rows without gaps: rows of 4 KiB 0.56 -> 0.85 by 8 neighbours in turn, of 1 KiB 0.38
// -> 0.60 by 4 sweeps as far apart as they can be. Neither helped short rows with longer gaps.
std::optional<Turns> choose_turns(std::int64_t row_bytes, std::int64_t pitch, std::int64_t rows) {
  if (row_bytes >= kPage) return Turns{8, 1, false};
  if (pitch <= 2 * row_bytes) {
    return Turns{4, (rows + 3) / 4, true};
  }
  return std::nullopt;
}

// Reads a byte of each line and forgets it. Others may write there meanwhile: it is not ours.
__attribute__((no_sanitize("thread"))) void touch(const std::byte* begin, std::int64_t nbytes) {
  for (std::int64_t i = 0; i < nbytes; i += kLine) {
    static_cast<void>(*static_cast<const volatile std::byte*>(begin + i));
  }
}

// The last two axes of a block.
class Rows2d {
 public:
  Rows2d(const Block& block, const Turns& turns, const RowSet& rows)
      : rows_(block.axes[block.dims - 2]),
        elements_(block.axes[block.dims - 1].extent),
        from_(itemsize(block.source_dtype)),
        to_(itemsize(block.destination_dtype)),
        gap_(rows_.source_stride - elements_ * from_),
        turns_(turns),
        row_(choose_row(block.source_dtype, block.destination_dtype, RowKind::kStreaming, rows)) {}

  void copy(const std::byte* source, std::byte* destination) const {
    const std::int64_t group = turns_.rows * turns_.apart;
    for (std::int64_t first = 0; first < rows_.extent; first += group) {
      const std::int64_t count = std::min(group, rows_.extent - first);
      const std::int64_t apart = (count + turns_.rows - 1) / turns_.rows;
      for (std::int64_t i = 0; i < apart; ++i) {
        take_turns(source, destination, first + i, first + count, apart);
      }
    }
  }

 private:
  // Rows `first`, `first` + `apart`, ... before `end`.
  void take_turns(const std::byte* source, std::byte* destination, std::int64_t first,
                  std::int64_t end, std::int64_t apart) const {
    const std::int64_t piece = kPiece / from_;
    // One piece more than a row has: the first of each ends where a line of the destination does.
    for (std::int64_t begin = 0; begin < elements_ + piece; begin += piece) {
      for (std::int64_t row = first; row < end; row += apart) {
        copy_piece(source + row * rows_.source_stride, destination + row * rows_.destination_stride,
                   begin, begin + piece);
      }
    }
    if (!turns_.sweep) return;
    for (std::int64_t begin = 0; begin < gap_; begin += kPiece) {
      // What follows the very last row may not be ours to read.
      for (std::int64_t row = first; row < std::min(end, rows_.extent - 1); row += apart) {
        touch(source + row * rows_.source_stride + elements_ * from_ + begin,
              std::min(kPiece, gap_ - begin));
      }
    }
  }

  // Elements [begin, end) of a row, both moved back to the line of the destination before them:
  // only whole lines are streamed.
  void copy_piece(const std::byte* source, std::byte* destination, std::int64_t begin,
                  std::int64_t end) const {
    const std::int64_t past = (reinterpret_cast<std::intptr_t>(destination) & (kLine - 1)) / to_;
    begin = std::max<std::int64_t>(0, begin - past);
    end = std::min(elements_, end - past);
    if (begin >= end) return;
    row_(end - begin, source + begin * from_, from_, destination + begin * to_, to_);
  }

  Block::Axis rows_;
  std::int64_t elements_;
  std::int64_t from_;
  std::int64_t to_;
  std::int64_t gap_;
  Turns turns_;
  Row row_;
};

void copy_planes(const Block& block, std::size_t axis, const std::byte* source,
                 std::byte* destination, const Rows2d& plane) {
  if (axis + 2 == block.dims) return plane.copy(source, destination);
  const Block::Axis& it = block.axes[axis];
  for (std::int64_t i = 0; i < it.extent; ++i) {
    copy_planes(block, axis + 1, source + i * it.source_stride,
                destination + i * it.destination_stride, plane);
  }
}

}  // namespace

bool copy_over_gaps(const Block& block, const RowSet& rows) {
  if (block.dims < 2) return false;
  const Block::Axis& outer = block.axes[block.dims - 2];
  const std::int64_t row_bytes = block.axes[block.dims - 1].extent * itemsize(block.source_dtype);
  if (outer.source_stride <= row_bytes) return false;
  const std::optional<Turns> turns = choose_turns(row_bytes, outer.source_stride, outer.extent);
  if (!turns) return false;
  copy_planes(block, 0, block.source, block.destination, Rows2d(block, *turns, rows));
  return true;
}

}  // namespace kimisys::reshard
