#include "reshard/layout.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <ostream>
#include <tuple>
#include <utility>

#include "base/error.h"

namespace kimisys::reshard {
namespace {

constexpr auto kBad = ErrorCode::kLayout;

// Product of the dimensions; a zero anywhere makes it zero before anything can overflow.
std::int64_t product(const Dims& dims) {
  std::int64_t total = 1;
  if (std::find(dims.begin(), dims.end(), 0) != dims.end()) return 0;
  for (const std::int64_t size : dims) {
    KIMISYS_CHECK(size >= 0, kBad, "size ", size, " is negative; sizes count elements");
    KIMISYS_CHECK(!__builtin_mul_overflow(total, size, &total), kBad,
                  "the number of elements does not fit 64 bits; check the shape");
  }
  return total;
}

void check_buffer(const Buffer& buffer) {
  KIMISYS_CHECK(!buffer.name.empty(), kBad, "a buffer of rank ", buffer.rank,
                " has an empty name; give it one");
  KIMISYS_CHECK(buffer.rank >= 0, kBad, "buffer '", buffer.name, "' is on the negative rank ",
                buffer.rank);
  KIMISYS_CHECK(buffer.nbytes >= 0 && buffer.nbytes <= kMaxBytes, kBad, "buffer '", buffer.name,
                "' of rank ", buffer.rank, " has the size ", buffer.nbytes,
                "; sizes are between 0 and ", kMaxBytes, " bytes");
}

void check_region(const Fragment& fragment, const Tensor& tensor) {
  const Region& region = fragment.region;
  const std::size_t dims = tensor.shape.size();
  KIMISYS_CHECK(region.offset.size() == dims && region.extent.size() == dims &&
                    fragment.byte_strides.size() == dims,
                kBad, "a fragment of tensor '", tensor.name, "' on rank ", fragment.rank, " has ",
                region.offset.size(), " offsets, ", region.extent.size(), " extents and ",
                fragment.byte_strides.size(), " strides; the tensor has ", dims, " dimensions");
  for (std::size_t d = 0; d < dims; ++d) {
    KIMISYS_CHECK(region.offset[d] >= 0 && region.extent[d] >= 0 &&
                      region.extent[d] <= tensor.shape[d] &&
                      region.offset[d] <= tensor.shape[d] - region.extent[d],
                  kBad, "region ", region, " of tensor '", tensor.name, "' on rank ", fragment.rank,
                  " leaves the tensor in dimension ", d, ", whose size is ", tensor.shape[d]);
    KIMISYS_CHECK(fragment.byte_strides[d] >= 0, kBad, "region ", region, " of tensor '",
                  tensor.name, "' on rank ", fragment.rank, " has the negative byte stride ",
                  fragment.byte_strides[d], "; strides must be >= 0");
  }
}

// One past the last byte that the fragment touches; nothing if that does not fit 64 bits.
std::optional<std::int64_t> byte_end(const Fragment& fragment, std::int64_t item) {
  std::int64_t end = fragment.byte_offset;
  if (fragment.region.empty()) return end;
  for (std::size_t d = 0; d < fragment.byte_strides.size(); ++d) {
    std::int64_t reach = 0;
    if (__builtin_mul_overflow(fragment.region.extent[d] - 1, fragment.byte_strides[d], &reach) ||
        __builtin_add_overflow(end, reach, &end)) {
      return std::nullopt;
    }
  }
  if (__builtin_add_overflow(end, item, &end)) return std::nullopt;
  return end;
}

void check_bytes(const Fragment& fragment, const Tensor& tensor, const Buffer& buffer) {
  const std::optional<std::int64_t> end = byte_end(fragment, itemsize(tensor.dtype));
  KIMISYS_CHECK(fragment.byte_offset >= 0 && end && *end <= buffer.nbytes, kBad, "region ",
                fragment.region, " of tensor '", tensor.name, "' (", dtype_name(tensor.dtype),
                ") leaves buffer '", buffer.name, "' of rank ", buffer.rank, ", which has ",
                buffer.nbytes, " bytes: it starts at byte ", fragment.byte_offset, " and ends at ",
                end ? std::to_string(*end) : "more than 2^63",
                "; check byte_offset, byte_strides and the buffer's size");
}

void check_padding(const Padding& padding, const Buffer& buffer) {
  KIMISYS_CHECK(padding.byte_offset >= 0 && padding.nbytes >= 0 &&
                    padding.nbytes <= buffer.nbytes &&
                    padding.byte_offset <= buffer.nbytes - padding.nbytes,
                kBad, "padding of ", padding.nbytes, " bytes at byte ", padding.byte_offset,
                " leaves buffer '", buffer.name, "' of rank ", buffer.rank, ", which has ",
                buffer.nbytes, " bytes");
}

void check_place(const Place& place) {
  KIMISYS_CHECK(place.rank >= 0 && place.node >= 0 && place.device >= 0 && place.nic >= 0, kBad,
                "the place of rank ", place.rank, " has a negative number (node ", place.node,
                ", device ", place.device, ", nic ", place.nic, ")");
}

auto key_of(const Buffer& buffer) {
  return std::pair<std::int64_t, std::string_view>(buffer.rank, buffer.name);
}

std::string_view tensor_key(const Tensor& tensor) { return tensor.name; }

// The place of each item in the sorted table. Ties keep their order, as in sort_tables.
template <typename T, typename Key>
std::vector<std::size_t> order_of(const std::vector<T>& table, Key key) {
  std::vector<std::size_t> sorted(table.size());
  std::iota(sorted.begin(), sorted.end(), std::size_t{0});
  std::stable_sort(sorted.begin(), sorted.end(),
                   [&](std::size_t a, std::size_t b) { return key(table[a]) < key(table[b]); });
  std::vector<std::size_t> place(table.size());
  for (std::size_t i = 0; i < sorted.size(); ++i) place[sorted[i]] = i;
  return place;
}

}  // namespace

void check_tensor(const Tensor& tensor) {
  KIMISYS_CHECK(!tensor.name.empty(), kBad, "a tensor has an empty name; give it one");
  KIMISYS_CHECK(tensor.shape.size() <= kMaxDims, kBad, "tensor '", tensor.name, "' has ",
                tensor.shape.size(), " dimensions; at most ", kMaxDims, " are supported");
  for (const std::int64_t size : tensor.shape) {
    KIMISYS_CHECK(size >= 0, kBad, "tensor '", tensor.name, "' has the negative size ", size);
  }
  KIMISYS_CHECK(product(tensor.shape) <= kMaxBytes / itemsize(tensor.dtype), kBad, "tensor '",
                tensor.name, "' ", to_string(tensor.shape), " is larger than ", kMaxBytes,
                " bytes; check its shape");
}

std::int64_t Tensor::elements() const { return product(shape); }

std::int64_t Region::elements() const { return product(extent); }

Layout::Layout(std::vector<Tensor> tensors, std::vector<Buffer> buffers,
               std::vector<Fragment> fragments, std::vector<Padding> padding,
               std::vector<Place> places)
    : tensors_(std::move(tensors)),
      buffers_(std::move(buffers)),
      fragments_(std::move(fragments)),
      padding_(std::move(padding)),
      places_(std::move(places)) {
  sort_tables();
  resolve();
  check_fragments();
}

Layout Layout::of_rows(std::vector<Tensor> tensors, std::vector<Buffer> buffers,
                       const std::vector<FragmentRow>& fragments,
                       const std::vector<PaddingRow>& padding, std::vector<Place> places) {
  const auto inside = [](std::size_t index, std::size_t size, const char* what) {
    KIMISYS_CHECK(index < size, kBad, "a row names ", what, " ", index, " of a table of ", size);
  };
  // Where each row's tensor and buffer will be once the tables are sorted.
  const std::vector<std::size_t> tensor_order = order_of(tensors, &tensor_key);
  const std::vector<std::size_t> buffer_order = order_of(buffers, &key_of);
  Layout layout;
  layout.fragments_.reserve(fragments.size());
  layout.fragment_tensor_.reserve(fragments.size());
  layout.fragment_buffer_.reserve(fragments.size());
  for (const FragmentRow& row : fragments) {
    inside(row.tensor, tensors.size(), "tensor");
    inside(row.buffer, buffers.size(), "buffer");
    layout.fragments_.push_back({tensors[row.tensor].name, row.region, buffers[row.buffer].rank,
                                 buffers[row.buffer].name, row.byte_offset, row.byte_strides});
    layout.fragment_tensor_.push_back(tensor_order[row.tensor]);
    layout.fragment_buffer_.push_back(buffer_order[row.buffer]);
  }
  for (const PaddingRow& row : padding) {
    inside(row.buffer, buffers.size(), "buffer");
    const Buffer& buffer = buffers[row.buffer];
    layout.padding_.push_back({buffer.rank, buffer.name, row.byte_offset, row.nbytes});
    layout.padding_buffer_.push_back(buffer_order[row.buffer]);
  }
  layout.tensors_ = std::move(tensors);
  layout.buffers_ = std::move(buffers);
  layout.places_ = std::move(places);
  layout.sort_tables();
  layout.check_fragments();
  return layout;
}

void Layout::sort_tables() {
  const auto by_name = [](const Tensor& a, const Tensor& b) { return a.name < b.name; };
  const auto by_key = [](const Buffer& a, const Buffer& b) { return key_of(a) < key_of(b); };
  if (!std::is_sorted(tensors_.begin(), tensors_.end(), by_name)) {
    std::stable_sort(tensors_.begin(), tensors_.end(), by_name);
  }
  if (!std::is_sorted(buffers_.begin(), buffers_.end(), by_key)) {
    std::stable_sort(buffers_.begin(), buffers_.end(), by_key);
  }
  std::sort(places_.begin(), places_.end(),
            [](const Place& a, const Place& b) { return a.rank < b.rank; });
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    check_tensor(tensors_[i]);
    KIMISYS_CHECK(i == 0 || tensors_[i].name != tensors_[i - 1].name, kBad, "tensor '",
                  tensors_[i].name, "' appears twice; names must be unique");
  }
  std::int64_t sum = 0;
  for (std::size_t i = 0; i < buffers_.size(); ++i) {
    check_buffer(buffers_[i]);
    KIMISYS_CHECK(i == 0 || key_of(buffers_[i]) != key_of(buffers_[i - 1]), kBad, "buffer '",
                  buffers_[i].name, "' of rank ", buffers_[i].rank,
                  " appears twice; names must be unique on a rank");
    sum += buffers_[i].nbytes;
    KIMISYS_CHECK(sum <= kMaxTotalBytes, kBad, "the buffers up to '", buffers_[i].name,
                  "' of rank ", buffers_[i].rank, " have more than ", kMaxTotalBytes,
                  " bytes in all; check their sizes");
  }
  for (std::size_t i = 0; i < places_.size(); ++i) {
    check_place(places_[i]);
    KIMISYS_CHECK(i == 0 || places_[i].rank != places_[i - 1].rank, kBad, "rank ", places_[i].rank,
                  " has two places; give it one");
  }
}

