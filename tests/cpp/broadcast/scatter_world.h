// Worlds for the tests of the scatter: random layouts on both sides, and records made by hand.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "broadcast/digest.h"
#include "broadcast/scatter.h"
#include "reshard/sample.h"

namespace kimisys::broadcast::test {

using reshard::Buffer;
using reshard::Dims;
using reshard::Fragment;
using reshard::Layout;
using reshard::Plan;
using reshard::Region;
using reshard::Tensor;
using reshard::test::Random;
using reshard::test::share;
using reshard::test::Store;

using Bytes = std::vector<std::byte>;

// The layout with all buffers of a rank behind one another in one, as snapshots have them.
inline Layout one_buffer(const Layout& layout) {
  std::map<std::int64_t, std::int64_t> ends;
  std::vector<std::int64_t> starts;
  for (const Buffer& buffer : layout.buffers()) {
    starts.push_back(ends[buffer.rank]);
    ends[buffer.rank] += buffer.nbytes;
  }
  std::vector<Fragment> fragments = layout.fragments();
  for (std::size_t i = 0; i < fragments.size(); ++i) {
    fragments[i].byte_offset += starts[layout.buffer_of(i)];
    fragments[i].buffer = "snapshot";
  }
  std::vector<Buffer> buffers;
  for (const auto& [rank, end] : ends) buffers.push_back({rank, "snapshot", end});
  return {layout.tensors(), buffers, fragments};
}

// Random bits for every tensor, placed wherever a fragment holds them.
inline void fill(const Layout& layout, Store& store, unsigned seed) {
  for (std::size_t i = 0; i < layout.fragments().size(); ++i) {
    const Fragment& fragment = layout.fragments()[i];
    const Tensor& tensor = layout.tensors()[layout.tensor_of(i)];
    const auto size = static_cast<std::size_t>(itemsize(tensor.dtype));
    Dims at = fragment.region.offset;
    for (std::int64_t left = fragment.region.elements(); left > 0; --left) {
      std::uint64_t bits = std::hash<std::string>()(tensor.name) + seed;
      std::int64_t offset = fragment.byte_offset;
      for (std::size_t d = 0; d < at.size(); ++d) {
        bits = (bits ^ static_cast<std::uint64_t>(at[d])) * 0x9e3779b97f4a7c15U;
        offset += (at[d] - fragment.region.offset[d]) * fragment.byte_strides[d];
      }
      bits ^= bits >> 29U;
      std::memcpy(store.at(fragment.rank, fragment.buffer).data() + offset, &bits, size);
      for (std::size_t d = at.size(); d-- > 0;) {
        if (++at[d] < fragment.region.offset[d] + fragment.region.extent[d]) break;
        at[d] = fragment.region.offset[d];
      }
    }
  }
}

// One version of a rank's snapshot as it is after another, in random kinds.
struct Update {
  Record record;
  Bytes payload;
};

inline Update publish(const Layout& layout, const Bytes& before, const Bytes& after,
                      Random& random) {
  const Blocks blocks(layout);
  Update made;
  std::vector<std::uint32_t> positions;
  for (std::size_t chunk = 0; chunk < blocks.chunk_count(); ++chunk) {
    while (made.payload.size() % 8 != 0) made.payload.emplace_back();
    made.record.chunk_offsets.push_back(made.payload.size());
    for (std::size_t b = blocks.chunk_begins()[chunk]; b < blocks.chunk_begins()[chunk + 1]; ++b) {
      const Block& block = blocks.blocks()[b];
      const Fragment& fragment = layout.fragments()[block.fragment];
      const auto item = itemsize(layout.tensors()[layout.tensor_of(block.fragment)].dtype);
      const auto size = static_cast<std::size_t>(item);
      positions.clear();
      Bytes values;
      Bytes all;
      const std::int64_t elements = block.region.elements();
      for (std::int64_t p = 0; p < elements; ++p) {
        std::int64_t rest = p;
        std::int64_t offset = fragment.byte_offset;
        for (std::size_t d = block.region.extent.size(); d-- > 0; rest /= block.region.extent[d]) {
          const std::int64_t index = rest % block.region.extent[d];
          offset += (index + block.region.offset[d] - fragment.region.offset[d]) *
                    fragment.byte_strides[d];
        }
        all.insert(all.end(), after.begin() + offset, after.begin() + offset + item);
        if (std::memcmp(before.data() + offset, after.data() + offset, size) == 0) continue;
        positions.push_back(static_cast<std::uint32_t>(p));
        values.insert(values.end(), after.begin() + offset, after.begin() + offset + item);
      }
      Descriptor descriptor;
      if (const std::int64_t kind = random.between(0, 9); !positions.empty() && kind == 0) {
        descriptor = {Kind::kWhole, 0, static_cast<std::uint32_t>(all.size())};
        made.payload.insert(made.payload.end(), all.begin(), all.end());
      } else if (!positions.empty() && kind == 1) {
        descriptor = {Kind::kWhole, 0, 0};
      } else if (!positions.empty()) {
        descriptor = encode(positions, values.data(), elements, item, made.payload);
      }
      made.record.descriptors.push_back(descriptor.word());
    }
  }
  while (made.payload.size() % 8 != 0) made.payload.emplace_back();
  made.record.version = 2;
  made.record.base = 1;
  made.record.payload_nbytes = made.payload.size();
  return made;
}

inline Bytes packed(const Update& update, const std::vector<Range>& ranges) {
  Bytes bytes;
  for (const Range& range : ranges) {
    bytes.insert(bytes.end(), update.payload.begin() + range.offset,
                 update.payload.begin() + range.end());
  }
  return bytes;
}

// Changes about one in `rarity` bytes of the elements' bits: the same wherever it is held.
inline void change(const Layout& layout, Store& store, std::int64_t rarity, unsigned seed) {
  Store other(layout);
  fill(layout, other, seed);
  Store pick(layout);
  fill(layout, pick, seed + 1);
  for (std::size_t i = 0; i < layout.fragments().size(); ++i) {
    const Fragment& fragment = layout.fragments()[i];
    const auto item = itemsize(layout.tensors()[layout.tensor_of(i)].dtype);
    auto& bytes = store.at(fragment.rank, fragment.buffer);
    Dims at(fragment.region.extent.size(), 0);
    for (std::int64_t left = fragment.region.elements(); left > 0; --left) {
      std::int64_t offset = fragment.byte_offset;
      for (std::size_t d = 0; d < at.size(); ++d) offset += at[d] * fragment.byte_strides[d];
      const auto chance = std::to_integer<std::int64_t>(
          pick.at(fragment.rank, fragment.buffer)[static_cast<std::size_t>(offset)]);
      if (chance % rarity == 0) {
        const auto& fresh = other.at(fragment.rank, fragment.buffer);
        std::copy_n(fresh.begin() + offset, item, bytes.begin() + offset);
      }
      for (std::size_t d = at.size(); d-- > 0;) {
        if (++at[d] < fragment.region.extent[d]) break;
        at[d] = 0;
      }
    }
  }
}

inline Sums digests(const std::vector<Layout>& rounds, const Layout& source,
                    const Layout& destination, Store& store) {
  Sums sums;
  for (const Layout& round : rounds) {
    const auto found = digest(round, store.memories(), 1, "naive");
    for (const Tensor& tensor : source.tensors()) {
      const auto at = destination.find_tensor(tensor.name);
      sums.push_back(at ? found[*at] : 0);
    }
  }
  return sums;
}

inline Sums added(Sums a, const Sums& b, bool subtract = false) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] += subtract ? 0 - b[i] : b[i];
  return a;
}

