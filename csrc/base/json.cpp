#include "base/json.h"

#include <algorithm>
#include <charconv>
#include <set>

namespace kimisys {
namespace {

constexpr int kMaxDepth = 32;

bool is_one_of(char c, std::string_view set) { return set.find(c) != std::string_view::npos; }

class Reader {
 public:
  Reader(std::string_view text, ErrorCode code) : text_(text), code_(code) {}

  Json read() {
    Json value = read_value(0);
    skip_space();
    check(position_ == text_.size(), "something follows the value");
    return value;
  }

 private:
  void check(bool condition, const char* what) const {
    KIMISYS_CHECK(condition, code_, "malformed JSON at byte ", position_, ": ", what);
  }

  void skip_space() {
    while (position_ < text_.size() && is_one_of(text_[position_], " \t\r\n")) {
      ++position_;
    }
  }

  bool accept(char wanted) {
    skip_space();
    if (position_ == text_.size() || text_[position_] != wanted) return false;
    ++position_;
    return true;
  }

  bool accept_word(std::string_view word) {
    if (!text_.substr(position_).starts_with(word)) return false;
    position_ += word.size();
    return true;
  }

  Json read_value(int depth) {
    check(depth < kMaxDepth, "nested too deeply");
    skip_space();
    check(position_ < text_.size(), "the text ends where a value should begin");
    switch (text_[position_]) {
      case '{':
        return Json(read_object(depth));
      case '[':
        return Json(read_array(depth));
      case '"':
        return Json(read_string());
      default:
        break;
    }
    if (accept_word("true")) return Json(true);
    if (accept_word("false")) return Json(false);
    if (accept_word("null")) return {};
    return Json(read_integer());
  }

  Json::Array read_array(int depth) {
    ++position_;
    Json::Array items;
    if (accept(']')) return items;
    do {
      items.push_back(read_value(depth + 1));
    } while (accept(','));
    check(accept(']'), "expected ',' or ']'");
    return items;
  }

  Json::Object read_object(int depth) {
    ++position_;
    Json::Object members;
    if (accept('}')) return members;
    std::set<std::string> keys;
    do {
      skip_space();
      check(position_ < text_.size() && text_[position_] == '"', "expected a key");
      std::string key = read_string();
      check(keys.insert(key).second, "a key appears twice");
      check(accept(':'), "expected ':'");
      members.emplace_back(std::move(key), read_value(depth + 1));
    } while (accept(','));
    check(accept('}'), "expected ',' or '}'");
    return members;
  }

  std::int64_t read_integer() {
    std::int64_t value = 0;
    const std::string_view rest = text_.substr(position_);
    const std::string_view digits = rest.starts_with('-') ? rest.substr(1) : rest;
    check(!(digits.size() > 1 && digits[0] == '0' && digits[1] >= '0' && digits[1] <= '9'),
          "a number has a leading zero");
    const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), value);
    check(error != std::errc::result_out_of_range, "a number does not fit 64 bits");
    check(error == std::errc(), "expected a value");
    position_ += static_cast<std::size_t>(end - rest.data());
    check(position_ == text_.size() || !is_one_of(text_[position_], ".eE"),
          "numbers must be integers");
    return value;
  }

  std::string read_string() {
    ++position_;
    std::string out;
    for (;;) {
      check(position_ < text_.size(), "a string does not end");
      const auto byte = static_cast<unsigned char>(text_[position_]);
      if (byte == '"') break;
      check(byte >= 0x20, "a control character stands in a string");
      if (byte == '\\') {
        read_escape(out);
      } else if (byte < 0x80) {
        out.push_back(text_[position_++]);
      } else {
        read_multibyte(out);
      }
    }
    ++position_;
    return out;
  }

  void read_escape(std::string& out) {
    ++position_;
    check(position_ < text_.size(), "a string does not end");
    const char kind = text_[position_++];
    constexpr std::string_view kFrom = "\"\\/bfnrt";
    constexpr std::string_view kTo = "\"\\/\b\f\n\r\t";
    if (kind == 'u') {
      append_utf8(read_code_point(), out);
      return;
    }
    const std::size_t found = kFrom.find(kind);
    check(found != std::string_view::npos, "unknown escape");
    out.push_back(kTo[found]);
  }

