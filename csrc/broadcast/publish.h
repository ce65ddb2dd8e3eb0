// Publishing: one rank's live weights become the next version of its snapshot, and what changed
// becomes a record of its log.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>

#include "broadcast/diff.h"
#include "broadcast/log.h"
#include "broadcast/snapshot.h"
#include "reshard/execute.h"
#include "reshard/layout.h"

namespace kimisys::broadcast {

// What one publish did. Bytes are of the snapshot's dtypes.
struct Publish {
  std::uint64_t version = 0;
  std::optional<std::uint64_t>
      base;                   // the version that the record changes; none: published in full
  std::int64_t elements = 0;  // of all blocks
  std::int64_t nbytes = 0;    // of all blocks
  std::int64_t changed = 0;   // elements; all of them where published in full
  std::uint64_t record_nbytes = 0;
  std::int64_t whole_nbytes = 0;     // of blocks that the record holds whole
  std::int64_t referred_nbytes = 0;  // of blocks that the record leaves in the snapshot's data
};

class PublisherCore {
 public:
  // Layouts as for Diff. Raises what Diff raises, and SnapshotError when the memory is not writable
  // or is not that of the snapshot layout.
  PublisherCore(const reshard::Layout& live_rank, const reshard::Layout& snapshot_rank,
                const reshard::Layout& counted, std::shared_ptr<Snapshot> memory);

  // Called with the number of each chunk that is done, by the thread that did it.
  using EachChunk = std::function<void(std::size_t)>;

  // Publishes the live weights, which stay still meanwhile, as `version`: what changed since the
  // last one; or all of it when `full`, at first, after a publish that failed half-way, and where
  // the log has no room for a record's tables. threads: 0 means all that the process may use.
  //
  // Raises, before anything changed, BufferMismatchError for live buffers, LayoutError for an
  // unknown implementation, VersionError unless `version` increases. Whatever is thrown later
  // leaves the version that was being written unreadable until the next publish, which is full; the
  // log stays as it was.
  Publish publish(std::uint64_t version, const reshard::Memories& live, bool full = false,
                  std::size_t threads = 0, std::string_view implementation = {},
                  const EachChunk& each_chunk = {});

 private:
  // What one thread at a time works with; kept from publish to publish.
  struct Workspace {
    ChunkDelta delta;
    std::vector<std::uint64_t> sums;
    std::vector<Increment> increments;
    std::int64_t changed = 0;
    std::int64_t whole_nbytes = 0;
    std::int64_t referred_nbytes = 0;

    void clear(std::size_t tensors);
  };
  struct Source;
  struct Writing;
  class Lease;

  void publish_all(const Source& source, Publish& result);
  void publish_changes(const Source& source, Draft draft, Publish& result);
  void each(const Source& source, const std::function<void(std::size_t, Workspace&)>& body);
  void compare_chunk(std::size_t chunk, const Source& source, Writing& writing, Workspace& space);
  void keep_whole(ChunkDelta& delta, std::size_t chunk, Writing& writing) const;
  void refer(ChunkDelta& delta, std::size_t chunk, bool all) const;

  std::shared_ptr<Snapshot> memory_;
  Diff diff_;
  std::vector<std::int64_t> block_nbytes_;
  std::size_t counted_tensors_ = 0;  // those whose digest this rank may change
  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> spaces_;  // all
  std::vector<Workspace*> free_;                    // those that no thread has
};

}  // namespace kimisys::broadcast
