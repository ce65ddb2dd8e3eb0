#include "reshard/memory.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "base/error.h"

namespace kimisys::reshard {
namespace {

constexpr auto kBad = ErrorCode::kBufferMismatch;

const char* name_of(Side side) { return side == Side::kSource ? "source" : "destination"; }

struct Interval {
  const std::byte* begin;
  const std::byte* end;
  const Buffer* buffer;
  Side side;
};

void add_intervals(const Layout& layout, const std::vector<Memory>& memory, Side side,
                   std::vector<Interval>& intervals) {
  for (std::size_t i = 0; i < memory.size(); ++i) {
    if (memory[i].nbytes == 0) continue;
    intervals.push_back(
        {memory[i].data, memory[i].data + memory[i].nbytes, &layout.buffers()[i], side});
  }
}

}  // namespace

std::vector<Memory> needed_memory(const Layout& layout, const Memories& given,
                                  const std::vector<bool>& needed, Side side) {
  const std::vector<Buffer>& buffers = layout.buffers();
  std::vector<Memory> found(buffers.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (!needed[i]) continue;
    KIMISYS_CHECK(i < given.size() && given[i].has_value(), kBad, name_of(side), " buffer '",
                  buffers[i].name, "' of rank ", buffers[i].rank,
                  " is missing; pass it under the key (rank, name)");
    KIMISYS_CHECK(given[i]->nbytes == buffers[i].nbytes, kBad, name_of(side), " buffer '",
                  buffers[i].name, "' of rank ", buffers[i].rank, " has ", given[i]->nbytes,
                  " bytes where the layout says ", buffers[i].nbytes);
    KIMISYS_CHECK(side == Side::kSource || given[i]->writable, kBad, "destination buffer '",
                  buffers[i].name, "' of rank ", buffers[i].rank,
                  " is read-only; pass memory that may be written");
    found[i] = *given[i];
  }
  return found;
}

void check_no_overlap(const Layout& from, const std::vector<Memory>& sources, const Layout& to,
                      const std::vector<Memory>& destinations) {
  std::vector<Interval> intervals;
  add_intervals(from, sources, Side::kSource, intervals);
  add_intervals(to, destinations, Side::kDestination, intervals);
  const std::less<const std::byte*> before;
  std::sort(intervals.begin(), intervals.end(),
            [before](const Interval& a, const Interval& b) { return before(a.begin, b.begin); });
  // The interval that reaches furthest so far, of each side.
  const Interval* source = nullptr;
  const Interval* destination = nullptr;
  for (const Interval& it : intervals) {
    const auto check = [&](const Interval* other) {
      if (other == nullptr || !before(it.begin, other->end)) return;
      fail(kBad, name_of(it.side), " buffer '", it.buffer->name, "' of rank ", it.buffer->rank,
           " overlaps the memory of ", name_of(other->side), " buffer '", other->buffer->name,
           "' of rank ", other->buffer->rank,
           "; copy in place is not supported: give each destination memory of its own");
    };
    check(destination);
    if (it.side == Side::kDestination) check(source);
    const Interval*& furthest = it.side == Side::kDestination ? destination : source;
    if (furthest == nullptr || before(furthest->end, it.end)) furthest = &it;
  }
}

}  // namespace kimisys::reshard
