#include "broadcast/scatter.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <set>

#include "base/error.h"
#include "broadcast/scatter_world.h"
#include "expect.h"

namespace kimisys::broadcast {
namespace {

using namespace test;  // the worlds
using kimisys::test::expect_error;

TEST_CASE("measured, landed and applied: the sums are the digests' and the bytes the plan's") {
  for (unsigned seed = 0; seed < 150; ++seed) {
    CAPTURE(seed);
    World world(seed);
    const Plan plan = make_plan(world.source, world.destination);
    Store before(*world.source);
    fill(*world.source, before, seed);
    Store after(*world.source);
    fill(*world.source, after, seed);
    change(*world.source, after, world.random.between(1, 12), seed + 100);
    Store old(*world.destination);
    execute(plan, before.memories(), old.memories());
    Store expected(*world.destination);
    execute(plan, after.memories(), expected.memories());
    const Sums increments =
        added(digests(world.rounds, *world.source, *world.destination, expected),
              digests(world.rounds, *world.source, *world.destination, old), true);
    const auto names = scatter_implementations();
    const Scatter scatter(plan, world.rounds, names[seed % names.size()]);
    Store store(*world.destination);
    execute(plan, before.memories(), store.memories());

    std::vector<Update> published;
    std::vector<Bytes> payloads;
    std::vector<Staged> staged;
    for (const std::int64_t rank : scatter.ranks()) {
      published.push_back(publish(world.source->of_rank(rank), before.at(rank, "snapshot"),
                                  after.at(rank, "snapshot"), world.random));
      payloads.push_back(packed(published.back(), scatter.payload(rank, published.back().record)));
      staged.push_back(scatter.stage(rank, published.back().record, payloads.back()));
    }
    std::vector<const Staged*> list;
    for (const Staged& each : staged) list.push_back(&each);
    Sums sums = scatter.measure(list, store.memories(), 2);
    CHECK(store == old);
    for (const Staged& each : staged) {
      for (const Window& window : scatter.windows(each.rank(), each.references(), 4096)) {
        const auto& data = after.at(each.rank(), "snapshot");
        Bytes image(static_cast<std::size_t>(window.end - window.begin), std::byte{0xcd});
        for (const Range& range : window.ranges) {
          std::copy_n(data.begin() + range.offset, range.nbytes,
                      image.begin() + (range.offset - window.begin));
        }
        sums = added(sums, scatter.land(each.rank(), window.blocks, image, window.begin,
                                        store.memories(), true, 2));
      }
    }
    CHECK(sums == increments);
    // In two halves: the first leaves the buffers of the second alone.
    Store landed = store;
    for (const std::size_t half : {std::size_t{0}, std::size_t{1}}) {
      reshard::Memories some = store.memories();
      for (std::size_t b = 1 - half; b < some.size(); b += 2) some[b].reset();
      scatter.apply(list, some, 2);
      for (std::size_t b = 1; half == 0 && b < some.size(); b += 2) {
        const Buffer& buffer = world.destination->buffers()[b];
        CHECK(store.at(buffer.rank, buffer.name) == landed.at(buffer.rank, buffer.name));
      }
    }
    CHECK(store == expected);
  }
}

TEST_CASE("blocks with nothing in the buffers that are given are not decoded") {
  const std::int64_t n = 2048;
  const auto to = share(
      Layout({{"a", DType::kUInt8, {n}}, {"b", DType::kUInt8, {n}}}, {{0, "a", n}, {0, "b", n}},
             {{"a", {{0}, {n}}, 0, "a", 0, {1}}, {"b", {{0}, {n}}, 0, "b", 0, {1}}}));
  const auto from = share(one_buffer(*to));
  const Scatter scatter(make_plan(from, to), std::vector{*to});
  const std::vector<std::uint32_t> positions = {1, 5};
  const std::array<std::byte, 2> values = {std::byte{1}, std::byte{2}};
  Record record;
  Bytes payload;
  record.chunk_offsets = {0};
  for (int block = 0; block < 2; ++block) {
    record.descriptors.push_back(encode(positions, values.data(), n, 1, payload).word());
  }
  record.payload_nbytes = payload.size();
  const Staged staged = scatter.stage(0, record, payload);
  const std::vector<const Staged*> list = {&staged};
  Store store(*to);
  scatter.measure(list, store.memories());
  // Against the contract, so that a look at the codes of b shows.
  std::fill(payload.begin() + static_cast<std::ptrdiff_t>(payload.size() / 2), payload.end(),
            std::byte{0xff});
  reshard::Memories a = store.memories();
  a[1].reset();
  CHECK(scatter.apply(list, a) == 2);
  CHECK(store.at(0, "a")[1] == std::byte{1});
  CHECK(store.at(0, "a")[5] == std::byte{2});
  reshard::Memories b = store.memories();
  b[0].reset();
  CHECK_THROWS_AS(scatter.apply(list, b), Error);
}

TEST_CASE("a full pull by windows equals the plan's execution and the digests") {
  for (unsigned seed = 0; seed < 150; ++seed) {
    CAPTURE(seed);
    World world(seed);
    const Plan plan = make_plan(world.source, world.destination);
    Store after(*world.source);
    fill(*world.source, after, seed);
    Store expected(*world.destination, std::byte{0x11});
    execute(plan, after.memories(), expected.memories());
    const auto names = scatter_implementations();
    const Scatter scatter(plan, world.rounds, names[seed % names.size()]);
    Store store(*world.destination, std::byte{0x11});
    Sums sums(world.rounds.size() * world.source->tensors().size(), 0);
    for (const std::int64_t rank : scatter.ranks()) {
      const auto& data = after.at(rank, "snapshot");
      std::set<std::uint32_t> blocks;
      for (const Window& window :
           scatter.windows(rank, scatter.blocks(rank), world.random.between(1, 5000))) {
        Bytes image(static_cast<std::size_t>(window.end - window.begin), std::byte{0xcd});
        std::int64_t end = 0;
        for (const Range& range : window.ranges) {
          CHECK(range.nbytes > 0);
          CHECK((end == 0 || range.offset > end));
          end = range.end();
          std::copy_n(data.begin() + range.offset, range.nbytes,
                      image.begin() + (range.offset - window.begin));
        }
        blocks.insert(window.blocks.begin(), window.blocks.end());
        sums = added(sums, scatter.land(rank, window.blocks, image, window.begin, store.memories(),
                                        false, 2));
      }
      CHECK(std::equal(blocks.begin(), blocks.end(), scatter.blocks(rank).begin(),
                       scatter.blocks(rank).end()));
    }
    scatter.fill_padding(store.memories());
    CHECK(store == expected);
    CHECK(sums == digests(world.rounds, *world.source, *world.destination, expected));
  }
}

}  // namespace
}  // namespace kimisys::broadcast
