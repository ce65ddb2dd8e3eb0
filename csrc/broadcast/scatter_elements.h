// The inner loops over the changed elements of a block: from positions to addresses in one target,
// one set per instruction set. All give the same sums and write the same bytes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "broadcast/scatter_targets.h"

namespace kimisys::broadcast {

// How positions of a block, which count its elements in row-major order, reach one target. An axis
// has `extent` elements of the block, of which the target has [begin, begin + count).
struct Walk {
  struct Axis {
    std::int64_t extent = 1;
    std::int64_t begin = 0;
    std::int64_t count = 1;
    std::int64_t byte_stride = 0;    // in the destination
    std::uint64_t counter_step = 0;  // see mix.h
  };
  std::int64_t offset = 0;    // of the target's first element, in bytes of its buffer
  std::uint64_t counter = 0;  // of the target's first element
  std::size_t dims = 0;       // at least 1
  std::array<Axis, reshard::kMaxDims> axes{};  // the last one is innermost
};

// With `merged`, neighbouring axes are one where bytes and counters both go on without a seam.
Walk make_walk(const reshard::Tensor& tensor, const Block& block, const Target& target,
               bool merged);

// The changed elements of a block: ascending positions and as many values.
struct Changes {
  std::span<const std::uint32_t> positions;
  const std::byte* values = nullptr;
};

// Of those changes that lie in the target: the sum of mix(new bits) - mix(bits at `buffer`).
using MeasureElements = std::uint64_t (*)(const Walk& walk, const Changes& changes,
                                          const std::byte* buffer);

// Writes those that lie in the target, and returns how many.
using WriteElements = std::int64_t (*)(const Walk& walk, const Changes& changes, std::byte* buffer);

struct ElementKernel {
  std::string_view name;
  bool merged = true;                        // what make_walk is asked for
  std::array<MeasureElements, 4> measure{};  // elements of 1, 2, 4, 8 bytes
  std::array<WriteElements, 4> write{};
};

// Those that this processor can run, fastest first; the last one, "naive", finds each element by
// the definition.
std::span<const ElementKernel> element_kernels();

}  // namespace kimisys::broadcast
