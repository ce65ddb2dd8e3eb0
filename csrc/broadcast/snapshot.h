// A snapshot: the published weights of one version at one trainer rank, in shared memory.
//
// The memory is a memfd whose size is sealed, so that no peer can shrink it under a reader: one
// header, the digests, then the data at a page boundary. One process writes; any number map it
// read-only. A sequence lock tells them apart: the sequence is odd from begin() to commit(), and a
// reader that finds it odd, or changed after its read, gets a SnapshotError instead of torn bytes.
// A writer that fails or dies in between leaves it odd: unreadable until the next commit.
//
// The words of the header and the digests are read and written atomically. data() is not: copying
// it beside a writer is a race by design, between processes, whose outcome confirm() refuses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/fd.h"

namespace kimisys::broadcast {

// What a reader learned before it began to read, and needs to confirm that it read one version.
struct Published {
  std::uint64_t sequence = 0;
  std::uint64_t version = 0;
  std::vector<std::uint64_t> digests;
};

class Snapshot {
 public:
  // A new snapshot, writable here, with all pages allocated and nothing published.
  // Raises SnapshotError with the system's text when memory or descriptors run out.
  static Snapshot create(std::size_t nbytes, std::size_t digest_count);

  // Maps the snapshot behind a descriptor from another process, read-only. The descriptor is
  // duplicated and stays the caller's. Raises SnapshotError for anything that is not a sealed
  // snapshot of a format that we know: the peer is not trusted to be right.
  static Snapshot open(int descriptor);

  int descriptor() const { return descriptor_.get(); }
  bool writable() const { return writable_; }
  std::span<std::byte> data() const { return data_; }  // read-only pages unless writable()
  std::size_t digest_count() const { return digest_count_; }

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
  std::uint64_t* digests() const;
  void check_writing() const;

  FileDescriptor descriptor_;
  Mapping mapping_;
  std::span<std::byte> data_;
  std::size_t digest_count_ = 0;
  bool writable_ = false;
  bool writing_ = false;
  bool intact_ = true;  // data() held a committed version, or nothing yet, at begin()
  std::uint64_t next_version_ = 0;
};

}  // namespace kimisys::broadcast
