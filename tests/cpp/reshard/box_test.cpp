#include "reshard/box.h"

#include <doctest/doctest.h>

#include <algorithm>

#include "reshard/sample.h"

namespace kimisys::reshard {

TEST_CASE("intersection") {
  CHECK(*intersect({{0, 0}, {4, 4}}, {{2, 3}, {4, 4}}) == Region{{2, 3}, {2, 1}});
  CHECK_FALSE(intersect({{0, 0}, {4, 4}}, {{4, 0}, {4, 4}}));
  CHECK(*intersect({{}, {}}, {{}, {}}) == Region{{}, {}});
}

TEST_CASE("subtraction leaves disjoint boxes with the rest of the elements") {
  test::Random random(1);
  for (int round = 0; round < 300; ++round) {
    const Region box{{3, 4, 5}, {random.between(1, 6), random.between(1, 6), random.between(1, 6)}};
    const Region hole = random.part_of(box);
    if (hole.empty()) continue;
    std::vector<Region> rest;
    subtract(box, hole, rest);
    std::int64_t volume = hole.elements();
    for (std::size_t i = 0; i < rest.size(); ++i) {
      volume += rest[i].elements();
      CHECK_FALSE(rest[i].empty());
      CHECK_FALSE(intersect(rest[i], hole));
      for (std::size_t j = 0; j < i; ++j) CHECK_FALSE(intersect(rest[i], rest[j]));
    }
    CHECK(volume == box.elements());
  }
}

TEST_CASE("the index finds what a scan of all boxes finds") {
  test::Random random(2);
  for (int round = 0; round < 100; ++round) {
    const Region whole{{0, 0}, {40, 40}};
    std::vector<Region> boxes;
    while (boxes.size() < 60) {
      Region box = random.part_of(whole);
      if (!box.empty()) boxes.push_back(box);
    }
    std::vector<const Region*> pointers;
    for (const Region& box : boxes) pointers.push_back(&box);
    const BoxIndex index(pointers);
    const Region query = boxes[static_cast<std::size_t>(random.between(0, 59))];
    std::vector<std::size_t> found = index.overlapping(query);
    std::sort(found.begin(), found.end());
    std::vector<std::size_t> expected;
    for (std::size_t i = 0; i < boxes.size(); ++i) {
      if (intersect(boxes[i], query)) expected.push_back(i);
    }
    CHECK(found == expected);
  }
}

}  // namespace kimisys::reshard
