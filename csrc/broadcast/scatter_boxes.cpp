#include "broadcast/scatter_boxes.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "broadcast/digest_kernels.h"
#include "broadcast/digest_stream.h"
#include "broadcast/mix.h"
#include "reshard/stream.h"

namespace kimisys::broadcast {
namespace {

// Bytes that pass through private memory at once: in the first-level cache, they are digested there
// and then written out.
constexpr std::size_t kPiece = 4096;

using Piece = std::array<std::byte, kPiece>;

template <typename Word>
void gather(const std::byte* source, std::int64_t stride, std::int64_t count, std::byte* piece) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(piece + i * static_cast<std::int64_t>(sizeof(Word)), source + i * stride,
                sizeof(Word));
  }
}

template <typename Word>
void spread(const std::byte* piece, std::int64_t count, std::byte* destination,
            std::int64_t stride) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(destination + i * stride, piece + i * static_cast<std::int64_t>(sizeof(Word)),
                sizeof(Word));
  }
}

using Gather = void (*)(const std::byte*, std::int64_t, std::int64_t, std::byte*);
using Spread = void (*)(const std::byte*, std::int64_t, std::byte*, std::int64_t);

constexpr std::array<Gather, 4> kGather = {&gather<std::uint8_t>, &gather<std::uint16_t>,
                                           &gather<std::uint32_t>, &gather<std::uint64_t>};
constexpr std::array<Spread, 4> kSpread = {&spread<std::uint8_t>, &spread<std::uint16_t>,
                                           &spread<std::uint32_t>, &spread<std::uint64_t>};

struct Loops {
  RunSum sum;
  Gather gather;
  Spread spread;
  Stream stream;  // null where this instruction set has none: the run then goes piece by piece
};

// The start of a run, and the run piece by piece.
std::uint64_t run(const Box& box, const BoxWork& work, const Loops& loops, const std::byte* source,
                  std::byte* destination, std::uint64_t counter) {
  const Box::Axis& axis = box.axes[box.dims - 1];
  const std::int64_t most = static_cast<std::int64_t>(kPiece) / box.itemsize;
  const bool dense = axis.source_stride == box.itemsize && axis.byte_stride == box.itemsize;
  if (loops.stream != nullptr && dense && work.write && work.add_new && !work.subtract_old &&
      axis.extent * box.itemsize >= kStreamBytes &&
      reinterpret_cast<std::uintptr_t>(destination) % static_cast<std::size_t>(box.itemsize) == 0) {
    return loops.stream(destination, source, axis.extent, counter, axis.counter_step);
  }
  alignas(64) Piece piece;
  std::uint64_t sum = 0;
  for (std::int64_t at = 0; at < axis.extent; at += most) {
    const std::int64_t count = std::min(most, axis.extent - at);
    const auto nbytes = static_cast<std::size_t>(count * box.itemsize);
    const std::byte* from = source + at * axis.source_stride;
    std::byte* to = destination + at * axis.byte_stride;
    const std::uint64_t start = counter + static_cast<std::uint64_t>(at) * axis.counter_step;
    if (work.subtract_old) {
      sum -= loops.sum(to, count, axis.byte_stride, start, axis.counter_step);
    }
    if (axis.source_stride == box.itemsize) {
      std::memcpy(piece.data(), from, nbytes);
    } else {
      loops.gather(from, axis.source_stride, count, piece.data());
    }
    if (work.add_new) {
      sum += loops.sum(piece.data(), count, box.itemsize, start, axis.counter_step);
    }
    if (!work.write) continue;
    if (axis.byte_stride != box.itemsize) {
      loops.spread(piece.data(), count, to, axis.byte_stride);
    } else if (count * box.itemsize < kStreamBytes || work.subtract_old) {
      std::memcpy(to, piece.data(), nbytes);
    } else {
      reshard::stream_bytes(to, piece.data(), nbytes);
    }
  }
  return sum;
}

