// The log: a ring of bytes in a snapshot's shared memory that holds the records of recent versions.
//
// Positions are absolute: they count all bytes that were ever appended; modulo the capacity they
// give the place in the ring. A byte at position p is intact as long as p >= log_tail. The writer
// stores the new tail, then a full fence, before it overwrites what lies before it; a reader copies
// first and looks at the tail afterwards. So a record may be read while the next one is written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "broadcast/parts.h"
#include "broadcast/record.h"

namespace kimisys::broadcast {

// The writer's side. Only the creator of the shared memory has one: where the head is, is its own.
class Log {
 public:
  // Both outlive the log. The ring's size is a multiple of eight.
  Log(std::span<std::byte> ring, Words& words) : ring_(ring), words_(words) {}

  std::uint64_t capacity() const { return ring_.size(); }
  std::uint64_t head() const { return head_; }
  std::uint64_t last() const { return words_.log_last.load(std::memory_order_relaxed); }
  std::uint64_t tail() const { return words_.log_tail.load(std::memory_order_relaxed); }

  // Takes the next bytes, rounded up to eight, for the record that begins at `record`, and gives
  // up what they will overwrite. Nothing is taken when the record would be longer than the ring.
  // Safe from several threads.
  std::optional<std::uint64_t> reserve(std::uint64_t record, std::uint64_t nbytes);

  // Writes into what was reserved, from a multiple of eight on.
  void write(std::uint64_t position, std::span<const std::byte> bytes);

  // Readers find the record from now on. It is complete: what other threads wrote of it happened
  // before.
  void publish(std::uint64_t record);

  // No record leads to what is published next: the log starts anew.
  void restart();

 private:
  std::span<std::byte> ring_;
  Words& words_;
  std::mutex mutex_;
  std::uint64_t head_ = 0;
};

// A record while it is written: tables' room first, then chunks as they come, then the tables.
class Draft {
 public:
  // Room for header and tables of so many entries. Nothing if the log is too small for them.
  static std::optional<Draft> begin(Log& log, std::uint64_t version, std::uint64_t base,
                                    std::size_t chunks, std::size_t steps, std::size_t blocks);

  std::uint64_t position() const { return position_; }

  // Room for a chunk's payload: its offset in the record's payload. Nothing when the log is full;
  // then the chunk goes without. Safe from several threads, as append is.
  std::optional<std::uint64_t> reserve(std::uint64_t nbytes);
  void append(std::uint64_t offset, std::span<const std::byte> payload);

  // Writes header and tables; the record is complete, and is found after log.publish(position()).
  // Tables have at most as many entries as begin() was told. Returns the record's bytes.
  std::uint64_t finish(std::vector<std::uint64_t> chunk_offsets, std::vector<Increment> increments,
                       std::vector<std::uint32_t> descriptors, std::uint64_t changed);

 private:
  Draft(Log& log, std::uint64_t position) : log_(&log), position_(position) {}

  Log* log_;
  std::uint64_t position_;
  Record record_;
};

}  // namespace kimisys::broadcast
