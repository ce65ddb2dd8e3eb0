// The text form of a layout: one JSON object. Fragments and paddings name tensors and buffers by
// their place in the tables, which keeps large layouts small.
//
//   {"format": "kimisys.layout", "version": 1,
//    "tensors":   [[name, dtype, [sizes]], ...],
//    "buffers":   [[rank, name, nbytes], ...],
//    "fragments": [[tensor, [offset], [extent], buffer, byte_offset, [byte_strides]], ...],
//    "padding":   [[buffer, byte_offset, nbytes], ...],
//    "places":    [[rank, node, device, nic], ...]}
//
// Reading checks the form here and the meaning in Layout's constructor.
#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "base/json.h"
#include "reshard/layout.h"

namespace kimisys::reshard {
namespace {

constexpr auto kBad = ErrorCode::kLayout;
constexpr std::string_view kFormat = "kimisys.layout";
constexpr std::int64_t kVersion = 1;

void write(std::int64_t value, std::string& out) { out.append(std::to_string(value)); }

void write(const std::string& value, std::string& out) { write_json_string(value, out); }

void write(const Dims& dims, std::string& out) {
  out.push_back('[');
  for (std::size_t d = 0; d < dims.size(); ++d) {
    if (d > 0) out.push_back(',');
    write(dims[d], out);
  }
  out.push_back(']');
}

template <typename First, typename... Rest>
void write_row(std::string& out, const First& first, const Rest&... rest) {
  out.push_back('[');
  write(first, out);
  ((out.push_back(','), write(rest, out)), ...);
  out.push_back(']');
}

// Writes `,"name":[row,row,...]`; `row(i)` appends the i-th row.
template <typename WriteRow>
void write_table(std::string& out, std::string_view name, std::size_t count, WriteRow row) {
  out.append(",\"").append(name).append("\":[");
  for (std::size_t i = 0; i < count; ++i) {
    if (i > 0) out.push_back(',');
    row(i);
  }
  out.push_back(']');
}

// One value with the path that leads to it, for messages.
class Field {
 public:
  Field(const Json& value, std::string path) : value_(value), path_(std::move(path)) {}

  const Json::Array& array() const { return as<Json::Array>("an array"); }
  std::int64_t integer() const { return as<std::int64_t>("an integer"); }
  const std::string& string() const { return as<std::string>("a string"); }

  // The elements of a row, which must be `count` long.
  std::vector<Field> row(std::size_t count) const {
    const Json::Array& items = array();
    KIMISYS_CHECK(items.size() == count, kBad, "layout text: ", path_, " has ", items.size(),
                  " entries where there should be ", count);
    return fields(items);
  }

  std::vector<Field> rows() const { return fields(array()); }

  Dims dims() const {
    Dims dims;
    for (const Field& field : fields(array())) dims.push_back(field.integer());
    return dims;
  }

  // An index into a table of `size` entries.
  std::size_t index(std::size_t size) const {
    const std::int64_t value = integer();
    KIMISYS_CHECK(value >= 0 && static_cast<std::uint64_t>(value) < size, kBad,
                  "layout text: ", path_, " is ", value, ", but the table it points into has ",
                  size, " entries");
    return static_cast<std::size_t>(value);
  }

 private:
  template <typename T>
  const T& as(const char* kind) const {
    const T* value = value_.get_if<T>();
    KIMISYS_CHECK(value != nullptr, kBad, "layout text: ", path_, " should be ", kind);
    return *value;
  }

  std::vector<Field> fields(const Json::Array& items) const {
    std::vector<Field> list;
    list.reserve(items.size());
    for (std::size_t i = 0; i < items.size(); ++i) {
      list.emplace_back(items[i], path_ + "[" + std::to_string(i) + "]");
    }
    return list;
  }

