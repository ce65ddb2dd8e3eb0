#include "broadcast/record.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "base/error.h"
#include "broadcast/log.h"
#include "broadcast/snapshot.h"
#include "expect.h"

namespace kimisys::broadcast {
namespace {

using test::expect_error;

Record sample() {
  Record record;
  record.version = 9;
  record.base = 7;
  record.previous = 4096;
  record.changed = 123;
  record.chunk_offsets = {16, 0};
  record.increments = {{1, 11}, {4, ~std::uint64_t{0}}, {5, 3}};
  record.descriptors = {10U << 7U | 1U, 0, 3, 6U << 7U | 2U, 12U << 7U | 3U};
  record.table_nbytes = 96;  // 16 + 36 + 20, and room that was not needed
  record.payload_nbytes = 32;
  return record;
}

const std::vector<std::size_t> kChunks = {0, 4, 5};

// The record's bytes with one word of the header changed.
std::vector<std::byte> with_word(std::size_t index, std::uint64_t value) {
  std::vector<std::byte> bytes = sample().write();
  std::memcpy(bytes.data() + 8 * index, &value, 8);
  return bytes;
}

TEST_CASE("what is written is what is read") {
  const Record record = sample();
  const std::vector<std::byte> bytes = record.write();
  CHECK(bytes.size() == 128 + 96);
  CHECK(Record::parse_header(std::span(bytes).first(128), record.nbytes()) == bytes.size());
  const Record read = Record::parse(bytes);
  CHECK(read.version == 9);
  CHECK(read.base == 7);
  CHECK(read.previous == 4096);
  CHECK(read.changed == 123);
  CHECK(read.chunk_offsets == record.chunk_offsets);
  CHECK(read.increments == record.increments);
  CHECK(read.descriptors == record.descriptors);
  CHECK(read.nbytes() == 128 + 96 + 32);
  CHECK(read.block_offsets(kChunks) == std::vector<std::uint64_t>{16, 26, 26, 26, 0});
}

TEST_CASE("a record of nothing") {
  Record record;
  record.version = 1;
  const Record read = Record::parse(record.write());
  CHECK(read.descriptors.empty());
  CHECK(read.previous == kNone);
  CHECK(read.block_offsets(std::vector<std::size_t>{0}).empty());
}

TEST_CASE("sizes that cannot be are refused before anything is read by them") {
  const std::uint64_t room = sample().nbytes();
  const auto refused = [&](std::size_t word, std::uint64_t value, const char* why) {
    const std::vector<std::byte> bytes = with_word(word, value);
    expect_error(ErrorCode::kSnapshot, {why},
                 [&] { Record::parse_header(std::span(bytes).first(128), room); });
    expect_error(ErrorCode::kSnapshot, {}, [&] { Record::parse(bytes); });
  };
  refused(0, 1, "does not have a record");
  for (const std::size_t word : {5U, 6U, 7U, 8U, 9U, 10U}) {
    for (const std::uint64_t value :
         {std::uint64_t{1} << 61U, ~std::uint64_t{0}, ~std::uint64_t{0} / 12, std::uint64_t{300}}) {
      refused(word, value, "announces");
    }
  }
  expect_error(ErrorCode::kSnapshot, {"announces", "in a log of 64"},
               [&] { Record::parse_header(sample().write(), 64); });
  expect_error(ErrorCode::kSnapshot, {"shorter than its header"},
               [&] { Record::parse_header(std::array<std::byte, 127>{}, room); });
}

TEST_CASE("contents that cannot be are refused, however well they are summed") {
  const auto refused = [](const char* why, auto change) {
    Record record = sample();
    change(record);
    const std::vector<std::byte> bytes = record.write();
    expect_error(ErrorCode::kSnapshot, {why}, [&] { Record::parse(bytes); });
  };
  refused("version 9 on 9", [](Record& r) { r.base = 9; });
  refused("not as this build", [](Record& r) { r.version = kNone; });
  refused("not as this build", [](Record& r) { r.chunk_offsets[1] = 33; });
  refused("not as this build", [](Record& r) { r.increments[1].first = 1; });
  refused("not as this build", [](Record& r) { std::swap(r.increments[0], r.increments[2]); });
}

TEST_CASE("damage anywhere is seen") {
  const std::vector<std::byte> good = sample().write();
  for (std::size_t bit = 0; bit < 8 * good.size(); ++bit) {
    std::vector<std::byte> bytes = good;
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    expect_error(ErrorCode::kSnapshot, {}, [&] { Record::parse(bytes); });
  }
}

TEST_CASE("blocks of another layout, or outside the payload, are refused") {
  const Record record = sample();
  for (const auto& begins :
       std::vector<std::vector<std::size_t>>{{}, {0}, {0, 5}, {0, 4, 6}, {0, 3, 4}, {0, 1, 2, 5}}) {
    expect_error(ErrorCode::kSnapshot, {"another number"}, [&] { record.block_offsets(begins); });
  }
  Record longer = sample();
  longer.descriptors[4] = 33U << 7U;
  expect_error(ErrorCode::kSnapshot, {"block 4", "byte 33 of a payload of 32"},
               [&] { longer.block_offsets(kChunks); });
}

// Whatever is made of a record by chance: refused as a SnapshotError, or read without a step
// outside of its bytes, for which the sanitizers look.
TEST_CASE("mutations are refused or read, and nothing else") {
  std::mt19937 engine{0};
  const auto below = [&](std::size_t end) {
    return std::uniform_int_distribution<std::size_t>(0, end - 1)(engine);
  };
  const std::vector<std::byte> good = sample().write();
  int refused = 0;
  for (int i = 0; i < 20000; ++i) {
    std::vector<std::byte> bytes = good;
    for (std::size_t n = below(4) + 1; n > 0; --n) {
      bytes[below(bytes.size())] = static_cast<std::byte>(below(256));
    }
    if (below(4) == 0) bytes.resize(below(bytes.size() + 1));
    try {
      const std::size_t size = Record::parse_header(bytes, good.size() + 64);
      CHECK(size <= good.size() + 64);
      Record::parse(bytes).block_offsets(kChunks);
    } catch (const Error& error) {
      CHECK(error.code() == ErrorCode::kSnapshot);
      ++refused;
    }
  }
  CHECK(refused > 19000);
}

// A ring in memory of its own.
struct Ring {
  explicit Ring(std::size_t words)
      : bytes(words), log(std::as_writable_bytes(std::span(bytes)), state) {}
  std::byte at(std::uint64_t position) const {
    return std::as_bytes(std::span(bytes))[position % log.capacity()];
  }

