// A part of a symbolic layout, spelled out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "reshard/symbolic.h"
#include "reshard/symbolic_plan.h"

namespace kimisys::reshard {

// Collects fragments, buffers and paddings of instances, with the tensors and places that they
// need. Tensors, buffers and places may be added twice.
class Part {
 public:
  explicit Part(const SymbolicLayout& side) : side_(side) {}

  // The index that the fragment will have.
  std::size_t add(std::size_t block, std::size_t instance, std::size_t fragment);
  void add_tensor(std::size_t block, std::size_t instance, std::size_t tensor);
  void add_buffer(std::size_t block, std::size_t instance, std::size_t buffer);
  void add_padding(std::size_t block, std::size_t instance, std::size_t padding);
  // Also for a rank without a place on that side: it is then one of the part's ranks.
  void add_place(std::int64_t rank);

  // Once, at the end.
  std::shared_ptr<const Layout> layout();

 private:
  const SymbolicLayout& side_;
  std::vector<Tensor> tensors_;
  std::vector<Buffer> buffers_;
  std::vector<Fragment> fragments_;
  std::vector<Padding> padding_;
  std::vector<Place> places_;
};

// The source fragments that one member of a group reads, each added to a part when first asked for.
class Reading {
 public:
  Reading(const Group& group, const Group::Member& member, Part& from)
      : group_(group), member_(member), from_(from) {}

  // From the template's index to the part's.
  std::size_t index(std::size_t fragment);

 private:
  const Group& group_;
  const Group::Member& member_;
  Part& from_;
  std::map<std::size_t, std::size_t> added_;
};

}  // namespace kimisys::reshard
