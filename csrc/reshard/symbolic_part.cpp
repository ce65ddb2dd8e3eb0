#include "reshard/symbolic_part.h"

#include <algorithm>
#include <string_view>
#include <tuple>
#include <utility>

namespace kimisys::reshard {
namespace {

template <typename T, typename Key>
void sort_unique(std::vector<T>& list, Key key) {
  std::sort(list.begin(), list.end(), [&](const T& a, const T& b) { return key(a) < key(b); });
  list.erase(std::unique(list.begin(), list.end()), list.end());
}

}  // namespace

std::size_t Part::add(std::size_t block, std::size_t instance, std::size_t fragment) {
  const LayoutBlock& of = side_.blocks()[block];
  const Fragment& it = of.layout->fragments()[fragment];
  add_tensor(block, instance, of.layout->tensor_of(fragment));
  add_buffer(block, instance, of.layout->buffer_of(fragment));
  fragments_.push_back({tensors_.back().name, it.region, buffers_.back().rank, buffers_.back().name,
                        it.byte_offset, it.byte_strides});
  return fragments_.size() - 1;
}

void Part::add_tensor(std::size_t block, std::size_t instance, std::size_t tensor) {
  const LayoutBlock& of = side_.blocks()[block];
  const Tensor& it = of.layout->tensors()[tensor];
  tensors_.push_back({expand(it.name, of.instances[instance].label), it.dtype, it.shape});
}

void Part::add_buffer(std::size_t block, std::size_t instance, std::size_t buffer) {
  const LayoutBlock& of = side_.blocks()[block];
  const Instance& names = of.instances[instance];
  const Buffer& it = of.layout->buffers()[buffer];
  buffers_.push_back({names.ranks[static_cast<std::size_t>(it.rank)],
                      expand(it.name, names.buffer_label), it.nbytes});
}

void Part::add_padding(std::size_t block, std::size_t instance, std::size_t padding) {
  const Layout& layout = *side_.blocks()[block].layout;
  add_buffer(block, instance, layout.buffer_of_padding(padding));
  const Padding& it = layout.padding()[padding];
  padding_.push_back({buffers_.back().rank, buffers_.back().name, it.byte_offset, it.nbytes});
}

void Part::add_place(std::int64_t rank) { places_.push_back(side_.place_of(rank)); }

std::shared_ptr<const Layout> Part::layout() {
  sort_unique(tensors_, [](const Tensor& it) { return std::string_view(it.name); });
  sort_unique(buffers_, [](const Buffer& it) { return std::tie(it.rank, it.name); });
  std::copy_if(side_.places().begin(), side_.places().end(), std::back_inserter(places_),
               [this](const Place& place) {
                 return std::ranges::binary_search(buffers_, place.rank, {}, &Buffer::rank);
               });
  sort_unique(places_, [](const Place& it) { return it.rank; });
  return std::make_shared<const Layout>(std::move(tensors_), std::move(buffers_),
                                        std::move(fragments_), std::move(padding_),
                                        std::move(places_));
}

std::size_t Reading::index(std::size_t fragment) {
  const auto [at, is_new] = added_.emplace(fragment, 0);
  if (is_new) {
    const Group::Origin& it = group_.origins[fragment];
    at->second = from_.add(group_.sources[it.slot], member_.instances[it.slot], it.fragment);
  }
  return at->second;
}

}  // namespace kimisys::reshard