  std::vector<std::uint64_t> bytes;
  Words state;
  Log log;
};

TEST_CASE("the tail goes ahead of what is overwritten") {
  Ring ring(8);
  CHECK(ring.log.reserve(0, 41) == 0);  // rounded up to 48
  CHECK(ring.log.tail() == 0);
  CHECK_FALSE(ring.log.reserve(0, 17));  // more than a ring for one record
  CHECK(ring.log.reserve(0, 16) == 48);
  CHECK(ring.log.tail() == 0);
  CHECK_FALSE(ring.log.reserve(0, 1));
  CHECK_FALSE(ring.log.reserve(64, ~std::uint64_t{0}));
  CHECK(ring.log.reserve(64, 8) == 64);
  CHECK(ring.log.tail() == 8);
  ring.log.restart();
  CHECK(ring.log.tail() == 72);
  CHECK(ring.log.last() == kNone);
  CHECK(ring.log.reserve(72, 64) == 72);
  CHECK(ring.log.tail() == 72);
}

TEST_CASE("bytes wrap around the ring") {
  Ring ring(4);
  for (std::uint64_t version = 1; version < 20; ++version) {
    const std::uint64_t at = *ring.log.reserve(ring.log.head(), 23);
    std::array<std::byte, 23> bytes{};
    bytes.fill(static_cast<std::byte>(version));
    ring.log.write(at, bytes);
    for (std::uint64_t i = 0; i < 23; ++i) CHECK(ring.at(at + i) == bytes[0]);
    CHECK(ring.at(at + 23) == std::byte{0});
    CHECK(ring.log.tail() <= at);
  }
}

// A record's payload is its version, over and over. Nothing when the record was overwritten.
std::optional<bool> read_last(const Snapshot& memory) {
  const auto word = [&](std::size_t offset) {
    std::uint64_t value = 0;
    const Snapshot::Range range{static_cast<std::int64_t>(offset), 0, 8};
    memory.read({&range, 1}, std::as_writable_bytes(std::span(&value, 1)));
    return value;
  };
  const std::uint64_t position = word(kWordsOffset + 16);
  if (position == kNone) return {};
  // Word by word, so that records that wrap need nothing more.
  std::vector<std::uint64_t> words(37);
  for (std::size_t i = 0; i < words.size(); ++i) {
    words[i] = word(memory.parts().log_offset + (position + 8 * i) % memory.parts().log_nbytes);
  }
  if (word(kWordsOffset + 24) > position) return {};
  const Record record = Record::parse(std::as_bytes(std::span(words)).first(160));
  return std::all_of(words.begin() + 20, words.end(),
                     [&](std::uint64_t each) { return each == record.version; });
}

TEST_CASE("readers of the log beside its writer get whole records") {
  Snapshot writer = Snapshot::create(0, 0, 1000);  // three records of 296 bytes
  const Snapshot mapped = Snapshot::open(writer.descriptor());
  std::atomic<bool> done = false;
  std::array<std::atomic<int>, 2> whole = {0, 0};
  std::atomic<int> torn = 0;
  const auto follow = [&](const Snapshot& memory, std::atomic<int>& count) {
    while (!done) {
      if (const std::optional<bool> sound = read_last(memory)) ++(*sound ? count : torn);
      std::this_thread::yield();
    }
  };
  std::thread same_map([&] { follow(writer, whole[0]); });
  std::thread other_map([&] { follow(mapped, whole[1]); });
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(120);
  for (std::uint64_t version = 1; (version < 3000 || whole[0] < 100 || whole[1] < 100) &&
                                  std::chrono::steady_clock::now() < deadline;
       ++version) {
    Draft draft = *Draft::begin(writer.log(), version, version - 1, 1, 1, 2);
    const std::vector<std::uint64_t> payload(17, version);
    draft.append(*draft.reserve(8 * 17), std::as_bytes(std::span(payload)));
    draft.finish({0}, {{0, version}}, {0, 0}, 1);
    writer.log().publish(draft.position());
    if (version % 4 == 0) std::this_thread::yield();
  }
  done = true;
  same_map.join();
  other_map.join();
  CHECK(whole[0] >= 100);
  CHECK(whole[1] >= 100);
  CHECK(torn == 0);
}

TEST_CASE("a draft that does not fit its room is refused") {
  Ring ring(64);
  CHECK_FALSE(Draft::begin(ring.log, 2, 1, 10, 10, 100));
  CHECK(ring.log.head() == 0);
  Draft draft = *Draft::begin(ring.log, 2, 1, 1, 1, 2);
  CHECK(draft.reserve(100) == 0);
  CHECK_FALSE(draft.reserve(1000));
  const std::vector<std::byte> bytes(600);
  expect_error(ErrorCode::kSnapshot, {"is not what was reserved"}, [&] { draft.append(0, bytes); });
  expect_error(ErrorCode::kSnapshot, {"is not what was reserved"},
               [&] { draft.append(~std::uint64_t{7}, bytes); });
  expect_error(ErrorCode::kSnapshot, {"do not fit"},
               [&] { draft.finish({0}, {{0, 1}, {1, 1}}, {0, 0}, 1); });
  CHECK(draft.finish({0}, {{0, 1}}, {0, 0}, 1) == 128 + 32 + 104);
  ring.log.publish(draft.position());
  const Record read = Record::parse(std::as_bytes(std::span(ring.bytes)).first(128 + 32));
  CHECK(read.version == 2);
  CHECK(Draft::begin(ring.log, 3, 2, 1, 1, 2)->position() == 264);
}

}  // namespace
}  // namespace kimisys::broadcast
