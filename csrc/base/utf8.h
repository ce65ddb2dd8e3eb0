// Is a text well-formed UTF-8? Names reach Python and JSON, which take nothing else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kimisys {

// False for overlong forms, surrogates and numbers beyond U+10FFFF too.
inline bool is_utf8(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const auto lead = static_cast<unsigned char>(text[at]);
    if (lead < 0x80) {
      ++at;
      continue;
    }
    if (lead < 0xc2 || lead > 0xf4) return false;
    const std::size_t length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    if (text.size() - at < length) return false;
    std::uint32_t point = lead & (0xffU >> (length + 1));
    for (const char c : text.substr(at + 1, length - 1)) {
      const auto byte = static_cast<unsigned char>(c);
      if ((byte & 0xc0U) != 0x80U) return false;
      point = (point << 6U) | (byte & 0x3fU);
    }
    const bool overlong = (length == 3 && point < 0x800) || (length == 4 && point < 0x10000);
    if (overlong || (point >= 0xd800 && point <= 0xdfff) || point > 0x10ffff) return false;
    at += length;
  }
  return true;
}

}  // namespace kimisys
