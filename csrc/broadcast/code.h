// How the changed elements of one block are written down: which elements, and their new bits.
//
// A descriptor says in which of four kinds, and how long the payload is:
//   same     nothing changed; no payload.
//   gaps     LEB128 count | per element the Rice code of its gap, bits from the lowest up, padded
//            with zeros to a byte | values. The gap is the number of unchanged elements before it,
//            gap = quotient * 2^rice + rest: as many zero bits as the quotient says, a one, then
//            the `rice` bits of the rest.
//   bitmap   one bit per element, from the lowest up, padded with zeros to a byte | values.
//   whole    all bits of the block, row-major; or no payload: they are to be read elsewhere.
// Values are raw, little-endian, in order of position: the row-major number within the block.
//
// A random set of changes of density p costs the entropy H(p) / p bits per changed element and a
// few per cent (Rice: "Some practical universal noiseless coding techniques", JPL 79-22).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kimisys::broadcast {

enum class Kind : std::uint32_t { kSame, kGaps, kBitmap, kWhole };

// Above the parameter that suits one change in the largest block.
inline constexpr std::uint32_t kMaxRice = 18;

struct Descriptor {
  Kind kind = Kind::kSame;
  std::uint32_t rice = 0;    // of kGaps
  std::uint32_t nbytes = 0;  // of the payload, below 2^25

  // Bits 0-1 kind, 2-6 rice, 7-31 nbytes. Any word is some descriptor; see check_descriptor.
  static constexpr Descriptor of(std::uint32_t word) {
    return {static_cast<Kind>(word & 3U), (word >> 2U) & 31U, word >> 7U};
  }
  constexpr std::uint32_t word() const {
    return static_cast<std::uint32_t>(kind) | rice << 2U | nbytes << 7U;
  }
  bool operator==(const Descriptor&) const = default;
};

// Appends the smaller of gaps and bitmap to `payload`, or nothing where all bits of the block would
// not take more: then the kind is whole and nbytes 0, for the caller to complete. `positions`
// ascend below `elements`, which is at most kMaxBlockElements; `values` has as many elements.
Descriptor encode(std::span<const std::uint32_t> positions, const std::byte* values,
                  std::int64_t elements, std::int64_t itemsize, std::vector<std::byte>& payload);

// Raises SnapshotError for a descriptor that no block of so many elements can have.
void check_descriptor(Descriptor descriptor, std::int64_t elements, std::int64_t itemsize);

struct Decoded {
  std::span<const std::uint32_t> positions;  // ascending, below `elements`; lies in the scratch
  const std::byte* values = nullptr;         // as many elements, of any alignment, in the payload
};

// Reads gaps or bitmap; the payload is hostile. Raises SnapshotError for another kind, a payload
// that is not descriptor.nbytes long, or one that encode cannot have written. `elements` is at most
// kMaxBlockElements. `scratch` is reused and only grows.
Decoded decode(Descriptor descriptor, std::span<const std::byte> payload, std::int64_t elements,
               std::int64_t itemsize, std::vector<std::uint32_t>& scratch);

}  // namespace kimisys::broadcast