// The definition: element by element.
std::uint64_t naive_element(const Box& box, const BoxWork& work, const std::byte* source,
                            std::byte* destination, std::uint64_t counter) {
  const auto nbytes = static_cast<std::size_t>(box.itemsize);
  std::uint64_t fresh = 0;
  std::uint64_t old = 0;
  std::memcpy(&fresh, source, nbytes);
  std::memcpy(&old, destination, nbytes);
  if (work.write) std::memcpy(destination, &fresh, nbytes);
  return (work.add_new ? mix(counter, fold(fresh)) : 0) -
         (work.subtract_old ? mix(counter, fold(old)) : 0);
}

// Calls visit(source, destination, counter) at each index of the first `outer` axes.
template <typename Visit>
std::uint64_t odometer(const Box& box, std::size_t outer, Visit visit) {
  std::array<std::int64_t, reshard::kMaxDims> index{};
  const std::byte* source = box.source;
  std::byte* destination = box.destination;
  std::uint64_t counter = box.counter;
  std::uint64_t sum = 0;
  for (;;) {
    sum += visit(source, destination, counter);
    std::size_t d = outer;
    for (; d > 0; --d) {
      const Box::Axis& axis = box.axes[d - 1];
      source += axis.source_stride;
      destination += axis.byte_stride;
      counter += axis.counter_step;
      if (++index[d - 1] < axis.extent) break;
      source -= axis.extent * axis.source_stride;
      destination -= axis.extent * axis.byte_stride;
      counter -= static_cast<std::uint64_t>(axis.extent) * axis.counter_step;
      index[d - 1] = 0;
    }
    if (d == 0) return sum;
  }
}

const DigestKernel& digest_kernel(std::string_view name) {
  const auto kernels = digest_kernels();
  return *std::find_if(kernels.begin(), kernels.end(),
                       [&](const DigestKernel& kernel) { return kernel.name == name; });
}

}  // namespace

Box make_box(const reshard::Tensor& tensor, const Target& target, const std::byte* source,
             const reshard::Dims& source_strides, std::byte* buffer, bool merged) {
  const std::int64_t item = itemsize(tensor.dtype);
  Box box{.source = source,
          .destination = buffer + target.offset,
          .counter = target.counter,
          .itemsize = item};
  std::vector<Box::Axis> axes;  // innermost first
  std::uint64_t step = kGolden;
  for (std::size_t d = tensor.shape.size(); d-- > 0;
       step *= static_cast<std::uint64_t>(tensor.shape[d])) {
    const Box::Axis axis{target.box.extent[d], source_strides[d], target.strides[d], step};
    if (axis.extent == 1) continue;
    if (merged && !axes.empty()) {
      Box::Axis& inner = axes.back();
      if (axis.source_stride == inner.source_stride * inner.extent &&
          axis.byte_stride == inner.byte_stride * inner.extent &&
          axis.counter_step == inner.counter_step * static_cast<std::uint64_t>(inner.extent)) {
        inner.extent *= axis.extent;
        continue;
      }
    }
    axes.push_back(axis);
  }
  if (axes.empty()) axes.push_back({1, item, item, kGolden});
  if (merged) {
    const auto dense = std::find_if(
        axes.begin(), axes.end(), [&](const Box::Axis& axis) { return axis.byte_stride == item; });
    if (dense != axes.end()) std::rotate(axes.begin(), dense, dense + 1);
  }
  box.dims = axes.size();
  std::reverse_copy(axes.begin(), axes.end(), box.axes.begin());
  return box;
}

std::uint64_t run_box(const Box& box, BoxWork work, std::string_view implementation) {
  if (implementation == "naive") {
    return odometer(box, box.dims, [&](const std::byte* source, std::byte* to, std::uint64_t at) {
      return naive_element(box, work, source, to, at);
    });
  }
  const auto width =
      static_cast<std::size_t>(std::countr_zero(static_cast<std::uint64_t>(box.itemsize)));
  const Loops loops{digest_kernel(implementation).by_width[width], kGather[width], kSpread[width],
                    stream_of(implementation, width)};
  return odometer(box, box.dims - 1, [&](const std::byte* source, std::byte* to, std::uint64_t at) {
    return run(box, work, loops, source, to, at);
  });
}

}  // namespace kimisys::broadcast
