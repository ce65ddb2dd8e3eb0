#include "broadcast/publish.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "broadcast/code.h"
#include "broadcast/digest.h"
#include "expect.h"

namespace kimisys::broadcast {
namespace {

using reshard::Buffer;
using reshard::Fragment;
using reshard::Layout;
using reshard::Tensor;
using test::expect_error;

// One rank's tensors of 16-bit words, one after another in one buffer. Eight blocks make a chunk.
Layout row_of(std::size_t tensors, std::int64_t elements, const std::string& buffer) {
  std::vector<Tensor> table;
  std::vector<Fragment> fragments;
  for (std::size_t i = 0; i < tensors; ++i) {
    const std::string name = "t" + std::to_string(100 + i);
    table.push_back({name, DType::kBFloat16, {elements}});
    fragments.push_back(
        {name, {{0}, {elements}}, 0, buffer, static_cast<std::int64_t>(i) * elements * 2, {2}});
  }
  const auto nbytes = static_cast<std::int64_t>(tensors) * elements * 2;
  return Layout(table, {Buffer{0, buffer, nbytes}}, fragments);
}

using Bits = std::vector<std::uint16_t>;

// A publisher of live weights that the test changes.
struct World {
  World(std::size_t tensors, std::int64_t elements, std::size_t log_nbytes)
      : layout(row_of(tensors, elements, "snapshot")),
        memory(std::make_shared<Snapshot>(Snapshot::create(
            tensors * static_cast<std::size_t>(elements) * 2, tensors, log_nbytes))),
        core(row_of(tensors, elements, "live"), layout, layout, memory),
        live(tensors * static_cast<std::size_t>(elements)) {}

  Publish publish(std::uint64_t version, bool full = false,
                  const PublisherCore::EachChunk& each_chunk = {}) {
    return core.publish(version, memories(), full, 2, {}, each_chunk);
  }

  reshard::Memories memories() {
    return {reshard::Memory{reinterpret_cast<std::byte*>(live.data()),
                            static_cast<std::int64_t>(live.size() * 2), true}};
  }

  Bits data() const {
    Bits bits(live.size());
    std::memcpy(bits.data(), memory->data().data(), bits.size() * 2);
    return bits;
  }

  // Are data, version and digests those of the live weights?
  void check(std::uint64_t version) {
    const Published published = memory->published();
    CHECK(published.version == version);
    CHECK(data() == live);
    const reshard::Memories here = {
        reshard::Memory{memory->data().data(), static_cast<std::int64_t>(live.size() * 2), false}};
    CHECK(published.digests == digest(layout, here, 1));
  }

  // Elements of the first so many tensors get new bits, each with this probability.
  void change(double density, std::size_t tensors) {
    std::bernoulli_distribution hit(density);
    const std::size_t each = live.size() / layout.tensors().size();
    for (std::size_t i = 0; i < tensors * each; ++i) {
      if (hit(engine)) live[i] = static_cast<std::uint16_t>(live[i] + 1 + engine() % 65535);
    }
  }

