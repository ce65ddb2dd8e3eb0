#include "base/dtype.h"

#include <array>
#include <utility>

#include "base/error.h"

namespace kimisys {
namespace {

constexpr std::array<std::pair<DType, std::string_view>, 8> kNames = {{
    {DType::kFloat32, "float32"},
    {DType::kBFloat16, "bfloat16"},
    {DType::kFloat16, "float16"},
    {DType::kFloat8E4M3FN, "float8_e4m3fn"},
    {DType::kUInt8, "uint8"},
    {DType::kInt8, "int8"},
    {DType::kInt32, "int32"},
    {DType::kInt64, "int64"},
}};

}  // namespace

std::string_view dtype_name(DType dtype) {
  for (const auto& [value, name] : kNames) {
    if (value == dtype) return name;
  }
  return "unknown";
}

DType parse_dtype(std::string_view name) {
  for (const auto& [value, known] : kNames) {
    if (known == name) return value;
  }
  std::string list;
  for (const auto& entry : kNames) list.append(list.empty() ? "" : ", ").append(entry.second);
  fail(ErrorCode::kLayout, "unknown dtype '", name, "'; use one of ", list);
}

}  // namespace kimisys
