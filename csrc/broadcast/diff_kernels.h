// The inner loops of the diff, one set per instruction set. All find the same changes.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "base/dtype.h"
#include "broadcast/digest_kernels.h"
#include "reshard/rows.h"

namespace kimisys::broadcast {

// The changed elements of one block: positions ascending, bits before and after. Pages that no
// change has reached were never touched.
struct ChangeList {
  // Room for so many elements, and what a kernel may write beyond the last.
  void reserve(std::int64_t elements, std::size_t itemsize);

  std::unique_ptr<std::uint32_t[]> positions;
  std::unique_ptr<std::byte[]> before;
  std::unique_ptr<std::byte[]> after;
  std::size_t count = 0;

 private:
  std::size_t capacity_ = 0;        // elements of `positions`
  std::size_t value_capacity_ = 0;  // bytes of `before` and `after`
};

// Elements along one axis on both sides; strides in bytes.
struct Run {
  const std::byte* live = nullptr;
  std::byte* snapshot = nullptr;
  std::int64_t count = 0;
  std::int64_t live_stride = 0;
  std::int64_t snapshot_stride = 0;
};

// Appends the elements whose bits differ (after the cast) to `out`, the first having `position`,
// and writes them to the snapshot.
using CompareRun = void (*)(const Run& run, std::uint32_t position, ChangeList& out);

// Which counter (see mix.h) the element at a position of a block has. Positions count rows of `row`
// elements; from one element to the next the flat index of the tensor grows by `step`, and from the
// last of a row to the first of the next by `skip` more.
struct Counters {
  std::uint64_t first = 0;
  std::uint64_t row = 1;  // at most kMaxBlockElements
  std::uint64_t step = 1;
  std::uint64_t skip = 0;
};

// What the changes [begin, end) of a list add to the digest, mod 2^64: mix(after) - mix(before).
// The first element of the counters' first row has position `origin`.
using SumChanges = std::uint64_t (*)(const ChangeList& changes, std::size_t begin, std::size_t end,
                                     std::uint32_t origin, const Counters& counters);

// How many elements of a run differ (after the cast).
using CountRun = std::int64_t (*)(const Run& run);

// One function for each cast.
template <typename Function>
struct ByCast {
  std::array<Function, 4> same{};  // elements of 1, 2, 4, 8 bytes
  Function narrow = nullptr;       // float32 -> bfloat16
  Function widen = nullptr;        // bfloat16 -> float32

  Function of(DType from, DType to) const {
    if (from != to) return from == DType::kFloat32 ? narrow : widen;
    return same[static_cast<std::size_t>(std::countr_zero(static_cast<unsigned>(itemsize(from))))];
  }
};

using Comparisons = ByCast<CompareRun>;

struct DiffKernel {
  std::string_view name;
  Comparisons dense;                  // both sides dense
  ByCast<CountRun> counts;            // any strides
  Comparisons strided;                // any strides
  std::array<SumChanges, 4> changes;  // by width
  std::array<RunSum, 4> runs;         // the digest's, by width
  const reshard::RowSet* rows;        // for copies
};

// The kernels that this processor can run, fastest first; the last is naive.
std::span<const DiffKernel> diff_kernels();

// The kernel asked for, or else KIMISYS_BROADCAST_IMPLEMENTATION, or else the fastest. Raises
// LayoutError for another name.
const DiffKernel& diff_kernel(std::string_view implementation = {});

}  // namespace kimisys::broadcast
