// The compact binary forms. All numbers are variable-length; tables are written in the order in
// which the types keep them, so that equal values give equal bytes.
//
//   layout:   names, each as (bytes shared with the name before, the rest);
//             tensors (name, dtype, sizes); buffers (rank's step, name, nbytes);
//             boxes: each distinct (offset, extent, byte strides) of a fragment, in order of use;
//             fragments (tensor's, buffer's and box's step, byte offset's step);
//             padding (buffer, byte offset, nbytes); places (rank, node, device, nic)
//   symbolic: blocks (layout, instances (label, buffer label, ranks' steps)), places
//   steps:    (destination fragment's and source fragment's step, region or "what both hold")
//
// "Step" is the difference to the entry before, which is small.
#include "reshard/bytes.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "base/utf8.h"
#include "reshard/box.h"

namespace kimisys::reshard {
namespace {

constexpr std::uint8_t kLastDType = static_cast<std::uint8_t>(DType::kInt64);

// Differences wrap around, so that any two numbers have one.
std::int64_t difference(std::size_t now, std::size_t before) {
  return static_cast<std::int64_t>(now - before);
}

std::int64_t difference(std::int64_t now, std::int64_t before) {
  return difference(static_cast<std::size_t>(now), static_cast<std::size_t>(before));
}

std::int64_t sum(std::int64_t before, std::int64_t difference) {
  return static_cast<std::int64_t>(static_cast<std::uint64_t>(before) +
                                   static_cast<std::uint64_t>(difference));
}

void write_dims(const Dims& dims, ByteWriter& out) {
  for (const std::int64_t value : dims) out.number(static_cast<std::uint64_t>(value));
}

Dims read_dims(std::size_t size, ByteReader& in) {
  Dims dims;
  for (std::size_t d = 0; d < size; ++d) dims.push_back(in.size());
  return dims;
}

// Numbers distinct names in the order of their first use.
class NameTable {
 public:
  std::size_t number(const std::string& name) {
    const auto [at, is_new] = numbers_.emplace(name, names_.size());
    if (is_new) names_.push_back(name);
    return at->second;
  }

  void write(ByteWriter& out) const {
    out.number(names_.size());
    std::string_view before;
    for (const std::string_view name : names_) {
      const auto same = std::mismatch(name.begin(), name.end(), before.begin(), before.end());
      const auto shared = static_cast<std::size_t>(same.first - name.begin());
      out.number(shared);
      out.text(name.substr(shared));
      before = name;
    }
  }