  const Json& value_;
  std::string path_;
};

constexpr std::array<std::string_view, 7> kKeys = {"format",    "version", "tensors", "buffers",
                                                   "fragments", "padding", "places"};

// The members in the order of kKeys: each must be there, and nothing else.
std::vector<Field> members(const Json& root) {
  const auto* object = root.get_if<Json::Object>();
  KIMISYS_CHECK(object != nullptr, kBad, "layout text: the whole should be an object");
  for (const auto& member : *object) {
    KIMISYS_CHECK(std::find(kKeys.begin(), kKeys.end(), member.first) != kKeys.end(), kBad,
                  "layout text: unknown key '", member.first, "'");
  }
  std::vector<Field> list;
  for (const std::string_view key : kKeys) {
    const auto found = std::find_if(object->begin(), object->end(),
                                    [key](const auto& member) { return member.first == key; });
    KIMISYS_CHECK(found != object->end(), kBad, "layout text: key '", key, "' is missing");
    list.emplace_back(found->second, std::string(key));
  }
  return list;
}

}  // namespace

std::string Layout::to_json() const {
  std::string out = "{\"format\":\"";
  out.append(kFormat).append("\",\"version\":").append(std::to_string(kVersion));
  const auto index = [](std::size_t i) { return static_cast<std::int64_t>(i); };
  write_table(out, "tensors", tensors_.size(), [&](std::size_t i) {
    const Tensor& it = tensors_[i];
    write_row(out, it.name, std::string(dtype_name(it.dtype)), it.shape);
  });
  write_table(out, "buffers", buffers_.size(), [&](std::size_t i) {
    write_row(out, buffers_[i].rank, buffers_[i].name, buffers_[i].nbytes);
  });
  write_table(out, "fragments", fragments_.size(), [&](std::size_t i) {
    const Fragment& it = fragments_[i];
    write_row(out, index(fragment_tensor_[i]), it.region.offset, it.region.extent,
              index(fragment_buffer_[i]), it.byte_offset, it.byte_strides);
  });
  write_table(out, "padding", padding_.size(), [&](std::size_t i) {
    write_row(out, index(padding_buffer_[i]), padding_[i].byte_offset, padding_[i].nbytes);
  });
  write_table(out, "places", places_.size(), [&](std::size_t i) {
    write_row(out, places_[i].rank, places_[i].node, places_[i].device, places_[i].nic);
  });
  out.push_back('}');
  return out;
}

Layout Layout::from_json(std::string_view text) {
  const Json root = parse_json(text, kBad);
  const std::vector<Field> member = members(root);
  KIMISYS_CHECK(member[0].string() == kFormat, kBad, "layout text: format is '", member[0].string(),
                "', not '", kFormat, "'");
  KIMISYS_CHECK(member[1].integer() == kVersion, kBad, "layout text: version is ",
                member[1].integer(), "; this build reads version ", kVersion);
  std::vector<Tensor> tensors;
  for (const Field& field : member[2].rows()) {
    const auto row = field.row(3);
    tensors.push_back({row[0].string(), parse_dtype(row[1].string()), row[2].dims()});
  }
  std::vector<Buffer> buffers;
  for (const Field& field : member[3].rows()) {
    const auto row = field.row(3);
    buffers.push_back({row[0].integer(), row[1].string(), row[2].integer()});
  }
  std::vector<Fragment> fragments;
  for (const Field& field : member[4].rows()) {
    const auto row = field.row(6);
    const Tensor& tensor = tensors[row[0].index(tensors.size())];
    const Buffer& buffer = buffers[row[3].index(buffers.size())];
    fragments.push_back({tensor.name,
                         {row[1].dims(), row[2].dims()},
                         buffer.rank,
                         buffer.name,
                         row[4].integer(),
                         row[5].dims()});
  }
  std::vector<Padding> padding;
  for (const Field& field : member[5].rows()) {
    const auto row = field.row(3);
    const Buffer& buffer = buffers[row[0].index(buffers.size())];
    padding.push_back({buffer.rank, buffer.name, row[1].integer(), row[2].integer()});
  }
  std::vector<Place> places;
  for (const Field& field : member[6].rows()) {
    const auto row = field.row(4);
    places.push_back({row[0].integer(), row[1].integer(), row[2].integer(), row[3].integer()});
  }
  return {std::move(tensors), std::move(buffers), std::move(fragments), std::move(padding),
          std::move(places)};
}

}  // namespace kimisys::reshard
