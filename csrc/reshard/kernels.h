// The implementations behind execute(). All checks are done; memory is present and disjoint.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

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

// Contiguous dimensions collapsed, rows moved by a RowSet, the whole cut by bytes for the threads.
class Work {
 public:
  // threads: 0 means hardware_threads().
  Work(std::vector<Block> blocks, std::vector<Blank> blanks, std::size_t threads);

  void run(const RowSet& rows) const;

 private:
  // Blocks to run one after the other, or woven together when they are several.
  struct Part {
    std::size_t first;
    std::size_t count;
    std::int64_t bytes;
  };

  void add(std::size_t first, std::size_t count, std::size_t axis, std::int64_t limit);
  void run_part(const Part& part, const RowSet& rows) const;

  std::vector<Block> blocks_;
  std::vector<Blank> blanks_;
  std::size_t threads_;
  bool may_stream_ = false;
  std::vector<Part> parts_;
  std::vector<std::size_t> batches_ = {0};  // parts that one thread takes at once: [i], [i + 1]
};

}  // namespace kimisys::reshard
