// A subscriber's hands: what changed at the trainer's ranks, mapped through the plan to one engine
// rank's own elements, compared with digests and written in place.
//
// A record is handled in two phases. measure() decodes it and sums what it would add to the digests
// but writes nothing; apply() writes what was measured. Whole blocks are written by land(), copy
// and digest fused. Sums are per round (see kimisys/broadcast/rounds.py) and tensor of the source's
// table: each element of a round counts once, so the sums of all engine ranks together compare with
// what the publishers announce.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "broadcast/code.h"
#include "broadcast/record.h"
#include "broadcast/scatter_targets.h"
#include "reshard/execute.h"
#include "reshard/plan.h"

namespace kimisys::broadcast {

// Blocks whose bytes lie in [begin, end) of a rank's snapshot data, and which of these bytes the
// engine rank needs: ascending, apart, within the window.
struct Window {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::vector<std::uint32_t> blocks;
  std::vector<Range> ranges;
};

// What a record says of one needed block.
struct Change {
  std::size_t place = 0;  // of the block, in Targets::needed()
  Descriptor descriptor;  // neither same nor by reference
  std::span<const std::byte> payload;
};

// The part of one rank's record that this engine rank needs. The payload stays the caller's and
// must not change as long as this is used.
class Staged {
 public:
  std::int64_t rank() const { return targets_->rank(); }
  const std::shared_ptr<const Targets>& targets() const { return targets_; }
  const std::vector<Change>& changes() const { return changes_; }

  // Needed blocks that the record holds by reference, ascending: to be read from the snapshot's
  // data and landed. measure() and apply() leave them out.
  const std::vector<std::uint32_t>& references() const { return references_; }

 private:
  friend class Scatter;
  std::shared_ptr<const Targets> targets_;
  std::vector<Change> changes_;
  std::vector<std::uint32_t> references_;
  // Set once every payload has been decoded: from then on decoding cannot fail.
  std::shared_ptr<std::atomic<bool>> sound_ = std::make_shared<std::atomic<bool>>(false);
};

// Sums mod 2^64: [round * tensors + tensor], tensors those of the source's table.
using Sums = std::vector<std::uint64_t>;

class Scatter {
 public:
  // `plan` fills one engine rank from all trainer ranks; `rounds` are parts of its destination.
  // `implementation`: empty, or one of scatter_implementations(); empty takes
  // KIMISYS_BROADCAST_IMPLEMENTATION, else the fastest. Raises LayoutError for a plan of several
  // engine ranks or with casts, for a round that holds what the destination does not, and for an
  // unknown implementation.
  Scatter(const reshard::Plan& plan, std::span<const reshard::Layout> rounds,
          std::string_view implementation = {});

  const reshard::Layout& source() const { return *source_; }
  const reshard::Layout& destination() const { return *destination_; }
  std::size_t rounds() const { return rounds_; }

  // The trainer ranks that are read, ascending.
  std::vector<std::int64_t> ranks() const;

  // The blocks of a trainer rank that are needed, ascending. Raises LayoutError, here and below,
  // for a rank that is not in ranks().
  const std::vector<std::uint32_t>& blocks(std::int64_t rank) const;

  // The bytes of the record's payload that are needed: ascending, apart, merged where less than a
  // cache line lies between. Raises SnapshotError for tables that do not fit the rank's blocks.
  std::vector<Range> payload(std::int64_t rank, const Record& record) const;

  // `payload` holds the bytes of payload(), one range after the other. Raises SnapshotError as
  // payload() does, and for another number of bytes.
  Staged stage(std::int64_t rank, const Record& record, std::span<const std::byte> payload) const;

  // What the staged changes would add to the digests of what the destination holds; nothing is
  // written. Raises SnapshotError for a malformed payload, BufferMismatchError for a buffer of the
  // destination that is missing, wrong-sized, read-only or overlaps another, LayoutError for two
  // records of one rank. After a success apply() on the same memory does not fail.
  Sums measure(std::span<const Staged* const> staged, const reshard::Memories& destinations,
               std::size_t threads = 0) const;

  // Writes the staged changes and returns the number of elements written. Buffers that
  // `destinations` lacks are left out. Raises like measure, before anything is written.
  std::int64_t apply(std::span<const Staged* const> staged, const reshard::Memories& destinations,
                     std::size_t threads = 0) const;

  // Windows over these blocks (all needed ones: blocks(rank)) in order of memory, each of at most
  // `limit` bytes or of one block. Raises LayoutError for a block that is not needed.
  std::vector<Window> windows(std::int64_t rank, std::span<const std::uint32_t> blocks,
                              std::int64_t limit) const;

  // Writes these blocks from `image`, which holds the bytes of the rank's snapshot data from
  // `begin` on, as far as windows() gives ranges. Returns the sums of what was written, with
  // `subtract` less those of what was there before. The image may change meanwhile: what is summed
  // is what is written. Raises BufferMismatchError as measure does and for an image that does not
  // reach all bytes of the blocks.
  Sums land(std::int64_t rank, std::span<const std::uint32_t> blocks,
            std::span<const std::byte> image, std::int64_t begin,
            const reshard::Memories& destinations, bool subtract, std::size_t threads = 0) const;

  // Zeros for the padding of the destination, which no block covers: once per full pull.
  void fill_padding(const reshard::Memories& destinations) const;

  // The destination's buffers (places in its table, ascending) that apply() may write, or landing
  // the references.
  std::vector<std::size_t> touched(std::span<const Staged* const> staged) const;

 private:
  const std::shared_ptr<const Targets>& targets(std::int64_t rank) const;
  void check_staged(std::span<const Staged* const> staged) const;
  // The memory of each buffer that is written; with `all`, none may be missing.
  std::vector<reshard::Memory> checked(const reshard::Memories& destinations, bool all) const;
  Sums spread(std::span<const std::uint64_t> by_sum) const;

  std::shared_ptr<const reshard::Layout> source_;
  std::shared_ptr<const reshard::Layout> destination_;
  std::size_t rounds_ = 0;
  std::vector<Sum> sums_;
  std::vector<std::shared_ptr<const Targets>> targets_;  // by ascending rank
  std::vector<bool> written_;                            // buffers of the destination
  bool fills_padding_ = true;
  std::string implementation_;
};

// Names for `implementation`, fastest first; "naive" goes element by element.
std::vector<std::string_view> scatter_implementations();

// Sorted, and merged where at most `gap` bytes lie between two.
std::vector<Range> merge_ranges(std::vector<Range> ranges, std::int64_t gap);

}  // namespace kimisys::broadcast