  Layout layout;
  std::shared_ptr<Snapshot> memory;
  PublisherCore core;
  Bits live;
  std::mt19937 engine{0};
};

// What a reader of the log gets: header and tables, then the payload; nothing when the tail passed.
struct Entry {
  Record record;
  std::vector<std::byte> payload;
};

std::uint64_t shared_word(const Snapshot& memory, std::size_t index) {
  std::uint64_t word = 0;
  const Snapshot::Range range{static_cast<std::int64_t>(kWordsOffset + 8 * index), 0, 8};
  memory.read({&range, 1}, std::as_writable_bytes(std::span(&word, 1)));
  return word;
}

std::vector<std::byte> log_bytes(const Snapshot& memory, std::uint64_t position,
                                 std::size_t nbytes) {
  std::vector<std::byte> bytes(nbytes);
  const Parts& parts = memory.parts();
  const std::size_t place = position % parts.log_nbytes;
  const std::size_t first = std::min(nbytes, parts.log_nbytes - place);
  const auto at = [](std::size_t offset) { return static_cast<std::int64_t>(offset); };
  const std::vector<Snapshot::Range> ranges = {
      {at(parts.log_offset + place), 0, at(first)},
      {at(parts.log_offset), at(first), at(nbytes - first)}};
  memory.read(ranges, bytes);
  return bytes;
}

std::optional<Entry> newest(const Snapshot& memory) {
  const std::uint64_t position = shared_word(memory, 2);
  if (position == kNone) return {};
  const auto gone = [&] { return shared_word(memory, 3) > position; };
  try {
    const std::vector<std::byte> header = log_bytes(memory, position, kRecordHeaderNbytes);
    const std::size_t nbytes = Record::parse_header(header, memory.parts().log_nbytes);
    Entry entry{Record::parse(log_bytes(memory, position, nbytes)), {}};
    entry.payload = log_bytes(memory, position + nbytes, entry.record.payload_nbytes);
    if (gone()) return {};
    return entry;
  } catch (const Error&) {
    if (gone()) return {};
    throw;
  }
}

// Brings bits of the record's base to its version; what is whole by reference is taken from `data`.
void apply(const Entry& entry, const Blocks& blocks, std::size_t elements, const Bits& data,
           Bits& bits) {
  const std::vector<std::uint64_t> offsets = entry.record.block_offsets(blocks.chunk_begins());
  std::vector<std::uint32_t> scratch;
  for (std::size_t b = 0; b < blocks.blocks().size(); ++b) {
    const Block& block = blocks.blocks()[b];
    const Descriptor descriptor = Descriptor::of(entry.record.descriptors[b]);
    const auto count = static_cast<std::size_t>(block.region.elements());
    const std::size_t first =
        block.fragment * elements + static_cast<std::size_t>(block.region.offset[0]);
    const auto payload = std::span(entry.payload).subspan(offsets[b], descriptor.nbytes);
    if (descriptor.kind == Kind::kSame) continue;
    if (descriptor.kind == Kind::kWhole) {
      const void* from = payload.empty() ? static_cast<const void*>(&data[first]) : payload.data();
      std::memcpy(&bits[first], from, 2 * count);
      continue;
    }
    const Decoded decoded =
        decode(descriptor, payload, static_cast<std::int64_t>(count), 2, scratch);
    for (std::size_t i = 0; i < decoded.positions.size(); ++i) {
      std::memcpy(&bits[first + decoded.positions[i]], decoded.values + 2 * i, 2);
    }
  }
}

TEST_CASE("records lead from each version to the next") {
  World world(21, 3000, 1U << 16U);
  CHECK_FALSE(world.publish(1).base.has_value());
  world.check(1);
  CHECK_FALSE(newest(*world.memory).has_value());
  const Blocks blocks(world.layout);
  Bits replica = world.data();
  const std::vector<double> densities = {0.0, 0.0005, 0.01, 0.3, 1.0};
  for (std::uint64_t version = 2; version < 40; ++version) {
    world.change(densities[version % 5], 1 + version % 21);
    const Bits before = world.data();
    const Publish done = world.publish(version);
    world.check(version);
    CHECK(done.base == version - 1);
    std::int64_t changed = 0;
    for (std::size_t i = 0; i < before.size(); ++i) changed += before[i] != world.live[i] ? 1 : 0;
    CHECK(done.changed == changed);
    const std::optional<Entry> entry = newest(*world.memory);
    REQUIRE(entry.has_value());
    CHECK(entry->record.version == version);
    CHECK(entry->record.base == version - 1);
    CHECK(entry->record.nbytes() == done.record_nbytes);
    CHECK(entry->record.changed == static_cast<std::uint64_t>(changed));
    apply(*entry, blocks, 3000, world.live, replica);
    CHECK(replica == world.live);
  }
}

TEST_CASE("whole blocks take their part of the log, the rest is referred to") {
  World world(40, 512, 16384);  // a block has 1 KiB, whole blocks get 2 KiB
  world.publish(1);
  Bits replica = world.data();
  world.change(1.0, 40);
  const Publish done = world.publish(2);
  world.check(2);
  CHECK(done.whole_nbytes <= 2048);
  CHECK(done.whole_nbytes + done.referred_nbytes >= 39 * 1024);
  CHECK(done.record_nbytes < 4096);
  apply(*newest(*world.memory), Blocks(world.layout), 512, world.live, replica);
  CHECK(replica == world.live);
}

TEST_CASE("a log that is full refers to the rest") {
  World world(40, 512, 2048);  // tables take 128 + 40 + 480 + 160
  world.publish(1);
  Bits replica = world.data();
  world.change(0.2, 40);
  const Publish done = world.publish(2);
  world.check(2);
  CHECK(done.record_nbytes <= 2048);
  CHECK(done.referred_nbytes > 0);
  apply(*newest(*world.memory), Blocks(world.layout), 512, world.live, replica);
  CHECK(replica == world.live);
}

TEST_CASE("a log without room for tables, or none at all: every publish is full") {
  for (const std::size_t log_nbytes : {0U, 64U, 800U}) {
    World world(40, 512, log_nbytes);
    for (std::uint64_t version = 1; version < 4; ++version) {
      world.change(0.1, 3);
      CHECK_FALSE(world.publish(version).base.has_value());
      world.check(version);
      CHECK_FALSE(newest(*world.memory).has_value());
    }
  }
}

TEST_CASE("a full publish begins the log anew") {
  World world(9, 100, 1U << 14U);
  world.publish(1);
  world.publish(2);
  CHECK(newest(*world.memory).has_value());
  world.change(0.5, 9);
  const Publish done = world.publish(5, true);
  CHECK(done.changed == 900);
  world.check(5);
  CHECK_FALSE(newest(*world.memory).has_value());
  world.publish(6);
  CHECK(newest(*world.memory)->record.base == 5);
  CHECK(newest(*world.memory)->record.previous == kNone);
}

TEST_CASE("a publish that fails half-way leaves the log, and the next one is full") {
  World world(40, 64, 1U << 14U);
  world.publish(1);
  world.change(0.1, 40);
  world.publish(2);
  world.change(0.1, 40);
  std::atomic<int> done = 0;
  const auto fail_after_two = [&](std::size_t) {
    if (++done == 2) throw std::bad_alloc();
  };
  CHECK_THROWS_AS(world.publish(3, false, fail_after_two), std::bad_alloc);
  expect_error(ErrorCode::kSnapshot, {"failed or died"}, [&] { world.memory->published(); });
  CHECK(newest(*world.memory)->record.version == 2);
  expect_error(ErrorCode::kVersion, {}, [&] { world.publish(2); });
  world.change(0.1, 40);
  CHECK_FALSE(world.publish(3).base.has_value());
  world.check(3);
  CHECK_FALSE(newest(*world.memory).has_value());
  world.change(0.1, 40);
  CHECK(world.publish(4).base == 3U);
  world.check(4);
}

TEST_CASE("what is wrong with the arguments changes nothing") {
  World world(9, 100, 1U << 14U);
  world.publish(1);
  world.change(0.5, 9);
  const Bits before = world.data();
  expect_error(ErrorCode::kVersion, {"after version 1"}, [&] { world.publish(1); });
  expect_error(ErrorCode::kBufferMismatch, {"live"}, [&] { world.core.publish(2, {}); });
  expect_error(ErrorCode::kLayout, {},
               [&] { world.core.publish(2, world.memories(), false, 1, "x"); });
  CHECK(world.memory->published().version == 1);
  CHECK(world.data() == before);
}

TEST_CASE("memory of other sizes, or of a peer, is refused") {
  const Layout live = row_of(3, 10, "live");
  const Layout layout = row_of(3, 10, "snapshot");
  const auto make = [&](Snapshot memory) {
    PublisherCore(live, layout, layout, std::make_shared<Snapshot>(std::move(memory)));
  };
  make(Snapshot::create(60, 3));
  expect_error(ErrorCode::kSnapshot, {"60 bytes and 3 tensors"},
               [&] { make(Snapshot::create(61, 3)); });
  expect_error(ErrorCode::kSnapshot, {}, [&] { make(Snapshot::create(60, 2)); });
  expect_error(ErrorCode::kSnapshot, {"read-only"},
               [&] { make(Snapshot::open(Snapshot::create(60, 3).descriptor())); });
}

// Follows the log beside a busy publisher. A version's record sets all elements of one tensor to
// its number. In the writer's own map, where the thread sanitizer looks: the log is read and
// written as atomic words. (Data is not: there the sequence refuses, see snapshot_test.)
struct Follower {
  std::atomic<int> accepted = 0;
  std::atomic<int> wrong = 0;

