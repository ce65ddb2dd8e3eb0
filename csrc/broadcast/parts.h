// The parts of a snapshot's shared memory, format 2, in this order:
//
//   header   256 bytes: what the memory is and where its parts lie, written once; then, on a cache
//            line of their own, the words that change
//   digests  u64 each
//   log      a ring of records (see log.h)
//   data     the elements, from a page boundary on
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

namespace kimisys::broadcast {

// No version, no record.
inline constexpr std::uint64_t kNone = std::numeric_limits<std::uint64_t>::max();

inline constexpr std::size_t kHeaderNbytes = 256;
inline constexpr std::size_t kWordsOffset = 128;

// The words that change; each is read and written on its own.
struct Words {
  using Word = std::atomic<std::uint64_t>;
  static_assert(Word::is_always_lock_free && sizeof(Word) == 8);

  Word sequence = 0;      // odd while data and digests are being changed
  Word version = kNone;   // of data and digests; means something while the sequence is even
  Word log_last = kNone;  // absolute position of the last complete record
  Word log_tail = 0;      // absolute position of the oldest byte of the log that is still intact
};

// Bytes from the start of the memory, and sizes in bytes.
struct Parts {
  std::size_t nbytes = 0;  // all of it
  std::size_t digest_offset = 0;
  std::size_t digest_count = 0;
  std::size_t log_offset = 0;
  std::size_t log_nbytes = 0;  // a multiple of eight; 0: no version has a record
  std::size_t data_offset = 0;
  std::size_t data_nbytes = 0;

  bool operator==(const Parts&) const = default;

  // Raises SnapshotError for sizes that no machine has. log_nbytes is rounded up.
  static Parts of(std::size_t data_nbytes, std::size_t digest_count, std::size_t log_nbytes);

  // What a peer wrote in the first kHeaderNbytes of a memory of `nbytes`. Raises SnapshotError
  // unless it is a header of this format whose parts are those of its sizes: a peer is not trusted.
  static Parts parse(std::span<const std::byte> header, std::size_t nbytes);

  // Writes the header of a new memory: these parts, and words of nothing published.
  void write(std::span<std::byte> header) const;
};

}  // namespace kimisys::broadcast
