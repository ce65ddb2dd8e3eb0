#include "reshard/execute.h"

#include <doctest/doctest.h>

#include <cstdlib>
#include <cstring>
#include <functional>

#include "expect.h"
#include "reshard/sample.h"

namespace kimisys::reshard {
namespace {

using test::sharded;
using test::share;
using test::Store;

void bad(std::initializer_list<const char*> words, const std::function<void()>& action) {
  kimisys::test::expect_error(ErrorCode::kBufferMismatch, words, action);
}

// Visits each element of a layout: fn(fragment, flat index in the whole tensor, byte in the
// buffer).
void for_each_element(
    const Layout& layout,
    const std::function<void(const Fragment&, std::size_t, std::int64_t, std::int64_t)>& fn) {
  for (std::size_t i = 0; i < layout.fragments().size(); ++i) {
    const Fragment& fragment = layout.fragments()[i];
    const Tensor& tensor = layout.tensors()[layout.tensor_of(i)];
    const Dims weight = test::dense_strides(tensor.shape, 1);
    for (std::int64_t n = 0; n < fragment.region.elements(); ++n) {
      std::int64_t rest = n;
      std::int64_t flat = 0;
      std::int64_t byte = fragment.byte_offset;
      for (std::size_t d = tensor.shape.size(); d-- > 0;) {
        const std::int64_t at = rest % fragment.region.extent[d];
        rest /= fragment.region.extent[d];
        flat += (fragment.region.offset[d] + at) * weight[d];
        byte += at * fragment.byte_strides[d];
      }
      fn(fragment, layout.tensor_of(i), flat, byte);
    }
  }
}

// A value that tells tensor and element apart, and survives the cast to bfloat16 and back.
std::int64_t value_of(std::size_t tensor, std::int64_t flat) {
  return (static_cast<std::int64_t>(tensor) * 31 + flat * 7) % 251;
}

void store(DType dtype, std::int64_t value, std::byte* at) {
  const auto number = static_cast<float>(value);
  std::uint32_t bits = 0;
  std::memcpy(&bits, &number, sizeof(bits));
  if (dtype == DType::kBFloat16) bits >>= 16U;
  const bool is_float = dtype == DType::kFloat32 || dtype == DType::kBFloat16;
  const auto raw = is_float ? static_cast<std::int64_t>(bits) : value;
  std::memcpy(at, &raw, static_cast<std::size_t>(itemsize(dtype)));
}

Store filled(const Layout& layout) {
  Store it(layout, std::byte{0});
  for_each_element(layout, [&](const Fragment& fragment, std::size_t tensor, std::int64_t flat,
                               std::int64_t byte) {
    store(layout.tensors()[tensor].dtype, value_of(tensor, flat),
          it.at(fragment.rank, fragment.buffer).data() + byte);
  });
  return it;
}

}  // namespace

TEST_CASE("random layouts: each implementation writes exactly what the definition says") {
  test::Random random(6);
  const std::vector<std::pair<DType, DType>> casts = {
      {DType::kFloat32, DType::kBFloat16}, {DType::kBFloat16, DType::kFloat32},
      {DType::kFloat32, DType::kFloat32},  {DType::kBFloat16, DType::kBFloat16},
      {DType::kUInt8, DType::kUInt8},      {DType::kFloat8E4M3FN, DType::kFloat8E4M3FN},
      {DType::kInt64, DType::kInt64}};
  for (int round = 0; round < 400; ++round) {
    std::vector<Tensor> from;
    std::vector<Tensor> to;
    for (const char* name : {"a", "b", "c"}) {
      const auto& [source, destination] = casts[static_cast<std::size_t>(
          random.between(0, static_cast<std::int64_t>(casts.size()) - 1))];
      const Dims shape = random.shape();
      from.push_back({name, source, shape});
      to.push_back({name, destination, shape});
    }
    const Layout source = random.layout(from, 3, true);
    const Layout destination = random.layout(to, 2, false);
    const Plan plan = make_plan(share(source), share(destination));
    Store sources = filled(source);
    const Store expected = filled(destination);
    for (const std::string& name : implementations()) {
      for (const std::size_t threads : {1, 3}) {
        Store written(destination);
        execute(plan, sources.memories(), written.memories(), {threads, name});
        CAPTURE(name);
        CHECK(written == expected);
      }
    }
    for (const std::int64_t rank : destination.ranks()) {
      const Plan part = plan.of_rank(rank);
      Store written(part.destination());
      execute(part, sources.memories(), written.memories());
      CHECK(written == filled(part.destination()));
    }
  }
}

TEST_CASE("large copies are split among threads and transposed in squares") {
  for (const DType dtype : {DType::kUInt8, DType::kBFloat16, DType::kFloat32, DType::kInt64}) {
    const Dims shape = {3, 301, 517};
    const std::int64_t item = itemsize(dtype);
    const Layout source({{"w", dtype, shape}}, {{0, "x", 3 * 301 * 517 * item}},
                        {{"w", {{0, 0, 0}, shape}, 0, "x", 0, {item, 3 * 517 * item, 3 * item}}});
    const Layout destination(
        {{"w", dtype, shape}}, {{0, "y", 3 * 301 * 517 * item}},
        {{"w", {{0, 0, 0}, shape}, 0, "y", 0, {301 * 517 * item, item, 301 * item}}});
    const Plan plan = make_plan(share(source), share(destination));
    Store sources = filled(source);
    for (const std::string& name : implementations()) {
      Store written(destination);
      execute(plan, sources.memories(), written.memories(), {4, name});
      CHECK(written == filled(destination));
    }
  }
}

TEST_CASE("thin transposes, and any number of threads") {
  for (const DType dtype : {DType::kUInt8, DType::kBFloat16, DType::kInt64}) {
    const std::int64_t item = itemsize(dtype);
    for (const auto& [rows, columns] : {std::pair{3L, 5003L}, {5003L, 3L}, {15L, 1025L}}) {
      const Dims shape = {2, rows, columns};
      const std::int64_t plane = rows * columns * item;
      const Layout source({{"w", dtype, shape}}, {{0, "x", 2 * plane}},
                          {{"w", {{0, 0, 0}, shape}, 0, "x", 0, {plane, item, rows * item}}});
      const Layout destination(
          {{"w", dtype, shape}}, {{0, "y", 2 * plane}},
          {{"w", {{0, 0, 0}, shape}, 0, "y", 0, {plane, columns * item, item}}});
      const Plan plan = make_plan(share(source), share(destination));
      Store sources = filled(source);
      for (const std::string& name : implementations()) {
        for (const std::size_t threads : {std::size_t{3}, std::size_t{1} << 62, ~std::size_t{0}}) {
          Store written(destination);
          execute(plan, sources.memories(), written.memories(), {threads, name});
          CHECK(written == filled(destination));
        }
      }
    }
  }
}

TEST_CASE("nothing is written unless everything is in place") {
  const Layout source = sharded("w", DType::kInt8, {8, 8}, 0, 2);
  const Layout destination = sharded("w", DType::kInt8, {8, 8}, 1, 2);
  const Plan plan = make_plan(share(source), share(destination));
  Store from = filled(source);
  Store to(destination);
  const Store untouched(destination);
  SUBCASE("a source is missing") {
    from.memory(1, "w").reset();
    bad({"source buffer 'w' of rank 1", "missing"},
        [&] { execute(plan, from.memories(), to.memories()); });
  }
  SUBCASE("a destination is missing") {
    to.memory(1, "w").reset();
    bad({"destination buffer 'w' of rank 1"},
        [&] { execute(plan, from.memories(), to.memories()); });
  }
  SUBCASE("a source is short") {
    from.memory(1, "w")->nbytes = 31;
    bad({"source buffer 'w' of rank 1", "31", "32"},
        [&] { execute(plan, from.memories(), to.memories()); });
  }
  SUBCASE("a destination is long") {
    to.memory(1, "w")->nbytes = 33;
    bad({"destination buffer 'w' of rank 1", "33"},
        [&] { execute(plan, from.memories(), to.memories()); });
  }
  SUBCASE("a destination is read-only") {
    to.memory(1, "w")->writable = false;
    bad({"'w' of rank 1", "read-only"}, [&] { execute(plan, from.memories(), to.memories()); });
  }
  SUBCASE("a destination lies in a source") {
    auto& inside = to.memory(1, "w");
    inside->data = from.memory(0, "w")->data;
    bad({"overlaps", "rank 0", "rank 1"}, [&] { execute(plan, from.memories(), to.memories()); });
  }
  SUBCASE("two destinations share memory") {
    to.memory(1, "w")->data = to.memory(0, "w")->data;
    bad({"overlaps", "rank 0", "rank 1"}, [&] { execute(plan, from.memories(), to.memories()); });
  }
  SUBCASE("the implementation is unknown") {
    kimisys::test::expect_error(ErrorCode::kLayout, {"'fast'", "generic, naive"}, [&] {
      execute(plan, from.memories(), to.memories(), {0, "fast"});
    });
    setenv("KIMISYS_RESHARD_IMPLEMENTATION", "faster", 1);
    kimisys::test::expect_error(ErrorCode::kLayout, {"'faster'"},
                                [&] { execute(plan, from.memories(), to.memories()); });
    unsetenv("KIMISYS_RESHARD_IMPLEMENTATION");
  }
  CHECK(to == untouched);
}

TEST_CASE("overlap is found behind a small source that lies inside a large one") {
  const Layout source({{"w", DType::kInt8, {40}}}, {{0, "x", 30}, {1, "x", 10}},
                      {{"w", {{0}, {30}}, 0, "x", 0, {1}}, {"w", {{30}, {10}}, 1, "x", 0, {1}}});
  const Layout destination = sharded("w", DType::kInt8, {40}, 0, 1);
  const Plan plan = make_plan(share(source), share(destination));
  std::vector<std::byte> memory(80);
  const Memories from = {Memory{memory.data(), 30, false}, Memory{memory.data() + 5, 10, false}};
  bad({"destination buffer 'w' of rank 0", "source buffer 'x' of rank 0"},
      [&] { execute(plan, from, {Memory{memory.data() + 20, 40, true}}); });
  CHECK_NOTHROW(execute(plan, from, {Memory{memory.data() + 30, 40, true}}));
}

TEST_CASE("sources may share memory, and unread sources may be absent") {
  const Layout source({{"w", DType::kInt8, {4}}}, {{0, "x", 4}, {1, "x", 4}, {2, "unread", 9}},
                      {{"w", {{0}, {4}}, 0, "x", 0, {1}}, {"w", {{0}, {4}}, 1, "x", 0, {1}}}, {},
                      {{0, 0}, {1, 1}});
  const Layout destination({{"w", DType::kInt8, {4}}}, {{0, "x", 4}, {1, "x", 4}},
                           {{"w", {{0}, {4}}, 0, "x", 0, {1}}, {"w", {{0}, {4}}, 1, "x", 0, {1}}},
                           {}, {{0, 0}, {1, 1}});
  const Plan plan = make_plan(share(source), share(destination));
  Store from = filled(source);
  from.memory(1, "x") = from.memory(0, "x");
  from.memory(2, "unread").reset();
  Store to(destination);
  execute(plan, from.memories(), to.memories());
  CHECK(to == filled(destination));
}

}  // namespace kimisys::reshard
