// Which bytes of a trainer rank's snapshot data hold which blocks.
#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "broadcast/scatter.h"
#include "reshard/box.h"
#include "reshard/tiling.h"

namespace kimisys::broadcast {
namespace {

using reshard::Fragment;
using reshard::Piece;

// The runs of bytes that the targets of a block read.
void add_ranges(const Targets& targets, std::size_t place, std::vector<Range>& ranges) {
  const Fragment& fragment = targets.fragment(place);
  for (const Target& target : targets.of(place)) {
    const Piece piece =
        reshard::make_piece(reshard::byte_offset_at(fragment, target.box.offset), target.box.extent,
                            fragment.byte_strides, itemsize(targets.tensor(place).dtype), 0);
    std::int64_t runs = 1;
    for (const Piece::Axis& axis : piece.axes) runs *= axis.extent;
    for (std::int64_t run = 0; run < runs; ++run) {
      std::int64_t offset = piece.offset;
      std::int64_t rest = run;
      for (std::size_t d = piece.axes.size(); d-- > 0; rest /= piece.axes[d].extent) {
        offset += rest % piece.axes[d].extent * piece.axes[d].stride;
      }
      ranges.push_back({offset, piece.run});
    }
  }
}

}  // namespace

std::vector<Range> merge_ranges(std::vector<Range> ranges, std::int64_t gap) {
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.offset < b.offset; });
  std::vector<Range> merged;
  for (const Range& range : ranges) {
    if (!merged.empty() && range.offset <= merged.back().end() + gap) {
      merged.back().nbytes = std::max(merged.back().end(), range.end()) - merged.back().offset;
    } else {
      merged.push_back(range);
    }
  }
  return merged;
}

std::vector<Window> Scatter::windows(std::int64_t rank, std::span<const std::uint32_t> blocks,
                                     std::int64_t limit) const {
  KIMISYS_CHECK(limit > 0, ErrorCode::kLayout, "a window of ", limit,
                " bytes holds nothing; give a positive limit");
  const Targets& targets = *this->targets(rank);
  const std::vector<std::size_t> places = targets.places(blocks);
  std::vector<Range> spans;
  for (const std::size_t place : places) spans.push_back(targets.span(place));
  std::vector<std::size_t> order(places.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return spans[a].offset < spans[b].offset; });
  std::vector<Window> windows;
  std::vector<Range> ranges;
  const auto close = [&] {
    if (!windows.empty()) windows.back().ranges = merge_ranges(std::move(ranges), 0);
    ranges = {};
  };
  for (const std::size_t i : order) {
    if (windows.empty() ||
        std::max(windows.back().end, spans[i].end()) - windows.back().begin > limit) {
      close();
      windows.push_back({spans[i].offset, spans[i].end(), {}, {}});
    }
    windows.back().end = std::max(windows.back().end, spans[i].end());
    windows.back().blocks.push_back(targets.needed()[places[i]]);
    add_ranges(targets, places[i], ranges);
  }
  close();
  return windows;
}

}  // namespace kimisys::broadcast
