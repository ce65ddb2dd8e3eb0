// Do strided pieces of a buffer tile it exactly: every byte in one piece, none in two? Or are they
// at least apart: no byte in two?
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "reshard/layout.h"

namespace kimisys::reshard {

// A set of bytes: runs of `run` bytes at offset + sum(i_d * stride_d). `owner` is the caller's.
struct Piece {
  struct Axis {
    std::int64_t extent = 1;
    std::int64_t stride = 0;
    bool operator==(const Axis&) const = default;
  };
  std::int64_t offset = 0;
  std::vector<Axis> axes;  // by falling stride, none of extent 1, none that only extends the run
  std::int64_t run = 0;
  std::size_t owner = 0;
};

// The bytes of a block of elements, in the shortest form. The block must not be empty.
Piece make_piece(std::int64_t offset, const Dims& extent, const Dims& byte_strides,
                 std::int64_t itemsize, std::size_t owner);

// Pieces that follow no regular pattern are checked run by run, up to so many.
inline constexpr std::int64_t kMaxRuns = std::int64_t{1} << 24;

// The first bytes, in address order, that no piece or more than one piece covers. kUnknown:
// the pieces have more than kMaxRuns runs in no regular pattern.
struct Violation {
  enum class Kind { kHole, kOverlap, kUnknown } kind = Kind::kHole;
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::optional<std::size_t> before;  // owner of the piece that ends at a hole, or overlaps first
  std::optional<std::size_t> after;   // owner of the piece that begins after a hole, or overlaps
};

// Nothing if the pieces tile [0, nbytes) exactly. Pieces that interleave regularly (rows of several
// fragments in one fused parameter) are checked without listing their runs.
std::optional<Violation> check_tiling(const std::vector<Piece>& pieces, std::int64_t nbytes);

// Nothing if no two pieces share a byte; holes are no violation.
std::optional<Violation> check_apart(const std::vector<Piece>& pieces);

}  // namespace kimisys::reshard
