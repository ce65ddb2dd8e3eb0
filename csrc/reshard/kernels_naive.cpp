#include <cstring>

#include "reshard/kernels.h"

namespace kimisys::reshard {
namespace {

void copy_element(const Block& block, const std::byte* source, std::byte* destination) {
  if (block.source_dtype == block.destination_dtype) {
    std::memcpy(destination, source, static_cast<std::size_t>(itemsize(block.source_dtype)));
  } else if (block.source_dtype == DType::kFloat32) {
    std::uint32_t wide = 0;
    std::memcpy(&wide, source, sizeof(wide));
    const std::uint16_t narrow = bfloat16_bits(wide);
    std::memcpy(destination, &narrow, sizeof(narrow));
  } else {
    std::uint16_t narrow = 0;
    std::memcpy(&narrow, source, sizeof(narrow));
    const std::uint32_t wide = float32_bits(narrow);
    std::memcpy(destination, &wide, sizeof(wide));
  }
}

void copy_block(const Block& block, std::size_t axis, const std::byte* source,
                std::byte* destination) {
  if (axis == block.dims) {
    copy_element(block, source, destination);
    return;
  }
  const Block::Axis& it = block.axes[axis];
  for (std::int64_t i = 0; i < it.extent; ++i) {
    copy_block(block, axis + 1, source + i * it.source_stride,
               destination + i * it.destination_stride);
  }
}

}  // namespace

void execute_naive(std::span<const Block> blocks, std::span<const Blank> blanks) {
  for (const Block& block : blocks) copy_block(block, 0, block.source, block.destination);
  for (const Blank& blank : blanks) {
    for (std::int64_t i = 0; i < blank.nbytes; ++i) blank.destination[i] = std::byte{0};
  }
}

}  // namespace kimisys::reshard
