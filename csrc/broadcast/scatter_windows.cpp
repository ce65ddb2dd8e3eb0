// Which bytes of a trainer rank's snapshot data hold which blocks, and landing them.
#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "base/thread_pool.h"
#include "broadcast/scatter.h"
#include "broadcast/scatter_boxes.h"
#include "reshard/box.h"
#include "reshard/stream.h"
#include "reshard/tiling.h"

namespace kimisys::broadcast {
namespace {

using reshard::Fragment;
using reshard::Memories;
using reshard::Memory;
using reshard::Piece;

const Fragment& fragment_of(const Targets& targets, std::size_t place) {
  return targets.layout().fragments()[targets.block(place).fragment];
}

// From the first to the last byte of a box in the snapshot's data.
Range span_of(const Fragment& fragment, const reshard::Region& box, std::int64_t itemsize) {
  Range range{reshard::byte_offset_at(fragment, box.offset), itemsize};
  for (std::size_t d = 0; d < box.extent.size(); ++d) {
    range.nbytes += (box.extent[d] - 1) * fragment.byte_strides[d];
  }
  return range;
}

Range span_of(const Targets& targets, std::size_t place) {
  Range all{};
  for (const Target& target : targets.of(place)) {
    const Range range =
        span_of(fragment_of(targets, place), target.box, targets.itemsize_of(place));
    const std::int64_t begin = all.nbytes == 0 ? range.offset : std::min(all.offset, range.offset);
    all = {begin, std::max(all.nbytes == 0 ? range.end() : all.end(), range.end()) - begin};
  }
  return all;
}

// The runs of bytes that the targets of a block read.
void add_ranges(const Targets& targets, std::size_t place, std::vector<Range>& ranges) {
  const Fragment& fragment = fragment_of(targets, place);
  for (const Target& target : targets.of(place)) {
    const Piece piece =
        reshard::make_piece(reshard::byte_offset_at(fragment, target.box.offset), target.box.extent,
                            fragment.byte_strides, targets.itemsize_of(place), 0);
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

std::vector<std::size_t> places_of(const Targets& targets, std::span<const std::uint32_t> blocks) {
  std::vector<std::size_t> places;
  places.reserve(blocks.size());
  for (const std::uint32_t block : blocks) {
    const std::size_t place = targets.find(block);
    KIMISYS_CHECK(place < targets.needed().size(), ErrorCode::kLayout, "block ", block,
                  " of trainer rank ", targets.rank(),
                  " is not needed here; ask for blocks() of this rank");
    places.push_back(place);
  }
  std::vector<std::size_t> sorted = places;
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  KIMISYS_CHECK(twice == sorted.end(), ErrorCode::kLayout, "block ", targets.needed()[*twice],
                " of trainer rank ", targets.rank(), " is given twice; give each once");
  return places;
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
  const std::vector<std::size_t> places = places_of(targets, blocks);
  std::vector<Range> spans;
  for (const std::size_t place : places) spans.push_back(span_of(targets, place));
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

Sums Scatter::land(std::int64_t rank, std::span<const std::uint32_t> blocks,
                   std::span<const std::byte> image, std::int64_t begin,
                   const Memories& destinations, bool subtract, std::size_t threads) const {
  const Targets& targets = *this->targets(rank);
  const std::vector<std::size_t> places = places_of(targets, blocks);
  const auto end = begin + static_cast<std::int64_t>(image.size());
  for (const std::size_t place : places) {
    const Range range = span_of(targets, place);
    KIMISYS_CHECK(range.offset >= begin && range.end() <= end, ErrorCode::kBufferMismatch, "block ",
                  targets.needed()[place], " of trainer rank ", rank, " lies in bytes ",
                  range.offset, " to ", range.end(), " of the snapshot, the image holds ", begin,
                  " to ", end, "; read a window of windows() that has the block");
  }
  const std::vector<Memory> memory = checked(destinations, true);
  std::vector<std::vector<std::uint64_t>> by_place(places.size());
  parallel_for(places.size(), threads, [&](std::size_t i) {
    const std::size_t place = places[i];
    const Fragment& fragment = fragment_of(targets, place);
    const auto& tensor =
        targets.layout().tensors()[targets.layout().tensor_of(targets.block(place).fragment)];
    for (const Target& target : targets.of(place)) {
      const std::byte* source =
          image.data() + (reshard::byte_offset_at(fragment, target.box.offset) - begin);
      const Box box = make_box(tensor, target, source, fragment.byte_strides,
                               memory[target.buffer].data, implementation_ != "naive");
      const bool counts = !sums_[target.sum].rounds.empty();
      by_place[i].push_back(run_box(box, {true, counts, counts && subtract}, implementation_));
    }
    reshard::finish_streaming();
  });
  std::vector<std::uint64_t> by_sum(sums_.size(), 0);
  for (std::size_t i = 0; i < places.size(); ++i) {
    const std::span<const Target> list = targets.of(places[i]);
    for (std::size_t t = 0; t < list.size(); ++t) by_sum[list[t].sum] += by_place[i][t];
  }
  return spread(by_sum);
}

void Scatter::fill_padding(const Memories& destinations) const {
  const std::vector<Memory> memory = checked(destinations, true);
  if (!fills_padding_) return;
  for (std::size_t i = 0; i < destination_->padding().size(); ++i) {
    const reshard::Padding& padding = destination_->padding()[i];
    if (padding.nbytes == 0) continue;
    std::fill_n(memory[destination_->buffer_of_padding(i)].data + padding.byte_offset,
                padding.nbytes, std::byte{0});
  }
}

}  // namespace kimisys::broadcast
