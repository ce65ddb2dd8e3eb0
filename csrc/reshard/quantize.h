// bfloat16 or float32 matrices as float8_e4m3fn with one float32 scale for each block (DeepSeek's
// format, 128 x 128), computed where the weights are, before a plan moves them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "reshard/execute.h"
#include "reshard/layout.h"
#include "reshard/quantize_kernels.h"

namespace kimisys::reshard {

// Size of a block in elements. The last block of a row or column of blocks may be smaller.
struct BlockShape {
  std::int64_t rows = 128;
  std::int64_t columns = 128;
};

// Raises LayoutError, naming tensor, region and rank, when this fragment is no part of a matrix or
// cuts a block of its tensor: it must begin with one, and end with one or with the tensor.
void check_whole_blocks(const Layout& layout, std::size_t fragment, BlockShape block);

// One fragment of the source layout, and the two fragments of the quantized layout that are made of
// it: indices into fragments().
struct QuantizedPart {
  std::size_t source = 0;
  std::size_t values = 0;
  std::size_t scales = 0;
};

// Blocks of a fragment that one thread takes at once: as high as a block, several blocks wide.
struct QuantizeUnit {
  std::size_t part = 0;
  std::int64_t row = 0;  // of the first element, in the fragment
  std::int64_t column = 0;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
};

// What is to be computed where. Everything but the memory is checked when it is made.
//
// Per block: scale = max(amax, 1e-4) / 448, value = x * (1 / scale) rounded to the nearest
// float8_e4m3fn, ties to even, all in float32: what DeepGEMM and vLLM call per_block_cast_to_fp8.
// The floor keeps 1 / scale finite where a block is zero.
class Quantizer {
 public:
  // Raises LayoutError, naming tensor, region and rank: a fragment that is no matrix, of another
  // dtype or shape than its part needs, that cuts a block, or whose result is not dense.
  Quantizer(std::shared_ptr<const Layout> source, std::shared_ptr<const Layout> quantized,
            std::vector<QuantizedPart> parts, BlockShape block);

  // Writes the values and scales of all parts. Raises BufferMismatchError for memory that is
  // missing, of a wrong size, read-only or overlapping, before anything is written; NotFiniteError
  // for a NaN or infinity, the first in the order of parts: the destinations then hold a mixture.
  void fill(const Memories& sources, const Memories& destinations,
            const ExecuteOptions& options = {}) const;

 private:
  BlockRow block_row(const QuantizeUnit& unit, const std::vector<Memory>& sources,
                     const std::vector<Memory>& destinations) const;
  [[noreturn]] void fail_at(const QuantizeUnit& unit, const std::vector<Memory>& sources) const;

  std::shared_ptr<const Layout> source_;
  std::shared_ptr<const Layout> quantized_;
  std::vector<QuantizedPart> parts_;
  BlockShape block_;
  std::vector<QuantizeUnit> units_;
};

// Names for ExecuteOptions::implementation here, the default first.
std::vector<std::string> quantize_implementations();

}  // namespace kimisys::reshard