void Layout::resolve() {
  fragment_tensor_.reserve(fragments_.size());
  fragment_buffer_.reserve(fragments_.size());
  // Neighbours often share a tensor or a buffer.
  std::optional<std::size_t> tensor;
  std::optional<std::size_t> buffer;
  for (const Fragment& fragment : fragments_) {
    if (!tensor || tensors_[*tensor].name != fragment.tensor) tensor = find_tensor(fragment.tensor);
    KIMISYS_CHECK(tensor, kBad, "a fragment on rank ", fragment.rank, " names tensor '",
                  fragment.tensor, "', which is not in the tensor table; add it or mend the name");
    if (!buffer || buffers_[*buffer].rank != fragment.rank ||
        buffers_[*buffer].name != fragment.buffer) {
      buffer = find_buffer(fragment.rank, fragment.buffer);
    }
    KIMISYS_CHECK(buffer, kBad, "a fragment of tensor '", fragment.tensor, "' names buffer '",
                  fragment.buffer, "' of rank ", fragment.rank,
                  ", which is not in the buffer table; add it or mend the name");
    fragment_tensor_.push_back(*tensor);
    fragment_buffer_.push_back(*buffer);
  }
  padding_buffer_.reserve(padding_.size());
  for (const Padding& padding : padding_) {
    const auto found = find_buffer(padding.rank, padding.buffer);
    KIMISYS_CHECK(found, kBad, "padding names buffer '", padding.buffer, "' of rank ", padding.rank,
                  ", which is not in the buffer table; add it or mend the name");
    padding_buffer_.push_back(*found);
  }
}

