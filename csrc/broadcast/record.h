// A record: what one version changed, as it lies in the log.
//
//   header   128 bytes
//   tables   u64 chunk_offset[chunks]   bytes from the start of the payload to each chunk's
//            u64 increment[steps]       what is added to the digest ...
//            u32 tensor[steps]          ... of these tensors, ascending
//            u32 descriptor[blocks]     how each block is encoded (see code.h)
//            zeros                      to table_nbytes
//   payload  chunk by chunk in any order, each from a multiple of eight on: the payloads of its
//            blocks one after another
//
// Everything is little endian. A checksum covers header and tables; the payload is verified by the
// digest increments.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "broadcast/parts.h"

namespace kimisys::broadcast {

inline constexpr std::size_t kRecordHeaderNbytes = 128;

// A tensor's place in the layout's table, and what is added to its digest.
using Increment = std::pair<std::size_t, std::uint64_t>;

struct Record {
  std::uint64_t version = 0;
  std::uint64_t base = 0;          // the version that it changes
  std::uint64_t previous = kNone;  // absolute position of the record before it in the log
  std::uint64_t changed = 0;       // elements
  std::uint64_t table_nbytes = 0;
  std::uint64_t payload_nbytes = 0;
  std::vector<std::uint64_t> chunk_offsets;
  std::vector<Increment> increments;
  std::vector<std::uint32_t> descriptors;

  std::uint64_t payload_offset() const { return kRecordHeaderNbytes + table_nbytes; }
  std::uint64_t nbytes() const { return payload_offset() + payload_nbytes; }

  // Bytes that the tables need; their room in the log may be larger.
  static std::size_t table_nbytes_of(std::size_t chunks, std::size_t steps, std::size_t blocks);

  // Header and tables, payload_offset() bytes. The tables must fit table_nbytes.
  std::vector<std::byte> write() const;

  // Reads write()'s form, hostile: whatever is malformed raises SnapshotError. parse_header reads
  // the first kRecordHeaderNbytes alone and says how many bytes header and tables have together:
  // at most `log_nbytes`, like the whole record.
  static std::size_t parse_header(std::span<const std::byte> header, std::uint64_t log_nbytes);
  static Record parse(std::span<const std::byte> header_and_tables);

  // Where each block's bytes begin in the payload. chunk_begins: the first block of each chunk, and
  // the number of blocks. Raises SnapshotError if these are not the blocks of this record, or a
  // block's bytes are not inside the payload.
  std::vector<std::uint64_t> block_offsets(std::span<const std::size_t> chunk_begins) const;
};

// Bytes of a block's payload, from its descriptor.
constexpr std::uint64_t payload_nbytes_of(std::uint32_t descriptor) { return descriptor >> 7U; }

}  // namespace kimisys::broadcast
