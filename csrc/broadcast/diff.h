// Live weights against their snapshot: what changed, in one pass that also casts, brings the
// snapshot up to date, extends the digests and encodes.
//
// Work comes in chunks (see blocks.h). Different chunks may run on different threads at once; the
// snapshot's bytes outside a chunk's blocks are neither read nor written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "broadcast/blocks.h"
#include "broadcast/diff_kernels.h"
#include "reshard/execute.h"
#include "reshard/layout.h"

namespace kimisys::broadcast {

// What changed in the blocks of one chunk. One object serves one call at a time; its memory is
// reused from call to call.
struct ChunkDelta {
  // Set before the call: false refers to whole blocks (no payload) instead of copying them here.
  bool whole_inline = true;

  std::vector<std::byte> payload;          // of the chunk's blocks, one after another
  std::vector<std::uint32_t> descriptors;  // one per block (see code.h)
  // (index in the snapshot layout's tensors, what its digest grows by), tensors ascending; those
  // with changed elements that count.
  std::vector<std::pair<std::size_t, std::uint64_t>> increments;
  std::int64_t changed = 0;          // elements
  std::int64_t whole_nbytes = 0;     // of the payload, by whole blocks inline
  std::int64_t referred_nbytes = 0;  // of whole blocks that the payload does not hold

  std::vector<ChangeList> scratch;  // of the blocks of a band
};

// Pairs the live fragments of one rank with those of its snapshot.
class Diff {
 public:
  // `snapshot_rank` has one buffer. `counted` is the part of snapshot.cover() that this rank counts
  // in the digests. Raises LayoutError, naming tensor and region, unless each snapshot fragment has
  // a live fragment of its region (the k-th of equal ones its k-th) whose dtype can be cast, and
  // each counted fragment lies in a snapshot fragment.
  Diff(const reshard::Layout& live_rank, const reshard::Layout& snapshot_rank,
       const reshard::Layout& counted);

  const Blocks& blocks() const { return blocks_; }
  std::size_t tensor_count() const { return tensor_count_; }
  std::int64_t elements() const { return elements_; }                // of all blocks
  std::int64_t nbytes() const { return nbytes_; }                    // in the snapshot's dtypes
  std::int64_t snapshot_nbytes() const { return snapshot_nbytes_; }  // of the snapshot's buffer

  // The live memory in the order of the live layout's buffers. Raises BufferMismatchError for what
  // is missing or has another size; to be called once before the chunks.
  std::vector<const std::byte*> live_memory(const reshard::Memories& live) const;

  // Compares a chunk and writes what changed, and no other cache line, to the snapshot.
  void compare(std::size_t chunk, const std::vector<const std::byte*>& live, std::byte* snapshot,
               ChunkDelta& out, const DiffKernel& kernel);

  // Copies a chunk whole and adds its digests to `sums` (one per tensor of the snapshot's layout).
  // Writes past the caches: the thread calls reshard::finish_streaming() afterwards.
  void copy(std::size_t chunk, const std::vector<const std::byte*>& live, std::byte* snapshot,
            std::vector<std::uint64_t>& sums, const DiffKernel& kernel);

 private:
  // One fragment of the snapshot and its live twin.
  struct Pair {
    std::size_t tensor = 0;       // in the snapshot's layout
    std::size_t live_buffer = 0;  // in the live layout
    DType from = DType::kFloat32;
    DType to = DType::kFloat32;
    std::int64_t live_offset = 0;
    std::int64_t snapshot_offset = 0;
    reshard::Dims live_strides;
    reshard::Dims snapshot_strides;
    reshard::Region region;
    reshard::Dims shape;                   // of the tensor
    std::uint64_t key = 0;                 // of the tensor's counters
    std::vector<reshard::Region> counted;  // disjoint boxes within the region
  };
  struct Band;
  // What is known of the digest of a block's counted elements.
  struct Sum {
    std::uint64_t value = 0;
    bool known = false;
    bool whole = false;  // the last comparison wrote the block whole
  };

  Band band(std::size_t first, std::size_t last, const std::vector<const std::byte*>& live,
            std::byte* snapshot) const;
  void add_counted(const reshard::Layout& snapshot_rank, const reshard::Layout& counted);
  std::vector<std::pair<std::size_t, std::size_t>> bands(std::size_t chunk) const;
  static std::uint64_t sum_parts(const Pair& pair, const std::vector<reshard::Region>& parts,
                                 const std::byte* snapshot, const DiffKernel& kernel);
  std::uint64_t increment(const Band& band, std::size_t member, const ChangeList& changes,
                          const std::byte* snapshot, const DiffKernel& kernel);
  // The elements that differ in a block, when it is worth nothing less than being written whole.
  std::int64_t count_whole(const Band& band, std::size_t member, const DiffKernel& kernel) const;
  void replace(const Band& band, std::size_t member, std::int64_t count, std::byte* snapshot,
               ChunkDelta& out, const DiffKernel& kernel);
  // Of a band all of which counts: the sums of its members.
  static std::vector<std::uint64_t> copy_whole(const Band& band, const DiffKernel& kernel);
  void copy_rows(const Band& band, std::size_t member, const DiffKernel& kernel) const;
  void finish(const Band& band, std::size_t member, const ChangeList& changes, std::byte* snapshot,
              ChunkDelta& out, const DiffKernel& kernel);

  reshard::Layout live_;
  std::vector<Pair> pairs_;  // by fragment of the snapshot's layout
  Blocks blocks_;
  std::vector<Sum> sums_;  // by block
  std::size_t tensor_count_ = 0;
  std::int64_t elements_ = 0;
  std::int64_t nbytes_ = 0;
  std::int64_t snapshot_nbytes_ = 0;
};

// Names of the kernels: avx512, avx2, generic as far as the processor has them, and naive. See
// diff_kernel in diff_kernels.h.
std::vector<std::string_view> diff_implementations();

}  // namespace kimisys::broadcast
