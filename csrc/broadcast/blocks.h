// How a rank's snapshot is cut into blocks, the units of a delta, and into chunks of blocks, the
// units of work. Both sides compute the cut from the rank's snapshot layout: it is not on the wire.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "reshard/layout.h"

namespace kimisys::broadcast {

// No block has more elements.
inline constexpr std::int64_t kMaxBlockElements = std::int64_t{1} << 18;

// A chunk is closed once it has this many blocks.
inline constexpr std::size_t kChunkBlocks = 8;

// A box of one fragment, never empty.
struct Block {
  std::size_t fragment = 0;  // index in layout.fragments()
  reshard::Region region;    // in coordinates of the tensor, like the fragment's

  bool operator==(const Block&) const = default;
};

// The blocks of one rank's snapshot layout: fragments in layout order, empty ones skipped. The last
// dimension of a fragment with two or more is cut into up to 16 equal parts of whole cache lines,
// so that ranks that split it by 2, 4, 8 or 16 receive blocks of their own; then, from the inside
// out, each dimension takes as much as keeps the block within kMaxBlockElements. Within a fragment
// the grid of blocks is in row-major order.
//
// A band is the consecutive blocks that lie side by side in the last dimension; it is compared row
// by row, so that memory is walked from one end to the other. A chunk is consecutive whole bands.
class Blocks {
 public:
  explicit Blocks(const reshard::Layout& rank_layout);

  const std::vector<Block>& blocks() const { return blocks_; }

  // Band b is blocks [begins[b], begins[b + 1]), chunk c alike; one more entry than there are
  // bands, or chunks.
  std::span<const std::size_t> band_begins() const { return band_begins_; }
  std::span<const std::size_t> chunk_begins() const { return chunk_begins_; }
  std::size_t chunk_count() const { return chunk_begins_.size() - 1; }

 private:
  void cut(std::size_t fragment, const reshard::Region& region, std::int64_t itemsize);

  std::vector<Block> blocks_;
  std::vector<std::size_t> band_begins_ = {0};
  std::vector<std::size_t> chunk_begins_ = {0};
};

}  // namespace kimisys::broadcast