  // Four hex digits, and the low half of a surrogate pair if they were the high half.
  std::uint32_t read_code_point() {
    const std::uint32_t high = read_hex4();
    check(high < 0xdc00 || high > 0xdfff, "half of a surrogate pair stands alone");
    if (high < 0xd800 || high > 0xdfff) return high;
    check(accept_word("\\u"), "half of a surrogate pair stands alone");
    const std::uint32_t low = read_hex4();
    check(low >= 0xdc00 && low <= 0xdfff, "half of a surrogate pair stands alone");
    return 0x10000 + ((high - 0xd800) << 10U) + (low - 0xdc00);
  }

  std::uint32_t read_hex4() {
    const std::string_view digits = text_.substr(position_, 4);
    check(digits.size() == 4 && std::all_of(digits.begin(), digits.end(),
                                            [](char c) {
                                              return (c >= '0' && c <= '9') ||
                                                     (c >= 'a' && c <= 'f') ||
                                                     (c >= 'A' && c <= 'F');
                                            }),
          "expected four hex digits");
    std::uint32_t value = 0;
    std::from_chars(digits.data(), digits.data() + 4, value, 16);
    position_ += 4;
    return value;
  }

  // Copies one UTF-8 sequence, refusing overlong forms, surrogates and numbers beyond U+10FFFF.
  void read_multibyte(std::string& out) {
    const auto at = [this](std::size_t i) {
      return position_ + i < text_.size()
                 ? static_cast<std::uint32_t>(static_cast<unsigned char>(text_[position_ + i]))
                 : 0U;
    };
    const std::uint32_t lead = at(0);
    const std::size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
    check(lead >= 0xc2 && lead <= 0xf4, "a string is not UTF-8");
    std::uint32_t point = lead & (0xffU >> (length + 1));
    for (std::size_t i = 1; i < length; ++i) {
      check((at(i) & 0xc0U) == 0x80U, "a string is not UTF-8");
      point = (point << 6U) | (at(i) & 0x3fU);
    }
    const bool overlong = (length == 3 && point < 0x800) || (length == 4 && point < 0x10000);
    const bool surrogate = point >= 0xd800 && point <= 0xdfff;
    check(!overlong && !surrogate && point <= 0x10ffff, "a string is not UTF-8");
    out.append(text_.substr(position_, length));
    position_ += length;
  }

  static void append_utf8(std::uint32_t point, std::string& out) {
    const auto put = [&out](std::uint32_t byte) { out.push_back(static_cast<char>(byte)); };
    if (point < 0x80) {
      put(point);
    } else if (point < 0x800) {
      put(0xc0U | (point >> 6U));
      put(0x80U | (point & 0x3fU));
    } else if (point < 0x10000) {
      put(0xe0U | (point >> 12U));
      put(0x80U | ((point >> 6U) & 0x3fU));
      put(0x80U | (point & 0x3fU));
    } else {
      put(0xf0U | (point >> 18U));
      put(0x80U | ((point >> 12U) & 0x3fU));
      put(0x80U | ((point >> 6U) & 0x3fU));
      put(0x80U | (point & 0x3fU));
    }
  }

  std::string_view text_;
  ErrorCode code_;
  std::size_t position_ = 0;
};

}  // namespace

Json parse_json(std::string_view text, ErrorCode code) { return Reader(text, code).read(); }

void write_json_string(std::string_view text, std::string& out) {
  constexpr std::string_view kHex = "0123456789abcdef";
  out.push_back('"');
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out.push_back('\\');
      out.push_back(c);
    } else if (byte < 0x20) {
      out.append("\\u00");
      out.push_back(kHex[byte >> 4U]);
      out.push_back(kHex[byte & 0xfU]);
    } else {
      out.push_back(c);
    }
  }
  out.push_back('"');
}

}  // namespace kimisys
