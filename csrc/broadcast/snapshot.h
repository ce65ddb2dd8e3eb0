// A snapshot: the published weights of one trainer rank, and a log of what recent versions changed,
// in shared memory.
//
// The memory is a memfd whose size is sealed, so that no peer can shrink it under a reader; its
// parts are listed in parts.h. One process writes; any number map it read-only.
//
// Data and digests: a sequence lock. The sequence is odd from begin() to commit(), and a reader
// that finds it odd, or changed after its read, gets a SnapshotError instead of torn bytes. A
// writer that fails or dies in between leaves it odd: unreadable until the next commit.
//
// Log: readable at any time, also while a version is written or after its writer died, as long as
// the log's tail has not passed what was read (see log.h).
//
// Header, digests and log are read and written as atomic words. Data is not written so: reading it
// beside a writer is a race by design, between processes, whose outcome confirm() refuses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/fd.h"
#include "broadcast/log.h"
#include "broadcast/parts.h"

namespace kimisys::broadcast {

// What a reader learned before it began to read, and needs to confirm that it read one version.
struct Published {
  std::uint64_t sequence = 0;
  std::uint64_t version = 0;
  std::vector<std::uint64_t> digests;
};

class Snapshot {
 public:
  // A new snapshot, writable here, with all pages allocated and nothing published. Raises
  // SnapshotError with the system's text when memory or descriptors run out. log_nbytes is rounded
  // up to eight.
  static Snapshot create(std::size_t data_nbytes, std::size_t digest_count,
                         std::size_t log_nbytes = 0);

  // Maps the snapshot behind a descriptor from another process, read-only. The descriptor is
  // duplicated and stays the caller's. Raises SnapshotError for anything that is not a sealed
  // snapshot of a format that we know: the peer is not trusted to be right.
  static Snapshot open(int descriptor);

  int descriptor() const { return descriptor_.get(); }
  bool writable() const { return writable_; }
  const Parts& parts() const { return parts_; }
  std::span<const std::byte> memory() const;  // all of it, as readers map it
  std::span<std::byte> data() const;          // read-only pages unless writable()
  std::size_t digest_count() const { return parts_.digest_count; }

  // Copies ranges of the memory, as atomic words, in their order: after every earlier read of this
  // thread, before every later one. Raises SnapshotError for a range that is not inside both
  // memories.
  struct Range {
    std::int64_t offset;  // in the memory
    std::int64_t into;
    std::int64_t nbytes;
  };
  void read(std::span<const Range> ranges, std::span<std::byte> into) const;

  // Writer. The log; raises SnapshotError where the snapshot was opened.
  Log& log() const;

  // Writer. Is a version complete in data and digests? Not before the first commit, nor from a
  // begin() on until the next.
  bool complete() const;
  std::uint64_t version() const;               // the last committed one, or kNone
  std::vector<std::uint64_t> digests() const;  // as they stand

  // Writer. begin() makes the snapshot unreadable; write data(); commit() publishes `version`.
  // Raises VersionError, and changes nothing, unless `version` is above the last committed one.
  void begin(std::uint64_t version);
  // `digests` has digest_count() entries. Threads other than the caller's that wrote data() have
  // ended or synchronised with it, their streaming stores fenced (execute() does both).
  void commit(std::span<const std::uint64_t> digests);
  // Takes begin() back: what could be read before it can be read again. Only right while no byte of
  // data() has been written since.
  void abort();

  // Reader. The version that may be read now. Raises SnapshotError while the snapshot is being
  // written (or when its writer failed), VersionError when nothing was published yet.
  Published published() const;
  // Raises SnapshotError when a write began after published() returned: what was read may be torn.
  void confirm(const Published& published) const;

 private:
  Snapshot() = default;
  std::byte* address() const { return static_cast<std::byte*>(mapping_.get().address); }
  Words& words() const;
  std::byte* digest_at(std::size_t index) const;
  void check_writable() const;
  void check_writing() const;

  FileDescriptor descriptor_;
  Mapping mapping_;
  Parts parts_;
  std::unique_ptr<Log> log_;  // where writable
  bool writable_ = false;
  bool writing_ = false;
  bool intact_ = true;  // data() held a committed version, or nothing yet, at begin()
  std::uint64_t next_version_ = 0;
};

}  // namespace kimisys::broadcast
