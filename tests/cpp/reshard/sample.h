// Layouts for tests: small ones written by hand, and random ones with everything a layout may have.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "reshard/execute.h"
#include "reshard/layout.h"
#include "reshard/plan.h"

namespace kimisys::reshard::test {

// Row-major byte strides of a dense block.
inline Dims dense_strides(const Dims& extent, std::int64_t itemsize) {
  Dims strides(extent.size());
  std::int64_t stride = itemsize;
  for (std::size_t d = extent.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<std::int64_t>(extent[d], 1);
  }
  return strides;
}

inline std::shared_ptr<const Layout> share(Layout layout) {
  return std::make_shared<const Layout>(std::move(layout));
}

// One 2-d tensor cut along one dimension into equal parts, one per rank, each dense in its buffer.
inline Layout sharded(const std::string& name, DType dtype, Dims shape, std::size_t dim,
                      std::int64_t ranks) {
  std::vector<Buffer> buffers;
  std::vector<Fragment> fragments;
  for (std::int64_t rank = 0; rank < ranks; ++rank) {
    Region region{Dims(shape.size(), 0), shape};
    region.extent[dim] = shape[dim] / ranks;
    region.offset[dim] = rank * region.extent[dim];
    buffers.push_back({rank, name, region.elements() * itemsize(dtype)});
    fragments.push_back(
        {name, region, rank, name, 0, dense_strides(region.extent, itemsize(dtype))});
  }
  return {{{name, dtype, shape}}, buffers, fragments};
}

// Buffers with memory behind them.
class Store {
 public:
  explicit Store(const Layout& layout, std::byte fill = std::byte{0xee}) {
    for (const Buffer& buffer : layout.buffers()) {
      auto& bytes = bytes_[{buffer.rank, buffer.name}];
      bytes.assign(static_cast<std::size_t>(buffer.nbytes), fill);
      memories_.emplace_back(Memory{bytes.data(), buffer.nbytes, true});
    }
  }
  std::vector<std::byte>& at(std::int64_t rank, const std::string& name) {
    return bytes_.at({rank, name});
  }
  // In the order of layout.buffers(), which is that of bytes_.
  const Memories& memories() const { return memories_; }
  std::optional<Memory>& memory(std::int64_t rank, const std::string& name) {
    const auto at = std::distance(bytes_.begin(), bytes_.find({rank, name}));
    return memories_.at(static_cast<std::size_t>(at));
  }
  bool operator==(const Store& other) const { return bytes_ == other.bytes_; }

 private:
  std::map<std::pair<std::int64_t, std::string>, std::vector<std::byte>> bytes_;
  Memories memories_;
};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}

  std::int64_t between(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(engine_);
  }

  Dims shape() {
    Dims shape;
    for (std::int64_t d = between(0, 4); d > 0; --d) shape.push_back(between(between(0, 1), 9));
    return shape;
  }

  // Disjoint boxes that fill `whole`.
  std::vector<Region> tiles(const Region& whole, int depth) {
    std::vector<std::size_t> long_dims;
    for (std::size_t d = 0; d < whole.extent.size(); ++d) {
      if (whole.extent[d] > 1) long_dims.push_back(d);
    }
    if (depth == 0 || long_dims.empty() || whole.empty()) return {whole};
    const auto pick =
        static_cast<std::size_t>(between(0, static_cast<std::int64_t>(long_dims.size()) - 1));
    const std::size_t d = long_dims[pick];
    Region left = whole;
    Region right = whole;
    left.extent[d] = between(1, whole.extent[d] - 1);
    right.offset[d] += left.extent[d];
    right.extent[d] -= left.extent[d];
    std::vector<Region> all = tiles(left, depth - 1);
    for (Region& region : tiles(right, depth - 1)) all.push_back(std::move(region));
    return all;
  }

  // A sub-box of `whole`.
  Region part_of(const Region& whole) {
    Region part = whole;
    for (std::size_t d = 0; d < whole.extent.size(); ++d) {
      part.extent[d] = between(0, whole.extent[d]);
      part.offset[d] += between(0, whole.extent[d] - part.extent[d]);
    }
    return part;
  }

  // Every tensor, held by `ranks` ranks. Each buffer holds one tensor's pieces behind one another,
  // in a random order of dimensions, with random padding between them. `extra` adds overlapping
  // parts.
  Layout layout(const std::vector<Tensor>& tensors, std::int64_t ranks, bool extra) {
    std::map<std::pair<std::int64_t, std::string>, std::int64_t> fill;
    std::vector<Fragment> fragments;
    std::vector<Padding> paddings;
    for (const Tensor& tensor : tensors) {
      const Region whole{Dims(tensor.shape.size(), 0), tensor.shape};
      std::vector<Region> regions = tiles(whole, static_cast<int>(between(0, 4)));
      for (std::int64_t i = extra ? between(0, 3) : 0; i > 0; --i) {
        regions.insert(regions.begin() + between(0, static_cast<std::int64_t>(regions.size())),
                       part_of(whole));
      }
      for (const Region& region : regions) {
        const std::int64_t rank = between(0, ranks - 1);
        const std::string buffer = between(0, 1) == 1 ? "shared" : tensor.name;
        std::int64_t& end = fill[{rank, buffer}];
        if (const std::int64_t gap = between(0, 2) == 0 ? between(1, 5) : 0; gap > 0) {
          paddings.push_back({rank, buffer, end, gap});
          end += gap;
        }
        fragments.push_back(
            {tensor.name, region, rank, buffer, end, strides(region, tensor.dtype)});
        end += region.elements() * itemsize(tensor.dtype);
      }
    }
    std::vector<Buffer> buffers;
    for (const auto& [key, nbytes] : fill) buffers.push_back({key.first, key.second, nbytes});
    return {tensors, buffers, fragments, paddings, {{0, 0, between(0, 1)}, {1, between(0, 1)}}};
  }

 private:
  Dims strides(const Region& region, DType dtype) {
    Dims strides(region.extent.size());
    std::vector<std::size_t> order(strides.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    if (between(0, 1) == 1) std::shuffle(order.begin(), order.end(), engine_);
    std::int64_t stride = itemsize(dtype);
    for (auto d = order.rbegin(); d != order.rend(); ++d) {
      strides[*d] = stride;
      stride *= std::max<std::int64_t>(region.extent[*d], 1);
    }
    return strides;
  }

  std::mt19937 engine_;
};

}  // namespace kimisys::reshard::test
