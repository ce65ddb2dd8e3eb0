#include "reshard/blocks.h"

#include <algorithm>
#include <array>

#include "reshard/box.h"
#include "reshard/memory.h"

namespace kimisys::reshard {
namespace {

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
  const auto source_memory = needed_memory(from, sources, is_read, Side::kSource);
  const auto destination_memory =
      needed_memory(to, destinations, written_buffers(plan), Side::kDestination);
  check_no_overlap(from, source_memory, to, destination_memory);

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
