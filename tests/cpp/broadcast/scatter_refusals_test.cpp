// What the scatter refuses: wrong arguments, and records that a hostile or damaged publisher wrote.
#include <doctest/doctest.h>

#include "base/error.h"
#include "broadcast/scatter.h"
#include "broadcast/scatter_world.h"
#include "expect.h"

namespace kimisys::broadcast {
namespace {

using namespace test;  // the worlds
using kimisys::test::expect_error;
using reshard::test::sharded;

// Two trainer ranks, one engine rank that holds all of it.
struct Pair {
  Layout source = one_buffer(sharded("w", DType::kBFloat16, {64, 96}, 0, 2));
  std::shared_ptr<const Layout> from = share(source);
  std::shared_ptr<const Layout> to = share(sharded("w", DType::kBFloat16, {64, 96}, 0, 1));
  Plan plan = make_plan(from, to);
  Scatter scatter{plan, std::vector{*to}};
  Random random{7};
  Store before{*from};
  Store after{*from};
  Update update;

  Pair() {
    fill(*from, before, 1);
    fill(*from, after, 1);
    change(*from, after, 3, 2);
    update = publish(from->of_rank(0), before.at(0, "snapshot"), after.at(0, "snapshot"), random);
  }
  Bytes needed() const { return packed(update, scatter.payload(0, update.record)); }
};

TEST_CASE("wrong arguments are refused by name, before anything is written") {
  const Pair pair;
  const Scatter& scatter = pair.scatter;
  Store store(*pair.to);
  const Store untouched(*pair.to);
  const Bytes payload = pair.needed();
  const Staged staged = scatter.stage(0, pair.update.record, payload);
  const Scatter other(pair.plan, std::vector{*pair.to});
  const std::vector<const Staged*> one = {&staged};
  const std::vector<const Staged*> two = {&staged, &staged};
  expect_error(ErrorCode::kLayout, {"two records of trainer rank 0"},
               [&] { scatter.measure(two, store.memories()); });
  expect_error(ErrorCode::kLayout, {"rank 0", "another Scatter"},
               [&] { other.apply(one, store.memories()); });
  expect_error(ErrorCode::kBufferMismatch, {"destination buffer 'w' of rank 0 is missing"},
               [&] { scatter.measure(one, {}); });
  CHECK(scatter.apply(one, {}) == 0);
  expect_error(ErrorCode::kSnapshot, {"bytes of payload are needed", "got 3"},
               [&] { scatter.stage(0, pair.update.record, std::span(payload).first(3)); });
  expect_error(ErrorCode::kLayout, {"trainer rank 5", "[0, 1]"}, [&] { scatter.blocks(5); });
  const std::vector<std::uint32_t> blocks = {0};
  const std::vector<std::uint32_t> twice = {0, 0};
  const std::vector<std::uint32_t> unknown = {9};
  expect_error(ErrorCode::kLayout, {"block 9 of trainer rank 0", "not needed"},
               [&] { scatter.windows(0, unknown, 100); });
  expect_error(ErrorCode::kLayout, {"a window of 0 bytes"}, [&] { scatter.windows(0, blocks, 0); });
  const Bytes image = pair.after.memories().empty() ? Bytes{} : Bytes(64 * 96);
  expect_error(ErrorCode::kLayout, {"block 0", "twice"},
               [&] { scatter.land(0, twice, image, 0, store.memories(), false); });
  for (const std::int64_t begin : {1, -1}) {
    expect_error(ErrorCode::kBufferMismatch, {"block 0 of trainer rank 0 lies in bytes 0 to 6144"},
                 [&] { scatter.land(0, blocks, image, begin, store.memories(), false); });
  }
  store.memory(0, "w")->writable = false;
  expect_error(ErrorCode::kBufferMismatch, {"read-only"},
               [&] { scatter.measure(one, store.memories()); });
  store.memory(0, "w")->nbytes -= 1;
  expect_error(ErrorCode::kBufferMismatch, {"'w' of rank 0"},
               [&] { scatter.land(0, blocks, image, 0, store.memories(), false); });
  CHECK(store == untouched);
}

TEST_CASE("plans and rounds that do not fit are refused by name") {
  const Pair pair;
  const auto halves = share(sharded("w", DType::kBFloat16, {64, 96}, 1, 2));
  expect_error(ErrorCode::kLayout, {"rank 0 and of rank 1"},
               [&] { Scatter(make_plan(pair.from, halves), {}); });
  const auto wide = share(sharded("w", DType::kFloat32, {64, 96}, 0, 1));
  expect_error(ErrorCode::kLayout, {"'w' is published as bfloat16", "float32"},
               [&] { Scatter(make_plan(pair.from, wide), {}); });
  expect_error(ErrorCode::kLayout, {"round 0", "tensor 'w'", "rank 0"},
               [&] { Scatter(pair.plan, std::vector{*halves}); });
  expect_error(ErrorCode::kLayout, {"unknown implementation 'fast'", "naive"},
               [&] { Scatter(pair.plan, {}, "fast"); });
  const auto apart =
      share(Layout({{"w", DType::kUInt8, {2}}}, {{0, "a", 1}, {0, "b", 1}},
                   {{"w", {{0}, {1}}, 0, "a", 0, {1}}, {"w", {{1}, {1}}, 0, "b", 0, {1}}}));
  const auto whole = share(sharded("w", DType::kUInt8, {2}, 0, 1));
  expect_error(ErrorCode::kLayout, {"buffers 'a' and 'b'", "one buffer per rank"},
               [&] { Scatter(make_plan(apart, whole), {}); });
}

// A word or byte of the record, or of the payload, turned into something else.
void damage(Update& update, Random& random) {
  const auto pick = [&](std::size_t size) {
    return static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(size) - 1));
  };
  switch (random.between(0, 4)) {
    case 0:
      update.record.descriptors[pick(update.record.descriptors.size())] ^= 1U << pick(32);
      break;
    case 1:
      update.record.chunk_offsets[pick(update.record.chunk_offsets.size())] ^= std::uint64_t{1}
                                                                               << pick(64);
      break;
    case 2:
      update.payload.resize(pick(update.payload.size()));
      update.record.payload_nbytes = update.payload.size();
      break;
    case 3:
      update.record.descriptors.resize(pick(update.record.descriptors.size() + 3));
      break;
    default:
      update.payload[pick(update.payload.size())] ^= static_cast<std::byte>(1U << pick(8));
  }
}

