// The part of JSON that our wire uses: objects, arrays, strings, 64-bit integers, booleans, null.
// The reader treats its text as hostile: depth is limited, numbers must be integers that fit,
// strings must be valid UTF-8, keys unique, and nothing may follow the value.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "base/error.h"

namespace kimisys {

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;

  Json() = default;
  explicit Json(bool value) : value_(value) {}
  explicit Json(std::int64_t value) : value_(value) {}
  explicit Json(std::string value) : value_(std::move(value)) {}
  explicit Json(Array value) : value_(std::move(value)) {}
  explicit Json(Object value) : value_(std::move(value)) {}

  // The value, if it is of that kind; nullptr otherwise.
  template <typename T>
  const T* get_if() const {
    return std::get_if<T>(&value_);
  }

 private:
  std::variant<std::monostate, bool, std::int64_t, std::string, Array, Object> value_;
};

// Raises an Error with `code`, which says at which byte the text is malformed.
Json parse_json(std::string_view text, ErrorCode code);

// Appends the text as a JSON string, quotes included. The text must be UTF-8.
void write_json_string(std::string_view text, std::string& out);

}  // namespace kimisys
