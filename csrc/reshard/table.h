// A plan as a table of numbers for a device: strided copies of words on real addresses, each as
// wide as its alignment allows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "reshard/blocks.h"

namespace kimisys::reshard {

// What one word of a row is. Units are the bytes that strides count in, of source and destination.
// Numbers, not names, cross to the device: kimisys/kernels/strided_copy_kernel.py has them too.
enum class Word : std::int64_t {
  kCopy16,  // 16, 8, 4, 2, 1 bytes with their bits; units the same
  kCopy8,
  kCopy4,
  kCopy2,
  kCopy1,
  kNarrow4,      // four float32 -> bfloat16 side by side; units 16 and 8
  kNarrow,       // one; units 4 and 2
  kNarrowBytes,  // one, at any address; units 1 and 1
  kWiden4,       // four bfloat16 -> float32; units 8 and 16
  kWiden,        // units 2 and 4
  kWidenBytes,   // units 1 and 1
};

// Columns of a row, then kTableAxes axes, innermost first, of kAxisColumns each. A source address
// of 0 stands for zeros.
struct TableColumn {
  enum : std::size_t { kSource, kDestination, kWord, kAxes, kWords, kFirstTile, kCount };
};

// An index divides by an extent as (index * magic) >> shift: exact for 0 <= index < 2^31.
struct AxisColumn {
  enum : std::size_t { kExtent, kMagic, kShift, kSourceStride, kDestinationStride, kCount };
};

// One more than a tensor's: words of an element may be an axis of their own.
inline constexpr std::size_t kTableAxes = kMaxDims + 1;
inline constexpr std::size_t kTableColumns =
    TableColumn::kCount + kTableAxes * static_cast<std::size_t>(AxisColumn::kCount);

// Rows of at most this many bytes at the destination, so that 31 bits count their words.
inline constexpr std::int64_t kRowBytes = std::int64_t{1} << 30;

// Row after row, kTableColumns numbers each; kFirstTile is left 0. Long runs whose two ends are
// equally far from a 16-byte boundary become a short row, an aligned one and a short one.
std::vector<std::int64_t> make_table(Blocks blocks, std::int64_t row_bytes = kRowBytes);

}  // namespace kimisys::reshard