void Layout::check_fragments() const {
  for (std::size_t i = 0; i < fragments_.size(); ++i) {
    check_region(fragments_[i], tensors_[fragment_tensor_[i]]);
    check_bytes(fragments_[i], tensors_[fragment_tensor_[i]], buffers_[fragment_buffer_[i]]);
  }
  for (std::size_t i = 0; i < padding_.size(); ++i) {
    check_padding(padding_[i], buffers_[padding_buffer_[i]]);
  }
}

std::vector<std::int64_t> Layout::ranks() const {
  std::vector<std::int64_t> ranks;
  for (const Buffer& buffer : buffers_) ranks.push_back(buffer.rank);
  for (const Place& place : places_) ranks.push_back(place.rank);
  std::sort(ranks.begin(), ranks.end());
  ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
  return ranks;
}

std::optional<std::size_t> Layout::find_tensor(std::string_view name) const {
  const auto found = std::lower_bound(
      tensors_.begin(), tensors_.end(), name,
      [](const Tensor& tensor, std::string_view key) { return tensor.name < key; });
  if (found == tensors_.end() || found->name != name) return std::nullopt;
  return static_cast<std::size_t>(found - tensors_.begin());
}

std::optional<std::size_t> Layout::find_buffer(std::int64_t rank, std::string_view name) const {
  const std::pair key(rank, name);
  const auto found = std::lower_bound(
      buffers_.begin(), buffers_.end(), key,
      [](const Buffer& buffer, const auto& wanted) { return key_of(buffer) < wanted; });
  if (found == buffers_.end() || key_of(*found) != key) return std::nullopt;
  return static_cast<std::size_t>(found - buffers_.begin());
}

