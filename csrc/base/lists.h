// Many short lists in two arrays: no allocation per list.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kimisys {

class Lists {
 public:
  Lists() = default;

  // List k holds those i of [0, items) with key_of(i) == k, ascending. Keys must be < lists; a
  // negative key leaves the item out.
  template <typename KeyOf>
  Lists(std::size_t lists, std::size_t items, KeyOf key_of) : begin_(lists + 1, 0) {
    for (std::size_t i = 0; i < items; ++i) {
      if (const std::int64_t key = key_of(i); key >= 0) ++begin_[static_cast<std::size_t>(key) + 1];
    }
    for (std::size_t k = 0; k < lists; ++k) begin_[k + 1] += begin_[k];
    items_.resize(begin_[lists]);
    std::vector<std::size_t> next(begin_.begin(), begin_.end() - 1);
    for (std::size_t i = 0; i < items; ++i) {
      if (const std::int64_t key = key_of(i); key >= 0) {
        items_[next[static_cast<std::size_t>(key)]++] = i;
      }
    }
  }

  std::size_t size() const { return begin_.empty() ? 0 : begin_.size() - 1; }
  std::span<const std::size_t> operator[](std::size_t list) const {
    return {items_.data() + begin_[list], begin_[list + 1] - begin_[list]};
  }
  std::span<std::size_t> operator[](std::size_t list) {
    return {items_.data() + begin_[list], begin_[list + 1] - begin_[list]};
  }

 private:
  std::vector<std::size_t> begin_;
  std::vector<std::size_t> items_;
};

}  // namespace kimisys
