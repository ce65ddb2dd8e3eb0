// The implementations behind execute(). All checks are done; memory is present and disjoint.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/dtype.h"
#include "reshard/layout.h"
#include "reshard/rows.h"

namespace kimisys::reshard {

// One N-d copy on real addresses. Strides in bytes, extents in elements, all >= 1.
struct Block {
  struct Axis {
    std::int64_t extent = 1;
    std::int64_t source_stride = 0;
    std::int64_t destination_stride = 0;
  };
  const std::byte* source = nullptr;
  std::byte* destination = nullptr;
  std::size_t dims = 0;
  std::array<Axis, kMaxDims> axes = {};
  DType source_dtype = DType::kFloat32;
  DType destination_dtype = DType::kFloat32;
};

// Bytes to fill with zeros.
struct Blank {
  std::byte* destination = nullptr;
  std::int64_t nbytes = 0;
};

// One element after another, on the calling thread, exactly as the definition says.
void execute_naive(std::span<const Block> blocks, std::span<const Blank> blanks);

// Contiguous dimensions collapsed, rows moved by `rows`, work split by bytes among the threads (0
// means hardware_threads()).
void execute_native(std::span<const Block> blocks, std::span<const Blank> blanks,
                    std::size_t threads, const RowSet& rows);

}  // namespace kimisys::reshard
