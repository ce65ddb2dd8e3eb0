#include "broadcast/log.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "broadcast/words.h"

namespace kimisys::broadcast {

std::optional<std::uint64_t> Log::reserve(std::uint64_t record, std::uint64_t nbytes) {
  const std::lock_guard lock(mutex_);
  const std::uint64_t used = head_ - record;
  if (nbytes > capacity() || round_up(nbytes, kWord) > capacity() - used) return {};
  const std::uint64_t at = head_;
  head_ += round_up(nbytes, kWord);
  if (head_ > capacity() && head_ - capacity() > tail()) {
    words_.log_tail.store(head_ - capacity(), std::memory_order_relaxed);
    // Orders the tail before every byte that is written into this room, by whatever store.
    std::atomic_thread_fence(std::memory_order_seq_cst);
  }
  return at;
}

void Log::write(std::uint64_t position, std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  const std::size_t place = position % capacity();
  const std::size_t first = std::min<std::size_t>(bytes.size(), capacity() - place);
  store_bytes(ring_.data() + place, bytes.first(first));
  store_bytes(ring_.data(), bytes.subspan(first));
}

void Log::publish(std::uint64_t record) {
  words_.log_last.store(record, std::memory_order_release);
}

void Log::restart() {
  const std::lock_guard lock(mutex_);
  words_.log_last.store(kNone, std::memory_order_relaxed);
  words_.log_tail.store(head_, std::memory_order_relaxed);
}

std::optional<Draft> Draft::begin(Log& log, std::uint64_t version, std::uint64_t base,
                                  std::size_t chunks, std::size_t steps, std::size_t blocks) {
  const std::size_t table_nbytes = Record::table_nbytes_of(chunks, steps, blocks);
  const std::uint64_t previous = log.last();
  const auto position = log.reserve(log.head(), kRecordHeaderNbytes + table_nbytes);
  if (!position) return {};
  Draft draft(log, *position);
  draft.record_.version = version;
  draft.record_.base = base;
  draft.record_.previous = previous;
  draft.record_.table_nbytes = table_nbytes;
  return draft;
}

std::optional<std::uint64_t> Draft::reserve(std::uint64_t nbytes) {
  const auto at = log_->reserve(position_, nbytes);
  if (!at) return {};
  return *at - position_ - record_.payload_offset();
}

void Draft::append(std::uint64_t offset, std::span<const std::byte> payload) {
  const std::uint64_t room = log_->capacity() - record_.payload_offset();
  KIMISYS_CHECK(offset % kWord == 0 && offset <= room && payload.size() <= room - offset,
                ErrorCode::kSnapshot, "a payload of ", payload.size(), " bytes at byte ", offset,
                " is not what was reserved of a log of ", log_->capacity(), " bytes");
  log_->write(position_ + record_.payload_offset() + offset, payload);
}

std::uint64_t Draft::finish(std::vector<std::uint64_t> chunk_offsets,
                            std::vector<Increment> increments,
                            std::vector<std::uint32_t> descriptors, std::uint64_t changed) {
  record_.payload_nbytes = log_->head() - position_ - record_.payload_offset();
  record_.chunk_offsets = std::move(chunk_offsets);
  record_.increments = std::move(increments);
  record_.descriptors = std::move(descriptors);
  record_.changed = changed;
  KIMISYS_CHECK(Record::table_nbytes_of(record_.chunk_offsets.size(), record_.increments.size(),
                                        record_.descriptors.size()) <= record_.table_nbytes,
                ErrorCode::kSnapshot, "the tables of the record of version ", record_.version,
                " do not fit the ", record_.table_nbytes,
                " bytes that were reserved for them; begin the draft with larger ones");
  log_->write(position_, record_.write());
  return record_.nbytes();
}

}  // namespace kimisys::broadcast