 private:
  std::unordered_map<std::string_view, std::size_t> numbers_;
  std::vector<std::string_view> names_;
};

std::vector<std::string> read_names(ByteReader& in) {
  std::vector<std::string> names(in.count(2));
  const std::string* before = nullptr;
  for (std::string& name : names) {
    const std::size_t shared = in.index((before == nullptr ? 0 : before->size()) + 1);
    if (before != nullptr) name = before->substr(0, shared);
    name += in.text();
    // Each name may repeat the one before: a short text could ask for terabytes.
    KIMISYS_CHECK(name.size() <= kMaxName, ErrorCode::kLayout, "a name has ", name.size(),
                  " bytes; at most ", kMaxName, " are read");
    KIMISYS_CHECK(is_utf8(name), ErrorCode::kLayout, "a name is not UTF-8");
    before = &name;
  }
  return names;
}

struct Box {
  Dims offset;
  Dims extent;
  Dims byte_strides;
  bool operator==(const Box&) const = default;
};

struct BoxHash {
  std::size_t operator()(const Box& box) const {
    std::size_t hash = box.offset.size();
    for (const Dims* dims : {&box.offset, &box.extent, &box.byte_strides}) {
      for (const std::int64_t value : *dims) {
        hash = (hash ^ static_cast<std::size_t>(value)) * 0x9e3779b97f4a7c15U;
        hash ^= hash >> 29U;
      }
    }
    return hash;
  }
};

void write_fragments(const Layout& layout, ByteWriter& out) {
  std::unordered_map<Box, std::size_t, BoxHash> numbers;
  std::vector<const Fragment*> boxes;
  std::vector<std::size_t> box_of;
  box_of.reserve(layout.fragments().size());
  for (const Fragment& it : layout.fragments()) {
    const auto [at, is_new] =
        numbers.emplace(Box{it.region.offset, it.region.extent, it.byte_strides}, boxes.size());
    if (is_new) boxes.push_back(&it);
    box_of.push_back(at->second);
  }
  out.number(boxes.size());
  for (const Fragment* it : boxes) {
    out.number(it->byte_strides.size());
    write_dims(it->region.offset, out);
    write_dims(it->region.extent, out);
    write_dims(it->byte_strides, out);
  }
  out.number(box_of.size());
  std::tuple<std::size_t, std::size_t, std::size_t, std::int64_t> before = {0, 0, 0, 0};
  for (std::size_t i = 0; i < box_of.size(); ++i) {
    const std::tuple now = {layout.tensor_of(i), layout.buffer_of(i), box_of[i],
                            layout.fragments()[i].byte_offset};
    out.signed_number(difference(std::get<0>(now), std::get<0>(before)));
    out.signed_number(difference(std::get<1>(now), std::get<1>(before)));
    out.signed_number(difference(std::get<2>(now), std::get<2>(before)));
    out.signed_number(difference(std::get<3>(now), std::get<3>(before)));
    before = now;
  }
}

std::vector<FragmentRow> read_fragments(std::size_t tensors, std::size_t buffers, ByteReader& in) {
  std::vector<Box> boxes;
  for (std::size_t left = in.count(); left > 0; --left) {
    const std::size_t dims = in.index(kMaxDims + 1);
    Dims offset = read_dims(dims, in);
    Dims extent = read_dims(dims, in);
    boxes.push_back({offset, extent, read_dims(dims, in)});
  }
  std::vector<FragmentRow> rows;
  std::size_t tensor = 0;
  std::size_t buffer = 0;
  std::size_t box = 0;
  std::int64_t byte_offset = 0;
  const std::size_t count = in.count(4);
  rows.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    tensor = in.next_index(tensor, tensors);
    buffer = in.next_index(buffer, buffers);
    box = in.next_index(box, boxes.size());
    byte_offset = sum(byte_offset, in.signed_number());
    rows.push_back({tensor,
                    buffer,
                    {boxes[box].offset, boxes[box].extent},
                    byte_offset,
                    boxes[box].byte_strides});
  }
  return rows;
}

void write_places(const std::vector<Place>& places, ByteWriter& out) {
  out.number(places.size());
  for (const Place& it : places) {
    for (const std::int64_t value : {it.rank, it.node, it.device, it.nic}) {
      out.number(static_cast<std::uint64_t>(value));
    }
  }
}

std::vector<Place> read_places(ByteReader& in) {
  std::vector<Place> places(in.count(4));
  for (Place& it : places) {
    for (std::int64_t* value : {&it.rank, &it.node, &it.device, &it.nic}) *value = in.size();
  }
  return places;
}

}  // namespace

void write_layout(const Layout& layout, ByteWriter& out) {
  NameTable names;
  std::vector<std::size_t> of_tensor;
  std::vector<std::size_t> of_buffer;
  for (const Tensor& it : layout.tensors()) of_tensor.push_back(names.number(it.name));
  for (const Buffer& it : layout.buffers()) of_buffer.push_back(names.number(it.name));
  names.write(out);
  out.number(of_tensor.size());
  for (std::size_t i = 0; i < of_tensor.size(); ++i) {
    const Tensor& it = layout.tensors()[i];
    out.number(of_tensor[i]);
    out.number(static_cast<std::uint8_t>(it.dtype));
    out.number(it.shape.size());
    write_dims(it.shape, out);
  }
  out.number(of_buffer.size());
  std::int64_t rank = 0;
  for (std::size_t i = 0; i < of_buffer.size(); ++i) {
    const Buffer& it = layout.buffers()[i];
    out.signed_number(difference(it.rank, std::exchange(rank, it.rank)));
    out.number(of_buffer[i]);
    out.number(static_cast<std::uint64_t>(it.nbytes));
  }
  write_fragments(layout, out);
  out.number(layout.padding().size());
  for (std::size_t i = 0; i < layout.padding().size(); ++i) {
    out.number(layout.buffer_of_padding(i));
    out.number(static_cast<std::uint64_t>(layout.padding()[i].byte_offset));
    out.number(static_cast<std::uint64_t>(layout.padding()[i].nbytes));
  }
  write_places(layout.places(), out);
}

