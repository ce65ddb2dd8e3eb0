// Writing and reading compact binary forms: variable-length integers and strings. The reader treats
// its input as hostile: every length is checked against what is left before anything is allocated.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/error.h"

namespace kimisys {

class ByteWriter {
 public:
  // Seven bits per byte, lowest first; the top bit says that more follow.
  void number(std::uint64_t value) {
    while (value >= 0x80) {
      bytes_.push_back(static_cast<char>(value | 0x80));
      value >>= 7U;
    }
    bytes_.push_back(static_cast<char>(value));
  }

  // Small for small magnitudes of either sign.
  void signed_number(std::int64_t value) {
    const auto bits = static_cast<std::uint64_t>(value);
    number((bits << 1U) ^ (value < 0 ? ~std::uint64_t{0} : 0));
  }

  void text(std::string_view text) {
    number(text.size());
    bytes_.append(text);
  }

  void raw(std::string_view bytes) { bytes_.append(bytes); }
  std::string take() { return std::move(bytes_); }

 private:
  std::string bytes_;
};

class ByteReader {
 public:
  // `what` names the form in messages. Both views must outlive the reader.
  ByteReader(std::string_view bytes, ErrorCode code, const char* what)
      : bytes_(bytes), code_(code), what_(what) {}

  std::uint64_t number() {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      need(1);
      const auto byte = static_cast<unsigned char>(bytes_[at_++]);
      KIMISYS_CHECK(shift < 63 || byte <= 1, code_, what_, ": a number at byte ", at_,
                    " does not fit 64 bits");
      value |= std::uint64_t{byte & 0x7fU} << shift;
      if (byte < 0x80) return value;
    }
    fail(code_, what_, ": a number at byte ", at_, " does not end");
  }

  std::int64_t signed_number() {
    const std::uint64_t bits = number();
    return static_cast<std::int64_t>((bits >> 1U) ^ ((bits & 1U) != 0 ? ~std::uint64_t{0} : 0));
  }

  // A number that is not negative as a signed one.
  std::int64_t size() {
    const std::uint64_t value = number();
    KIMISYS_CHECK(value < std::uint64_t{1} << 63U, code_, what_, ": the number before byte ", at_,
                  " is too large");
    return static_cast<std::int64_t>(value);
  }

  // The number of items that follow, each of at least `least` bytes.
  std::size_t count(std::size_t least = 1) {
    const std::uint64_t value = number();
    KIMISYS_CHECK(value <= left() / least, code_, what_, ": ", value, " items of at least ", least,
                  " bytes are announced at byte ", at_, ", where ", left(), " bytes are left");
    return static_cast<std::size_t>(value);
  }

  // An index into a table of `size` entries.
  std::size_t index(std::size_t size) {
    const std::uint64_t value = number();
    KIMISYS_CHECK(value < size, code_, what_, ": entry ", value, " at byte ", at_,
                  " of a table of ", size);
    return static_cast<std::size_t>(value);
  }

  // The same as a difference to `previous`.
  std::size_t next_index(std::size_t previous, std::size_t size) {
    const auto value = previous + static_cast<std::size_t>(signed_number());
    KIMISYS_CHECK(value < size, code_, what_, ": entry ", value, " at byte ", at_,
                  " of a table of ", size);
    return value;
  }

  std::string_view text() { return raw(count()); }

  std::string_view raw(std::size_t size) {
    need(size);
    at_ += size;
    return bytes_.substr(at_ - size, size);
  }

  void expect(std::string_view magic) {
    KIMISYS_CHECK(left() >= magic.size() && raw(magic.size()) == magic, code_, what_,
                  ": the bytes do not begin as this build writes them; they are something else, or "
                  "of another version");
  }

  void end() const {
    KIMISYS_CHECK(left() == 0, code_, what_, ": ", left(), " bytes follow the end");
  }

 private:
  std::size_t left() const { return bytes_.size() - at_; }
  void need(std::size_t size) const {
    KIMISYS_CHECK(size <= left(), code_, what_, ": it is cut off: ", size,
                  " bytes are needed at byte ", at_, ", ", left(), " are left");
  }

  std::string_view bytes_;
  ErrorCode code_;
  const char* what_;
  std::size_t at_ = 0;
};

}  // namespace kimisys