TEST_CASE("1000 damaged records: refused, or measured as something else, and nothing is written") {
  int refused = 0;
  int measured = 0;
  Pair pair;
  Store held(*pair.to);
  execute(pair.plan, pair.before.memories(), held.memories());
  const Bytes sound_payload = pair.needed();
  const Staged sound = pair.scatter.stage(0, pair.update.record, sound_payload);
  const std::vector<const Staged*> sound_list = {&sound};
  const Sums expected = pair.scatter.measure(sound_list, held.memories());
  const Store untouched = held;
  for (unsigned seed = 0; seed < 1000; ++seed) {
    CAPTURE(seed);
    Random random(seed);
    Update update = pair.update;
    damage(update, random);
    bool is_refused = false;
    try {
      // Like a reader who gets what is there: bytes past the end of a short payload are missing.
      Bytes payload;
      for (const Range& range : pair.scatter.payload(0, update.record)) {
        for (std::int64_t at = range.offset; at < range.end(); ++at) {
          if (at < static_cast<std::int64_t>(update.payload.size())) {
            payload.push_back(update.payload[static_cast<std::size_t>(at)]);
          }
        }
      }
      const Staged staged = pair.scatter.stage(0, update.record, payload);
      const std::vector<const Staged*> list = {&staged};
      const Scatter& scatter = pair.scatter;
      measured += scatter.measure(list, held.memories()) != expected ? 1 : 0;
    } catch (const Error& error) {
      CHECK(error.code() == ErrorCode::kSnapshot);
      is_refused = true;
      ++refused;
    }
    // apply() without measure() looks at everything, too, before it writes.
    if (is_refused) CHECK(held == untouched);
  }
  CHECK(held == untouched);
  CHECK(refused > 100);
  CHECK(measured > 100);
}

TEST_CASE("apply refuses a malformed payload by itself before it writes the first block") {
  const auto from = share(one_buffer(sharded("w", DType::kUInt8, {2048, 512}, 0, 1)));
  const auto to = share(sharded("w", DType::kUInt8, {2048, 512}, 0, 1));
  const Scatter scatter(make_plan(from, to), std::vector{*to});
  const Blocks blocks(*from);
  REQUIRE(blocks.blocks().size() > 1);
  Record record;
  Bytes payload;
  const std::vector<std::uint32_t> positions = {1, 5};
  const std::array<std::byte, 2> values = {std::byte{1}, std::byte{2}};
  for (std::size_t c = 0; c < blocks.chunk_count(); ++c) record.chunk_offsets.push_back(0);
  for (const Block& block : blocks.blocks()) {
    record.descriptors.push_back(
        encode(positions, values.data(), block.region.elements(), 1, payload).word());
  }
  REQUIRE(blocks.chunk_count() == 1);
  record.payload_nbytes = payload.size();
  Bytes damaged = payload;
  damaged[payload.size() - 4] = std::byte{0xff};
  damaged[payload.size() - 3] = std::byte{0xff};
  damaged[payload.size() - 5] = std::byte{0xff};
  Store store(*to);
  const Store untouched(*to);
  const Staged staged = scatter.stage(0, record, damaged);
  const std::vector<const Staged*> list = {&staged};
  CHECK_THROWS_AS(scatter.apply(list, store.memories()), Error);
  CHECK(store == untouched);
  const Staged sound = scatter.stage(0, record, payload);
  const std::vector<const Staged*> good = {&sound};
  CHECK(scatter.apply(good, store.memories()) ==
        2 * static_cast<std::int64_t>(blocks.blocks().size()));
  CHECK(scatter.touched(good) == std::vector<std::size_t>{0});
}

}  // namespace
}  // namespace kimisys::broadcast