// Everything a Scatter does, on random layouts: replicas, overlaps, transposes, padding.
struct World {
  explicit World(unsigned seed) : random(seed) {
    std::vector<Tensor> tensors;
    const std::vector<DType> dtypes = {DType::kUInt8, DType::kBFloat16, DType::kFloat32,
                                       DType::kInt64};
    for (std::int64_t i = random.between(1, 3); i > 0; --i) {
      const auto dtype = dtypes[static_cast<std::size_t>(random.between(0, 3))];
      Dims shape = random.shape();
      if (random.between(0, 5) == 0) shape = {random.between(1, 5), 1024 * random.between(1, 2)};
      tensors.push_back({"t" + std::to_string(i), dtype, shape});
    }
    source = share(one_buffer(random.layout(tensors, 3, true)));
    destination = share(random.layout(tensors, 1, true));
    // Round 0 counts each element once, round 1 some parts again.
    rounds = {destination->cover()};
    std::vector<Fragment> parts;
    for (const Fragment& fragment : destination->fragments()) {
      Fragment part = fragment;
      part.region = random.part_of(fragment.region);
      for (std::size_t d = 0; d < part.byte_strides.size(); ++d) {
        part.byte_offset +=
            (part.region.offset[d] - fragment.region.offset[d]) * part.byte_strides[d];
      }
      if (!part.region.empty()) parts.push_back(part);
    }
    rounds.emplace_back(destination->tensors(), destination->buffers(), parts);
  }
  Random random;
  std::shared_ptr<const Layout> source;
  std::shared_ptr<const Layout> destination;
  std::vector<Layout> rounds;
};

}  // namespace kimisys::broadcast::test
