// The vocabulary of resharding: where every element of every logical tensor is stored, on which
// rank. All types here are values. A Layout is validated when it is made and never changes
// afterwards.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"
#include "reshard/dims.h"

namespace kimisys::reshard {

// No tensor or buffer is larger (1 PiB), so that sums and products of valid numbers cannot
// overflow.
inline constexpr std::int64_t kMaxBytes = std::int64_t{1} << 50;

// Nor are all buffers of a layout together (4 EiB).
inline constexpr std::int64_t kMaxTotalBytes = std::int64_t{1} << 62;

// No name in a compact form or a symbolic layout is longer, in bytes.
inline constexpr std::size_t kMaxName = 1024;

// A logical parameter in checkpoint coordinates. A shape may be empty (0-d) or hold zeros.
struct Tensor {
  std::string name;
  DType dtype = DType::kFloat32;
  Dims shape;

  std::int64_t elements() const;
  bool operator==(const Tensor&) const = default;
};

// An N-d box of a tensor: [offset, offset + extent) in every dimension, in elements.
struct Region {
  Dims offset;
  Dims extent;

  std::int64_t elements() const;
  bool empty() const { return elements() == 0; }
  bool operator==(const Region&) const = default;
};

// A named piece of one rank's memory.
struct Buffer {
  std::int64_t rank = 0;
  std::string name;
  std::int64_t nbytes = 0;

  bool operator==(const Buffer&) const = default;
};

// Where one rank stores one region: element (i0, i1, ...) of the region, counted from its corner,
// begins at byte byte_offset + sum(i_d * byte_strides[d]) of the buffer. Strides are >= 0.
struct Fragment {
  std::string tensor;
  Region region;
  std::int64_t rank = 0;
  std::string buffer;
  std::int64_t byte_offset = 0;
  Dims byte_strides;

  bool operator==(const Fragment&) const = default;
};

// Bytes of a buffer that hold no tensor element. As a destination they are written with zeros.
struct Padding {
  std::int64_t rank = 0;
  std::string buffer;
  std::int64_t byte_offset = 0;
  std::int64_t nbytes = 0;

  bool operator==(const Padding&) const = default;
};

// Where a rank runs. A rank without a Place is on node 0, device 0, NIC 0.
struct Place {
  std::int64_t rank = 0;
  std::int64_t node = 0;
  std::int64_t device = 0;
  std::int64_t nic = 0;

  bool operator==(const Place&) const = default;
};

// A fragment and a padding that name their tensor and buffer by the place in the tables given.
struct FragmentRow {
  std::size_t tensor = 0;
  std::size_t buffer = 0;
  Region region;
  std::int64_t byte_offset = 0;
  Dims byte_strides;
};

struct PaddingRow {
  std::size_t buffer = 0;
  std::int64_t byte_offset = 0;
  std::int64_t nbytes = 0;
};

class Layout {
 public:
  Layout() = default;
  // Raises LayoutError for duplicate tensors or buffers, unknown names, regions outside their
  // tensor, bytes outside their buffer, negative or overflowing numbers.
  Layout(std::vector<Tensor> tensors, std::vector<Buffer> buffers, std::vector<Fragment> fragments,
         std::vector<Padding> padding = {}, std::vector<Place> places = {});

  // The same from rows, which need no names looked up.
  static Layout of_rows(std::vector<Tensor> tensors, std::vector<Buffer> buffers,
                        const std::vector<FragmentRow>& fragments,
                        const std::vector<PaddingRow>& padding = {},
                        std::vector<Place> places = {});

  const std::vector<Tensor>& tensors() const { return tensors_; }        // sorted by name
  const std::vector<Buffer>& buffers() const { return buffers_; }        // sorted by (rank, name)
  const std::vector<Fragment>& fragments() const { return fragments_; }  // in the order given
  const std::vector<Padding>& padding() const { return padding_; }       // in the order given
  const std::vector<Place>& places() const { return places_; }           // sorted by rank

  // All ranks that have a buffer or a place, ascending.
  std::vector<std::int64_t> ranks() const;

  // Indices into tensors() and buffers(), resolved once at construction.
  std::size_t tensor_of(std::size_t fragment) const { return fragment_tensor_[fragment]; }
  std::size_t buffer_of(std::size_t fragment) const { return fragment_buffer_[fragment]; }
  std::size_t buffer_of_padding(std::size_t padding) const { return padding_buffer_[padding]; }

  std::optional<std::size_t> find_tensor(std::string_view name) const;
  std::optional<std::size_t> find_buffer(std::int64_t rank, std::string_view name) const;
  std::span<const Buffer> buffers_of(std::int64_t rank) const;
  Place place_of(std::int64_t rank) const;

  // The union of several layouts, fragments in the order of the arguments. Raises LayoutError when
  // a tensor has two shapes or dtypes, a buffer appears twice, or a rank has two places.
  static Layout merge(const std::vector<Layout>& layouts);

  // One rank's part: its buffers, fragments, padding and place; the whole tensor table.
  Layout of_rank(std::int64_t rank) const;

  // Fragments trimmed so that every element held by this layout is held exactly once: the first
  // owner in (rank, buffer name, fragment order) keeps it. Buffers, tensors and places stay;
  // padding and empty fragments go.
  Layout cover() const;

  // The text form (one JSON object, see wire.cpp). from_json treats the text as hostile: whatever
  // is malformed raises LayoutError.
  std::string to_json() const;
  static Layout from_json(std::string_view text);

  // The compact form (see bytes.cpp): equal values give equal bytes. from_bytes treats them as
  // hostile: whatever is malformed raises LayoutError.
  std::string to_bytes() const;
  static Layout from_bytes(std::string_view bytes);

  // 32 hexadecimal digits that stand for to_bytes().
  std::string fingerprint() const;

  bool operator==(const Layout&) const = default;

 private:
  void sort_tables();
  void resolve();
  void check_fragments() const;

  std::vector<Tensor> tensors_;
  std::vector<Buffer> buffers_;
  std::vector<Fragment> fragments_;
  std::vector<Padding> padding_;
  std::vector<Place> places_;
  std::vector<std::size_t> fragment_tensor_;
  std::vector<std::size_t> fragment_buffer_;
  std::vector<std::size_t> padding_buffer_;
};

// Raises LayoutError for a tensor without a name, with too many or negative sizes, or beyond
// kMaxBytes.
void check_tensor(const Tensor& tensor);

// For each tensor of the table, the indices of its non-empty fragments in layout order.
std::vector<std::vector<std::size_t>> fragments_by_tensor(const Layout& layout);

// "(4, 8)", "(4,)", "()".
std::string to_string(const Dims& dims);

// "[0:4, 8:16]"; a 0-d region prints as "[]". The other forms are those of Python's repr.
std::ostream& operator<<(std::ostream& stream, const Region& region);
std::ostream& operator<<(std::ostream& stream, const Tensor& tensor);
std::ostream& operator<<(std::ostream& stream, const Buffer& buffer);
std::ostream& operator<<(std::ostream& stream, const Fragment& fragment);
std::ostream& operator<<(std::ostream& stream, const Padding& padding);
std::ostream& operator<<(std::ostream& stream, const Place& place);
std::ostream& operator<<(std::ostream& stream, const Layout& layout);

}  // namespace kimisys::reshard
