// A dense matrix of two-byte elements, transposed: what packs weights for a multiplication wants
// them with the other dimension dense, and takes far longer to turn them itself.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kimisys::reshard {

// destination[column * rows + row] = source[row * columns + column]; both have rows x columns
// elements and do not overlap. Written through the caches, where the reader will find it, unless it
// is larger than they are.
// threads: 0 means hardware_threads().
void transpose_matrix(const std::uint16_t* source, std::uint16_t* destination, std::size_t rows,
                      std::size_t columns, std::size_t threads);

}  // namespace kimisys::reshard