  void run(const std::atomic<bool>& done, const Snapshot& memory) {
    while (!done) {
      if (const std::optional<Entry> entry = newest(memory)) {
        ++accepted;
        if (!sound(*entry)) ++wrong;
      }
      std::this_thread::yield();
    }
  }

  static bool sound(const Entry& entry) {
    std::size_t changed = 0;
    for (const std::uint32_t word : entry.record.descriptors) {
      const Descriptor descriptor = Descriptor::of(word);
      if (descriptor.kind == Kind::kSame) continue;
      ++changed;
      if (descriptor.kind != Kind::kWhole || descriptor.nbytes != 128) return false;
    }
    for (std::size_t i = 0; i < 64; ++i) {
      std::uint16_t value = 0;
      std::memcpy(&value, entry.payload.data() + 2 * i, 2);
      if (value != static_cast<std::uint16_t>(entry.record.version)) return false;
    }
    return changed == 1;
  }
};

TEST_CASE("readers of the log beside a busy publisher get whole records") {
  World world(16, 64, 2048);  // two chunks; the log holds three records
  const Snapshot mapped = Snapshot::open(world.memory->descriptor());
  Follower same_map;
  Follower other_map;
  std::atomic<bool> done = false;
  world.publish(0);
  std::thread one([&] { same_map.run(done, *world.memory); });
  std::thread two([&] { other_map.run(done, mapped); });
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(120);
  std::uint64_t version = 0;
  while ((version < 3000 || same_map.accepted < 100 || other_map.accepted < 100) &&
         std::chrono::steady_clock::now() < deadline) {
    ++version;
    const auto begin = world.live.begin() + static_cast<std::ptrdiff_t>(version % 16 * 64);
    std::fill(begin, begin + 64, static_cast<std::uint16_t>(version));
    world.publish(version);
    if (version % 8 == 0) std::this_thread::yield();
  }
  done = true;
  one.join();
  two.join();
  for (const Follower* follower : {&same_map, &other_map}) {
    CHECK(follower->accepted >= 100);
    CHECK(follower->wrong == 0);
  }
}

}  // namespace
}  // namespace kimisys::broadcast
