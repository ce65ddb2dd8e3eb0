// Where an engine rank keeps the elements of each block of a trainer rank, and in which digest sums
// they count.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "broadcast/blocks.h"
#include "reshard/layout.h"
#include "reshard/plan.h"

namespace kimisys::broadcast {

// Consecutive bytes.
struct Range {
  std::int64_t offset = 0;
  std::int64_t nbytes = 0;

  std::int64_t end() const { return offset + nbytes; }
  bool operator==(const Range&) const = default;
};

// One sum of mixed elements: of a tensor, in these rounds (ascending; none: it is not asked for).
// Elements that count in the same rounds share a sum, so each is mixed once.
struct Sum {
  std::size_t tensor = 0;  // in the source's table
  std::vector<std::size_t> rounds;
};

// A box of one block that lies as one strided piece in one buffer of the destination, all of it in
// the same rounds.
struct Target {
  std::size_t buffer = 0;  // in the destination's table
  std::size_t sum = 0;
  reshard::Region box;        // in coordinates of the tensor
  std::int64_t offset = 0;    // bytes from the start of the buffer to the box's first element
  reshard::Dims strides;      // bytes
  std::uint64_t counter = 0;  // of the box's first element, see mix.h
};

// A box of one fragment of the destination that a round counts.
struct Counted {
  std::size_t round = 0;
  reshard::Region box;
};

// By fragment of the destination, rounds ascending. Raises LayoutError when a round holds what the
// destination does not.
std::vector<std::vector<Counted>> counted_boxes(const reshard::Layout& destination,
                                                std::span<const reshard::Layout> rounds);

// The blocks of one trainer rank that the engine rank needs, ascending, with their targets. The
// plan proves that no two targets share a byte.
class Targets {
 public:
  // `plan` fills one engine rank; `counted` is counted_boxes() of its destination; `sums` grows by
  // what is not yet in it.
  Targets(const reshard::Plan& plan, std::int64_t source_rank,
          const std::vector<std::vector<Counted>>& counted, std::vector<Sum>& sums);

  std::int64_t rank() const { return rank_; }
  const reshard::Layout& layout() const { return layout_; }  // of the trainer rank
  const Blocks& blocks() const { return blocks_; }
  const std::vector<std::uint32_t>& needed() const { return needed_; }

  // The place of a block in needed(), or needed().size() if it is not there.
  std::size_t find(std::uint32_t block) const;

  // Targets of needed()[place]; they are targets()[begin(place)] and following.
  std::size_t begin(std::size_t place) const { return begins_[place]; }
  std::span<const Target> of(std::size_t place) const {
    return std::span(targets_).subspan(begins_[place], begins_[place + 1] - begins_[place]);
  }
  std::size_t size() const { return targets_.size(); }

  const Block& block(std::size_t place) const { return blocks_.blocks()[needed_[place]]; }
  const reshard::Fragment& fragment(std::size_t place) const {
    return layout_.fragments()[block(place).fragment];
  }
  const reshard::Tensor& tensor(std::size_t place) const {
    return layout_.tensors()[layout_.tensor_of(block(place).fragment)];
  }

  // find() of each. Raises LayoutError for a block that is not needed or given twice.
  std::vector<std::size_t> places(std::span<const std::uint32_t> blocks) const;

  // From the first to the last byte of the rank's snapshot data that the targets of a block read.
  Range span(std::size_t place) const;

 private:
  std::int64_t rank_;
  reshard::Layout layout_;
  Blocks blocks_;
  std::vector<std::uint32_t> needed_;
  std::vector<std::size_t> begins_ = {0};
  std::vector<Target> targets_;
};

}  // namespace kimisys::broadcast