std::span<const Buffer> Layout::buffers_of(std::int64_t rank) const {
  const auto begins_before = [](const Buffer& buffer, std::int64_t it) { return buffer.rank < it; };
  const auto first = std::lower_bound(buffers_.begin(), buffers_.end(), rank, begins_before);
  auto last = first;
  while (last != buffers_.end() && last->rank == rank) ++last;
  return {first, last};
}

Place Layout::place_of(std::int64_t rank) const {
  const auto found =
      std::lower_bound(places_.begin(), places_.end(), rank,
                       [](const Place& place, std::int64_t wanted) { return place.rank < wanted; });
  return found != places_.end() && found->rank == rank ? *found : Place{.rank = rank};
}

Layout Layout::merge(const std::vector<Layout>& layouts) {
  std::map<std::string_view, const Tensor*> table;
  std::map<std::int64_t, Place> placed;
  std::vector<Buffer> buffers;
  std::vector<Fragment> fragments;
  std::vector<Padding> padding;
  for (const Layout& layout : layouts) {
    for (const Tensor& tensor : layout.tensors_) {
      const Tensor& known = *table.emplace(tensor.name, &tensor).first->second;
      KIMISYS_CHECK(known == tensor, kBad, "tensor '", tensor.name, "' is ",
                    dtype_name(known.dtype), to_string(known.shape), " in one layout and ",
                    dtype_name(tensor.dtype), to_string(tensor.shape),
                    " in another; the sides to merge must agree");
    }
    for (const Place& place : layout.places_) {
      KIMISYS_CHECK(placed.emplace(place.rank, place).first->second == place, kBad, "rank ",
                    place.rank, " has two different places in the layouts to merge");
    }
    buffers.insert(buffers.end(), layout.buffers_.begin(), layout.buffers_.end());
    fragments.insert(fragments.end(), layout.fragments_.begin(), layout.fragments_.end());
    padding.insert(padding.end(), layout.padding_.begin(), layout.padding_.end());
  }
  std::vector<Tensor> tensors;
  for (const auto& entry : table) tensors.push_back(*entry.second);
  std::vector<Place> places;
  for (const auto& entry : placed) places.push_back(entry.second);
  return {std::move(tensors), std::move(buffers), std::move(fragments), std::move(padding),
          std::move(places)};
}

Layout Layout::of_rank(std::int64_t rank) const {
  const auto mine = [rank](const auto& list) {
    std::decay_t<decltype(list)> kept;
    for (const auto& item : list) {
      if (item.rank == rank) kept.push_back(item);
    }
    return kept;
  };
  return {tensors_, mine(buffers_), mine(fragments_), mine(padding_), mine(places_)};
}

std::vector<std::vector<std::size_t>> fragments_by_tensor(const Layout& layout) {
  std::vector<std::vector<std::size_t>> groups(layout.tensors().size());
  for (std::size_t i = 0; i < layout.fragments().size(); ++i) {
    if (!layout.fragments()[i].region.empty()) groups[layout.tensor_of(i)].push_back(i);
  }
  return groups;
}

}  // namespace kimisys::reshard
