#include "reshard/table.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "reshard/sample.h"

namespace kimisys::reshard {
namespace {

using test::share;
using test::Store;

struct Place {
  std::int64_t source = 0;
  std::int64_t destination = 0;
};

// Where word `index` of a row lies, in units, by the row's magic numbers.
Place place_of(const std::int64_t* row, std::int64_t index) {
  Place place;
  std::int64_t rest = index;
  const std::int64_t* axis = row + TableColumn::kCount;
  for (std::int64_t i = 0; i < row[TableColumn::kAxes]; ++i, axis += AxisColumn::kCount) {
    const std::int64_t quotient = (rest * axis[AxisColumn::kMagic]) >> axis[AxisColumn::kShift];
    CHECK(quotient == rest / axis[AxisColumn::kExtent]);
    const std::int64_t at = rest - quotient * axis[AxisColumn::kExtent];
    place.source += at * axis[AxisColumn::kSourceStride];
    place.destination += at * axis[AxisColumn::kDestinationStride];
    rest = quotient;
  }
  CHECK(rest == 0);
  return place;
}

struct Kind {
  std::int64_t source_unit;
  std::int64_t destination_unit;
  std::int64_t read;      // bytes, which lie at a multiple of source_unit
  std::int64_t written;   // and of destination_unit
  std::int64_t elements;  // of a cast; 0: a copy
};

Kind kind_of(std::int64_t word) {
  switch (static_cast<Word>(word)) {
    case Word::kNarrow4:
      return {16, 8, 16, 8, 4};
    case Word::kNarrow:
      return {4, 2, 4, 2, 1};
    case Word::kNarrowBytes:
      return {1, 1, 4, 2, 1};
    case Word::kWiden4:
      return {8, 16, 8, 16, 4};
    case Word::kWiden:
      return {2, 4, 2, 4, 1};
    case Word::kWidenBytes:
      return {1, 1, 2, 4, 1};
    default:
      return {16 >> word, 16 >> word, 16 >> word, 16 >> word, 0};
  }
}

void run_word(const Kind& kind, const std::byte* source, std::byte* destination) {
  if (kind.elements == 0) {
    const auto bytes = static_cast<std::size_t>(kind.written);
    if (source == nullptr) {
      std::memset(destination, 0, bytes);
    } else {
      std::memcpy(destination, source, bytes);
    }
    return;
  }
  for (std::int64_t i = 0; i < kind.elements; ++i) {
    if (kind.read > kind.written) {
      std::uint32_t wide = 0;
      std::memcpy(&wide, source + 4 * i, 4);
      const std::uint16_t narrow = bfloat16_bits(wide);
      std::memcpy(destination + 2 * i, &narrow, 2);
    } else {
      std::uint16_t narrow = 0;
      std::memcpy(&narrow, source + 2 * i, 2);
      const std::uint32_t wide = float32_bits(narrow);
      std::memcpy(destination + 4 * i, &wide, 4);
    }
  }
}

// What a device does with a table, word after word.
void run_table(const std::vector<std::int64_t>& table) {
  REQUIRE(table.size() % kTableColumns == 0);
  for (std::size_t begin = 0; begin < table.size(); begin += kTableColumns) {
    const std::int64_t* row = table.data() + begin;
    const Kind kind = kind_of(row[TableColumn::kWord]);
    auto* source = reinterpret_cast<const std::byte*>(row[TableColumn::kSource]);
    auto* destination = reinterpret_cast<std::byte*>(row[TableColumn::kDestination]);
    for (std::int64_t i = 0; i < row[TableColumn::kWords]; ++i) {
      const Place place = place_of(row, i);
      const std::byte* from =
          source == nullptr ? nullptr : source + place.source * kind.source_unit;
      std::byte* to = destination + place.destination * kind.destination_unit;
      CHECK(reinterpret_cast<std::int64_t>(from) % kind.source_unit == 0);
      CHECK(reinterpret_cast<std::int64_t>(to) % kind.destination_unit == 0);
      run_word(kind, from, to);
    }
  }
}

std::vector<std::int64_t> table_of(const Plan& plan, const Store& from, const Store& to,
                                   std::int64_t row_bytes = kRowBytes) {
  return make_table(bind_blocks(plan, from.memories(), to.memories()), row_bytes);
}

}  // namespace

TEST_CASE("a table's words do what the naive implementation does") {
  test::Random random(7);
  const std::vector<std::pair<DType, DType>> casts = {
      {DType::kFloat32, DType::kBFloat16}, {DType::kBFloat16, DType::kFloat32},
      {DType::kFloat32, DType::kFloat32},  {DType::kBFloat16, DType::kBFloat16},
      {DType::kUInt8, DType::kUInt8},      {DType::kInt64, DType::kInt64}};
  for (int round = 0; round < 300; ++round) {
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
    const Store sources(source, std::byte{0x5a});
    Store expected(destination);
    execute(plan, sources.memories(), expected.memories(), {1, "naive"});
    for (const std::int64_t row_bytes : {std::int64_t{16}, kRowBytes}) {
      Store written(destination);
      run_table(table_of(plan, sources, written, row_bytes));
      CHECK(written == expected);
    }
  }
}

TEST_CASE("long runs move in words of 16 bytes, whatever their ends") {
  const Dims shape = {1001};
  const Tensor tensor{"w", DType::kBFloat16, shape};
  const auto side = [&](std::int64_t offset) {
    return share(Layout({tensor}, {{0, "x", 4096}}, {{"w", {{0}, shape}, 0, "x", offset, {2}}},
                        {{0, "x", 0, offset}, {0, "x", offset + 2002, 4096 - 2002 - offset}}));
  };
  const auto words = [&](std::int64_t from, std::int64_t to) {
    const Plan plan = make_plan(side(from), side(to));
    alignas(16) static std::array<std::byte, 2 * 4096> memory = {};
    const auto table = make_table(bind_blocks(plan, {Memory{memory.data(), 4096, true}},
                                              {Memory{memory.data() + 4096, 4096, true}}));
    std::int64_t count = 0;
    for (std::size_t row = 0; row < table.size(); row += kTableColumns) {
      count += table[row + TableColumn::kWords];
    }
    return count;
  };
  // 4096 bytes, copied and blank, of which only the ends of runs take words of less than 16.
  CHECK(words(0, 0) <= 4096 / 16 + 32);
  CHECK(words(6, 6) <= 4096 / 16 + 64);
  CHECK(words(22, 6) <= 4096 / 16 + 64);
  // Ends 4 bytes apart.
  CHECK(words(4, 0) <= 4096 / 4 + 64);
}

TEST_CASE("copies of many gigabytes are cut into rows that 31 bits count") {
  const std::int64_t size = std::int64_t{5} << 30;
  const Dims shape = {size / 2, 2};
  const Layout source({{"w", DType::kInt8, shape}}, {{0, "x", size}},
                      {{"w", {{0, 0}, shape}, 0, "x", 0, {1, size / 2}}});
  const Layout destination({{"w", DType::kInt8, shape}}, {{0, "x", size}},
                           {{"w", {{0, 0}, shape}, 0, "x", 0, {2, 1}}});
  const Plan plan = make_plan(share(source), share(destination));
  // Only addresses: nothing is read or written.
  const auto at = [&](std::int64_t address) {
    return Memories{Memory{reinterpret_cast<std::byte*>(address), size, true}};
  };
  const auto table =
      make_table(bind_blocks(plan, at(std::int64_t{1} << 40), at(std::int64_t{1} << 41)));
  std::int64_t words = 0;
  for (std::size_t row = 0; row < table.size(); row += kTableColumns) {
    CHECK(table[row + TableColumn::kWords] <= kRowBytes);
    words += table[row + TableColumn::kWords];
    // The last word of each row, by its magic numbers.
    place_of(table.data() + row, table[row + TableColumn::kWords] - 1);
  }
  CHECK(words == size);
}

}  // namespace kimisys::reshard