Layout read_layout(ByteReader& in) {
  const std::vector<std::string> names = read_names(in);
  std::vector<Tensor> tensors(in.count(3));
  const auto name = [&]() -> const std::string& { return names[in.index(names.size())]; };
  for (Tensor& it : tensors) {
    it.name = name();
    it.dtype = static_cast<DType>(in.index(std::size_t{kLastDType} + 1));
    it.shape = read_dims(in.index(kMaxDims + 1), in);
  }
  std::vector<Buffer> buffers(in.count(3));
  std::int64_t rank = 0;
  for (Buffer& it : buffers) {
    rank = sum(rank, in.signed_number());
    it.rank = rank;
    it.name = name();
    it.nbytes = in.size();
  }
  const std::vector<FragmentRow> fragments = read_fragments(tensors.size(), buffers.size(), in);
  std::vector<PaddingRow> padding(in.count(3));
  for (PaddingRow& it : padding) it = {in.index(buffers.size()), in.size(), in.size()};
  return Layout::of_rows(std::move(tensors), std::move(buffers), fragments, padding,
                         read_places(in));
}

void write_symbolic(const SymbolicLayout& layout, ByteWriter& out) {
  out.number(layout.blocks().size());
  for (const LayoutBlock& block : layout.blocks()) {
    write_layout(*block.layout, out);
    out.number(block.instances.size());
    for (const Instance& it : block.instances) {
      out.text(it.label);
      const bool same = it.buffer_label == it.label;
      out.number(same ? 0 : 1);
      if (!same) out.text(it.buffer_label);
      out.number(it.ranks.size());
      std::int64_t before = 0;
      for (const std::int64_t rank : it.ranks) {
        out.signed_number(difference(rank, std::exchange(before, rank)));
      }
    }
  }
  write_places(layout.places(), out);
}

SymbolicLayout read_symbolic(ByteReader& in) {
  std::vector<LayoutBlock> blocks(in.count());
  for (LayoutBlock& block : blocks) {
    block.layout = std::make_shared<const Layout>(read_layout(in));
    block.instances.resize(in.count(3));
    for (Instance& it : block.instances) {
      it.label = in.text();
      it.buffer_label = in.index(2) == 0 ? std::string_view(it.label) : in.text();
      KIMISYS_CHECK(is_utf8(it.label) && is_utf8(it.buffer_label), ErrorCode::kLayout,
                    "a label is not UTF-8");
      it.ranks.resize(in.count());
      std::int64_t rank = 0;
      for (std::int64_t& value : it.ranks) value = rank = sum(rank, in.signed_number());
    }
  }
  return SymbolicLayout(std::move(blocks), read_places(in));
}

void write_steps(const Layout& source, const Layout& destination, const std::vector<Step>& steps,
                 ByteWriter& out) {
  out.number(steps.size());
  std::size_t from = 0;
  std::size_t to = 0;
  for (const Step& it : steps) {
    out.signed_number(
        difference(it.destination_fragment, std::exchange(to, it.destination_fragment)));
    out.signed_number(difference(it.source_fragment, std::exchange(from, it.source_fragment)));
    const bool common =
        intersect(source.fragments()[from].region, destination.fragments()[to].region) == it.region;
    out.number(common ? 0 : 1);
    if (common) continue;
    write_dims(it.region.offset, out);
    write_dims(it.region.extent, out);
  }
}

std::vector<Step> read_steps(const Layout& source, const Layout& destination, ByteReader& in) {
  std::vector<Step> steps(in.count(3));
  std::size_t from = 0;
  std::size_t to = 0;
  for (Step& it : steps) {
    it.destination_fragment = to = in.next_index(to, destination.fragments().size());
    it.source_fragment = from = in.next_index(from, source.fragments().size());
    const Region& held = source.fragments()[from].region;
    const Region& wanted = destination.fragments()[to].region;
    KIMISYS_CHECK(held.offset.size() == wanted.offset.size(), ErrorCode::kPlan,
                  "a copy joins tensor '", source.fragments()[from].tensor, "' region ", held,
                  " of source rank ", source.fragments()[from].rank, " and tensor '",
                  destination.fragments()[to].tensor, "' region ", wanted, " of destination rank ",
                  destination.fragments()[to].rank, ", which differ in dimensions");
    if (in.index(2) == 1) {
      it.region.offset = read_dims(wanted.offset.size(), in);
      it.region.extent = read_dims(wanted.offset.size(), in);
      continue;
    }
    const auto common = intersect(held, wanted);
    KIMISYS_CHECK(common, ErrorCode::kPlan, "a copy joins tensor '",
                  destination.fragments()[to].tensor, "' region ", held, " of source rank ",
                  source.fragments()[from].rank, " and region ", wanted, " of destination rank ",
                  destination.fragments()[to].rank, ", which have nothing in common");
    it.region = *common;
  }
  return steps;
}

}  // namespace kimisys::reshard
