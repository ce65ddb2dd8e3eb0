// Layouts of models whose layers repeat: a block is an ordinary layout with "{}" in its names, and
// the instances in which it occurs. Validated when made, frozen afterwards, never spelled out
// unless asked: 61 layers are two or three blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/lists.h"
#include "reshard/layout.h"

namespace kimisys::reshard {

// One occurrence of a block. "{}" in tensor names stands for `label`, in buffer names for
// `buffer_label`; local rank i of the block is rank ranks[i] of the side.
struct Instance {
  std::string label;
  std::vector<std::int64_t> ranks;
  std::string buffer_label;

  bool operator==(const Instance&) const = default;
};

struct LayoutBlock {
  std::shared_ptr<const Layout> layout;  // over local ranks 0..n-1, without places
  std::vector<Instance> instances;

  bool operator==(const LayoutBlock& other) const {
    return *layout == *other.layout && instances == other.instances;
  }
};

// `name` with every "{}" replaced by `label`.
std::string expand(std::string_view name, std::string_view label);

// One more than the highest local rank of a block's layout; 0 if it has no buffers.
std::size_t local_ranks(const Layout& layout);

class SymbolicLayout {
 public:
  // More names than this (tensors or buffers, counted over instances) are refused, so that a short
  // text cannot ask for hours of checking.
  static constexpr std::size_t kMaxNames = std::size_t{1} << 24;

  SymbolicLayout() = default;
  // Raises LayoutError for a block without layout or instances, a layout with places, an instance
  // with too few, negative or repeated ranks, a tensor or a (rank, buffer) that stands in two
  // instances, names of more than kMaxName
  // bytes, more than kMaxTotalBytes in all, a rank with two places.
  explicit SymbolicLayout(std::vector<LayoutBlock> blocks, std::vector<Place> places = {});

  // In a canonical order, whatever order was given: instances by length and text of their label,
  // blocks by the first tensor of their first instance.
  const std::vector<LayoutBlock>& blocks() const { return blocks_; }
  const std::vector<Place>& places() const { return places_; }       // sorted by rank
  const std::vector<std::int64_t>& ranks() const { return ranks_; }  // ascending
  Place place_of(std::int64_t rank) const;

  // Numbers of the whole, without spelling it out. nbytes() counts all buffers.
  std::size_t tensor_count() const;
  std::size_t fragment_count() const;
  std::int64_t nbytes() const;
  std::vector<Tensor> tensors() const;  // spelled out, sorted by name

  // Where a rank occurs.
  struct Seat {
    std::size_t block = 0;
    std::size_t instance = 0;
    std::size_t local = 0;
  };
  std::vector<Seat> seats_of(std::int64_t rank) const;  // in the order of blocks and instances

  // One rank's buffers, fragments, padding and place, with the tensors that its fragments name.
  // Raises LayoutError if there is no such rank.
  Layout of_rank(std::int64_t rank) const;

  // Everything spelled out; fragments in the order of blocks, instances, and within the block.
  Layout concrete() const;

  // The compact form (see bytes.cpp): equal values give equal bytes. from_bytes treats them as
  // hostile: whatever is malformed raises LayoutError.
  std::string to_bytes() const;
  static SymbolicLayout from_bytes(std::string_view bytes);

  // 32 hexadecimal digits that stand for to_bytes().
  std::string fingerprint() const;

  // The fragments (and paddings) of a local rank, as indices into the block's layout.
  std::span<const std::size_t> fragments_of(std::size_t block, std::size_t local) const {
    return local < fragments_[block].size() ? fragments_[block][local]
                                            : std::span<const std::size_t>();
  }
  std::span<const std::size_t> padding_of(std::size_t block, std::size_t local) const {
    return local < padding_[block].size() ? padding_[block][local] : std::span<const std::size_t>();
  }

  bool operator==(const SymbolicLayout& other) const {
    return blocks_ == other.blocks_ && places_ == other.places_;
  }

 private:
  void check_block(const LayoutBlock& block) const;
  void check_names() const;
  void check_bytes() const;
  void index();

  std::vector<LayoutBlock> blocks_;
  std::vector<Place> places_;
  std::vector<std::int64_t> ranks_;
  std::vector<Seat> seats_;              // by rank
  std::vector<std::size_t> first_seat_;  // of each of ranks_, and the end
  std::vector<Lists> fragments_;         // per block, by local rank
  std::vector<Lists> padding_;
};

std::ostream& operator<<(std::ostream& stream, const Instance& instance);
std::ostream& operator<<(std::ostream& stream, const LayoutBlock& block);
std::ostream& operator<<(std::ostream& stream, const SymbolicLayout& layout);

}  // namespace kimisys::reshard
