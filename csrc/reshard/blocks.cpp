#include "reshard/blocks.h"

#include <algorithm>
#include <array>
#include <functional>
#include <utility>

#include "base/error.h"
#include "reshard/box.h"

namespace kimisys::reshard {
namespace {

constexpr auto kBad = ErrorCode::kBufferMismatch;

// Fills what the plan needs of one side's memory: null data where a buffer is not needed.
std::vector<Memory> resolve(const Layout& layout, const Memories& given,
                            const std::vector<bool>& needed, const char* side) {
  const std::vector<Buffer>& buffers = layout.buffers();
  std::vector<Memory> found(buffers.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (!needed[i]) continue;
    KIMISYS_CHECK(i < given.size() && given[i].has_value(), kBad, side, " buffer '",
                  buffers[i].name, "' of rank ", buffers[i].rank,
                  " is missing; pass it under the key (rank, name)");
    KIMISYS_CHECK(given[i]->nbytes == buffers[i].nbytes, kBad, side, " buffer '", buffers[i].name,
                  "' of rank ", buffers[i].rank, " has ", given[i]->nbytes,
                  " bytes where the layout says ", buffers[i].nbytes);
    found[i] = *given[i];
  }
  return found;
}

// Buffers of the destination that are asked for: all of them, or those that a share writes into.
std::vector<bool> written_buffers(const Plan& plan) {
  const Layout& to = plan.destination();
  std::vector<bool> is_written(to.buffers().size(), !plan.share_of());
  for (const Step& step : plan.steps()) is_written[to.buffer_of(step.destination_fragment)] = true;
  if (!plan.fills_padding()) return is_written;
  for (std::size_t i = 0; i < to.padding().size(); ++i) {
    if (to.padding()[i].nbytes > 0) is_written[to.buffer_of_padding(i)] = true;
  }
  return is_written;
}

void check_writable(const Layout& layout, const std::vector<Memory>& memory,
                    const std::vector<bool>& is_written) {
  for (std::size_t i = 0; i < memory.size(); ++i) {
    KIMISYS_CHECK(!is_written[i] || memory[i].writable, kBad, "destination buffer '",
                  layout.buffers()[i].name, "' of rank ", layout.buffers()[i].rank,
                  " is read-only; pass memory that may be written");
  }
}

struct Interval {
  const std::byte* begin;
  const std::byte* end;
  const Buffer* buffer;
  bool is_destination;
};

void add_intervals(const Layout& layout, const std::vector<Memory>& memory, bool is_destination,
                   std::vector<Interval>& intervals) {
  for (std::size_t i = 0; i < memory.size(); ++i) {
    if (memory[i].nbytes == 0) continue;
    intervals.push_back(
        {memory[i].data, memory[i].data + memory[i].nbytes, &layout.buffers()[i], is_destination});
  }
}

void check_no_overlap(std::vector<Interval> intervals) {
  const std::less<const std::byte*> before;
  std::sort(intervals.begin(), intervals.end(),
            [before](const Interval& a, const Interval& b) { return before(a.begin, b.begin); });
  // The interval that reaches furthest so far, of each kind. Sources may share memory.
  const Interval* source = nullptr;
  const Interval* destination = nullptr;
  for (const Interval& it : intervals) {
    const auto check = [&](const Interval* other) {
      if (other == nullptr || !before(it.begin, other->end)) return;
      fail(kBad, it.is_destination ? "destination" : "source", " buffer '", it.buffer->name,
           "' of rank ", it.buffer->rank, " overlaps the memory of ",
           other->is_destination ? "destination" : "source", " buffer '", other->buffer->name,
           "' of rank ", other->buffer->rank, "; copy in place is not supported");
    };
    check(destination);
    if (it.is_destination) check(source);
    const Interval*& furthest = it.is_destination ? destination : source;
    if (furthest == nullptr || before(furthest->end, it.end)) furthest = &it;
  }
}

DType dtype_of(const Layout& layout, std::size_t fragment) {
  return layout.tensors()[layout.tensor_of(fragment)].dtype;
}

Block make_block(const Plan& plan, const Step& step, const std::byte* source,
                 std::byte* destination) {
  const Fragment& from = plan.source().fragments()[step.source_fragment];
  const Fragment& to = plan.destination().fragments()[step.destination_fragment];
  Block block{.source = source + byte_offset_at(from, step.region.offset),
              .destination = destination + byte_offset_at(to, step.region.offset),
              .dims = step.region.extent.size(),
              .source_dtype = dtype_of(plan.source(), step.source_fragment),
              .destination_dtype = dtype_of(plan.destination(), step.destination_fragment)};
  for (std::size_t d = 0; d < block.dims; ++d) {
    block.axes[d] = {step.region.extent[d], from.byte_strides[d], to.byte_strides[d]};
  }
  return block;
}

}  // namespace

Blocks bind_blocks(const Plan& plan, const Memories& sources, const Memories& destinations) {
  const Layout& from = plan.source();
  const Layout& to = plan.destination();
  std::vector<bool> is_read(from.buffers().size(), false);
  for (const Step& step : plan.steps()) is_read[from.buffer_of(step.source_fragment)] = true;
  const std::vector<bool> is_written = written_buffers(plan);
  const auto source_memory = resolve(from, sources, is_read, "source");
  const auto destination_memory = resolve(to, destinations, is_written, "destination");
  check_writable(to, destination_memory, is_written);
  std::vector<Interval> intervals;
  add_intervals(from, source_memory, false, intervals);
  add_intervals(to, destination_memory, true, intervals);
  check_no_overlap(std::move(intervals));

  Blocks made;
  made.copies.reserve(plan.steps().size());
  for (const Step& step : plan.steps()) {
    made.copies.push_back(
        make_block(plan, step, source_memory[from.buffer_of(step.source_fragment)].data,
                   destination_memory[to.buffer_of(step.destination_fragment)].data));
  }
  const std::size_t paddings = plan.fills_padding() ? to.padding().size() : 0;
  for (std::size_t i = 0; i < paddings; ++i) {
    const Padding& padding = to.padding()[i];
    if (padding.nbytes == 0) continue;
    made.blanks.push_back(
        {destination_memory[to.buffer_of_padding(i)].data + padding.byte_offset, padding.nbytes});
  }
  return made;
}

void collapse(Block& block) {
  std::array<Block::Axis, kMaxDims> sorted = {};
  std::size_t count = 0;
  for (std::size_t d = 0; d < block.dims; ++d) {
    if (block.axes[d].extent != 1) sorted[count++] = block.axes[d];
  }
  const auto first = sorted.begin();
  std::stable_sort(first, first + static_cast<std::ptrdiff_t>(count),
                   [](const Block::Axis& a, const Block::Axis& b) {
                     return a.destination_stride > b.destination_stride;
                   });
  block.dims = 0;
  for (std::size_t d = 0; d < count; ++d) {
    const Block::Axis& inner = sorted[d];
    if (block.dims > 0) {
      Block::Axis& outer = block.axes[block.dims - 1];
      if (outer.source_stride == inner.source_stride * inner.extent &&
          outer.destination_stride == inner.destination_stride * inner.extent) {
        outer = {outer.extent * inner.extent, inner.source_stride, inner.destination_stride};
        continue;
      }
    }
    block.axes[block.dims++] = inner;
  }
  if (block.dims == 0) {
    block.axes[block.dims++] = {1, itemsize(block.source_dtype), itemsize(block.destination_dtype)};
  }
}

}  // namespace kimisys::reshard
