// One number per tensor dimension, kept in place: layouts of a large model hold millions of these.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>

#include "base/error.h"

namespace kimisys::reshard {

// More dimensions than any checkpoint has; the executor keeps its loop state in arrays of this
// size.
inline constexpr std::size_t kMaxDims = 8;

// Sizes and offsets in elements, strides in bytes. Used like a vector; growing it beyond kMaxDims
// raises LayoutError.
class Dims {
 public:
  using value_type = std::int64_t;
  using iterator = std::int64_t*;
  using const_iterator = const std::int64_t*;

  Dims() = default;
  Dims(std::initializer_list<std::int64_t> values) { append(values.begin(), values.end()); }
  explicit Dims(std::size_t size, std::int64_t value = 0) { resize(size, value); }
  template <std::input_iterator Iterator>
  Dims(Iterator first, Iterator last) {
    append(first, last);
  }

  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  std::int64_t& operator[](std::size_t d) { return values_[d]; }
  std::int64_t operator[](std::size_t d) const { return values_[d]; }
  std::int64_t front() const { return values_[0]; }
  std::int64_t back() const { return values_[size_ - 1]; }
  iterator begin() { return values_.data(); }
  iterator end() { return values_.data() + size_; }
  const_iterator begin() const { return values_.data(); }
  const_iterator end() const { return values_.data() + size_; }

  void push_back(std::int64_t value) {
    KIMISYS_CHECK(size_ < kMaxDims, ErrorCode::kLayout, "more than ", kMaxDims,
                  " dimensions; at most ", kMaxDims, " are supported");
    values_[size_++] = value;
  }
  void resize(std::size_t size, std::int64_t value = 0) {
    while (size_ > size) values_[--size_] = 0;
    while (size_ < size) push_back(value);
  }

  bool operator==(const Dims& other) const {
    return std::equal(begin(), end(), other.begin(), other.end());
  }
  auto operator<=>(const Dims& other) const {
    return std::lexicographical_compare_three_way(begin(), end(), other.begin(), other.end());
  }

 private:
  template <typename Iterator>
  void append(Iterator first, Iterator last) {
    for (; first != last; ++first) push_back(*first);
  }

  std::array<std::int64_t, kMaxDims> values_{};
  std::size_t size_ = 0;
};

}  // namespace kimisys::reshard
