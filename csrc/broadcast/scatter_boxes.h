// Whole boxes: copied, digested, or both in one pass, so that bytes go through the cache once.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "broadcast/scatter_targets.h"

namespace kimisys::broadcast {

// A target with the memory that its elements come from.
struct Box {
  struct Axis {
    std::int64_t extent = 1;
    std::int64_t source_stride = 0;  // bytes
    std::int64_t byte_stride = 0;    // in the destination
    std::uint64_t counter_step = 0;
  };
  const std::byte* source = nullptr;  // the first element
  std::byte* destination = nullptr;
  std::uint64_t counter = 0;
  std::int64_t itemsize = 1;
  std::size_t dims = 0;
  std::array<Axis, reshard::kMaxDims> axes{};  // the last one is the run
};

// `source` is the first element of the target's box; strides of the source in bytes, by dimension
// of the tensor. With `merged`, neighbouring axes are one where all three go on without a seam, and
// the run is dense in the destination where possible.
Box make_box(const reshard::Tensor& tensor, const Target& target, const std::byte* source,
             const reshard::Dims& source_strides, std::byte* buffer, bool merged);

struct BoxWork {
  bool write = false;
  bool add_new = false;       // sum what comes from the source
  bool subtract_old = false;  // less what is in the destination before it is written
};

// Does the work and returns the sum. Each element of the source is read once: what is summed is
// what is written, whatever another process does to the source meanwhile. `implementation` is one
// of element_kernels(). Writes past the caches: the thread calls reshard::finish_streaming() after
// its last box.
std::uint64_t run_box(const Box& box, BoxWork work, std::string_view implementation);

}  // namespace kimisys::broadcast
