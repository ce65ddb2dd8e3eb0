#include "broadcast/code.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "broadcast/blocks.h"

namespace kimisys::broadcast {
namespace {

constexpr auto kBad = ErrorCode::kSnapshot;

// Bytes that a word store or load may touch beyond the last bit.
constexpr std::size_t kWord = sizeof(std::uint64_t);

std::size_t bytes_of_bits(std::uint64_t bits) { return static_cast<std::size_t>((bits + 7) / 8); }

std::uint64_t load_word(const std::byte* data) {
  std::uint64_t word = 0;
  std::memcpy(&word, data, kWord);
  return word;
}

void store_word(std::byte* data, std::uint64_t word) { std::memcpy(data, &word, kWord); }

// The best parameter for gaps of a geometric distribution (A. Kiely, "Selecting the Golomb
// parameter in Rice coding", IPN Progress Report 42-159): the golden ratio splits the codes evenly.
std::uint32_t rice_of(std::int64_t count, std::int64_t elements) {
  constexpr double kLogOfGolden = -0.48121182505960347;  // log(0.618...)
  const double density = static_cast<double>(count) / static_cast<double>(elements);
  const double ratio = kLogOfGolden / std::log1p(-density);
  if (!(ratio >= 1.0)) return 0;
  return std::min(kMaxRice, static_cast<std::uint32_t>(std::ilogb(ratio)) + 1);
}

std::size_t count_nbytes(std::size_t count) {
  return (static_cast<std::size_t>(std::bit_width(count)) + 6) / 7;
}

std::byte* write_count(std::byte* out, std::size_t count) {
  for (; count >= 0x80; count >>= 7U) *out++ = static_cast<std::byte>(count | 0x80U);
  *out++ = static_cast<std::byte>(count);
  return out;
}

// Appends to `out`, which has room for the longest code and a word more. Returns the end.
std::byte* write_gaps(std::span<const std::uint32_t> positions, std::uint32_t rice,
                      std::byte* out) {
  constexpr std::uint64_t kStep = 32;  // zeros at a time, so that the rest fits a word
  const std::uint64_t mask = (std::uint64_t{1} << rice) - 1;
  std::uint64_t word = 0;
  std::uint64_t filled = 0;  // bits of it, below 8 between elements
  std::uint32_t next = 0;
  const auto flush = [&] {
    store_word(out, word);
    out += filled / 8;
    word >>= filled & ~std::uint64_t{7};
    filled &= 7U;
  };
  for (const std::uint32_t position : positions) {
    const std::uint64_t gap = position - next;
    next = position + 1;
    std::uint64_t zeros = gap >> rice;
    for (; zeros > kStep; zeros -= kStep) {
      filled += kStep;
      flush();
    }
    filled += zeros;
    word |= (1U | (gap & mask) << 1U) << filled;
    filled += rice + 1;
    flush();
  }
  store_word(out, word);
  return out + bytes_of_bits(filled);
}

// `bits` are zero, and there is room for a word more.
void write_bits(std::span<const std::uint32_t> positions, std::byte* bits) {
  std::size_t at = 0;
  std::uint64_t word = 0;
  for (const std::uint32_t position : positions) {
    if (position / 64 != at) {
      store_word(bits + at * kWord, word);
      at = position / 64;
      word = 0;
    }
    word |= std::uint64_t{1} << (position % 64);
  }
  store_word(bits + at * kWord, word);
}

// The count at the head of gaps, no larger than `elements`; `at` moves past it.
std::size_t read_count(std::span<const std::byte> payload, std::size_t& at, std::int64_t elements) {
  std::uint64_t count = 0;
  for (unsigned shift = 0; shift < 28; shift += 7) {
    KIMISYS_CHECK(at < payload.size(), kBad, "a block's payload of ", payload.size(),
                  " bytes ends within the count of changed elements; pull in full");
    const auto byte = static_cast<std::uint64_t>(payload[at++]);
    count |= (byte & 0x7fU) << shift;
    if (byte < 0x80) break;
  }
  KIMISYS_CHECK(count > 0 && count <= static_cast<std::uint64_t>(elements), kBad, "a block of ",
                elements, " elements announces ", count,
                " changed ones; its payload is damaged: pull in full");
  return static_cast<std::size_t>(count);
}

// Reads Rice codes from a span of bytes, bit by bit number, never beyond its end.
class GapReader {
 public:
  GapReader(std::span<const std::byte> bytes, std::uint32_t rice) : bytes_(bytes), rice_(rice) {}

  // Writes `count` positions; the last may be any number below 2^63 and is returned, plus one.
  std::uint64_t read(std::size_t count, std::uint32_t* positions) {
    std::uint64_t next = 0;
    std::size_t i = 0;
    while (i < count) {
      if (i + kAtOnce <= count && read_some(next, positions + i)) {
        i += kAtOnce;
      } else {
        next += read_one() + 1;
        positions[i++] = static_cast<std::uint32_t>(next - 1);
      }
    }
    return next;
  }

  std::uint64_t bit() const { return bit_; }

 private:
  static constexpr std::size_t kAtOnce = 4;
  static constexpr std::uint32_t kWordBits = 57;  // of a word, those of the byte begun left out

  // kAtOnce codes of one load, if it holds them all: the load is the slowest link of the chain from
  // code to code.
  bool read_some(std::uint64_t& next, std::uint32_t* positions) {
    const auto byte = static_cast<std::size_t>(bit_ / 8);
    if (byte + kWord > bytes_.size()) return false;
    std::uint64_t word = load_word(bytes_.data() + byte) >> (bit_ % 8);
    const std::uint64_t mask = (std::uint64_t{1} << rice_) - 1;
    std::uint32_t used = 0;
    std::uint64_t after = next;
    for (std::size_t i = 0; i < kAtOnce; ++i) {
      const auto zeros = static_cast<std::uint32_t>(std::countr_zero(word));
      used += zeros + rice_ + 1;
      if (used > kWordBits) return false;
      after += (std::uint64_t{zeros} << rice_) + ((word >> zeros >> 1U) & mask) + 1;
      positions[i] = static_cast<std::uint32_t>(after - 1);
      word >>= zeros + rice_ + 1;
    }
    bit_ += used;
    next = after;
    return true;
  }

  std::uint64_t read_one() {
    std::uint64_t zeros = 0;
    for (;;) {
      const std::uint64_t word = word_at(bit_);
      if (word != 0) {
        const auto more = static_cast<std::uint64_t>(std::countr_zero(word));
        zeros += more;
        bit_ += more + 1;
        break;
      }
      zeros += kWordBits;
      bit_ += kWordBits;
    }
    const std::uint64_t rest = word_at(bit_) & ((std::uint64_t{1} << rice_) - 1);
    bit_ += rice_;
    return (zeros << rice_) + rest;
  }

  // The kWordBits bits from there, zeros after the end; raises when all of them lie after it.
  std::uint64_t word_at(std::uint64_t bit) const {
    const auto byte = static_cast<std::size_t>(bit / 8);
    KIMISYS_CHECK(byte <= bytes_.size(), kBad, "the gaps in a block's payload run past its ",
                  bytes_.size(), " bytes; it is damaged: pull in full");
    std::uint64_t word = 0;
    if (byte < bytes_.size()) {
      std::memcpy(&word, bytes_.data() + byte, std::min(kWord, bytes_.size() - byte));
    }
    return word >> (bit % 8) & ((std::uint64_t{1} << kWordBits) - 1);
  }

  std::span<const std::byte> bytes_;
  std::uint32_t rice_;
  std::uint64_t bit_ = 0;
};

Decoded decode_gaps(std::uint32_t rice, std::span<const std::byte> payload, std::int64_t elements,
                    std::size_t itemsize, std::vector<std::uint32_t>& scratch) {
  std::size_t at = 0;
  const std::size_t count = read_count(payload, at, elements);
  const std::size_t values = count * itemsize;
  KIMISYS_CHECK(values <= payload.size() - at, kBad, "a block's payload of ", payload.size(),
                " bytes cannot hold the ", count, " elements that it announces; pull in full");
  const std::size_t coded = payload.size() - at - values;
  if (scratch.size() < count) scratch.resize(count);
  // The values lie behind the codes: the reader may look at them, and is found out when it took any
  // of their bits for codes.
  GapReader reader(payload.subspan(at), rice);
  const std::uint64_t end = reader.read(count, scratch.data());
  const bool padded = reader.bit() % 8 == 0 ||
                      static_cast<unsigned>(payload[at + coded - 1]) >> (reader.bit() % 8) == 0;
  KIMISYS_CHECK(
      bytes_of_bits(reader.bit()) == coded && padded && end <= static_cast<std::uint64_t>(elements),
      kBad, "the gaps of ", count, " elements in a block of ", elements, " take ", reader.bit(),
      " bits of ", coded, " bytes and end at element ", end,
      "; the payload is damaged: pull in full");
  return {{scratch.data(), count}, payload.data() + at + coded};
}

Decoded decode_bitmap(std::span<const std::byte> payload, std::int64_t elements,
                      std::size_t itemsize, std::vector<std::uint32_t>& scratch) {
  const std::size_t nbytes = bytes_of_bits(static_cast<std::uint64_t>(elements));
  KIMISYS_CHECK(payload.size() >= nbytes, kBad, "a block's payload of ", payload.size(),
                " bytes cannot hold the bitmap of ", elements, " elements; pull in full");
  // A payload that claims too many is refused below: there is room for every bit.
  const auto most = nbytes * 8;
  if (scratch.size() < most) scratch.resize(most);
  std::uint32_t* out = scratch.data();
  for (std::size_t byte = 0; byte < nbytes; byte += kWord) {
    std::uint64_t word = 0;
    std::memcpy(&word, payload.data() + byte, std::min(kWord, nbytes - byte));
    for (; word != 0; word &= word - 1) {
      *out++ =
          static_cast<std::uint32_t>(byte * 8) + static_cast<std::uint32_t>(std::countr_zero(word));
    }
  }
  const auto count = static_cast<std::size_t>(out - scratch.data());
  KIMISYS_CHECK(
      count > 0 && scratch[count - 1] < elements && count * itemsize == payload.size() - nbytes,
      kBad, "the bitmap of a block of ", elements, " elements has ", count, " bits for the ",
      payload.size() - nbytes, " bytes of values behind it; the payload is damaged: pull in full");
  return {{scratch.data(), count}, payload.data() + nbytes};
}

}  // namespace

Descriptor encode(std::span<const std::uint32_t> positions, const std::byte* values,
                  std::int64_t elements, std::int64_t itemsize, std::vector<std::byte>& payload) {
  if (positions.empty()) return {};
  const auto n = static_cast<std::size_t>(elements);
  const std::size_t value_nbytes = positions.size() * static_cast<std::size_t>(itemsize);
  const std::size_t whole = n * static_cast<std::size_t>(itemsize);
  const std::size_t bitmap = (n + 7) / 8;
  const std::uint32_t rice = rice_of(static_cast<std::int64_t>(positions.size()), elements);
  const std::size_t begin = payload.size();

  // Without a rest the codes are the bitmap up to its last bit, behind a count.
  std::size_t gaps = count_nbytes(positions.size()) +
                     bytes_of_bits(rice == 0 ? std::uint64_t{positions.back()} + 1
                                             : positions.size() * (rice + std::uint64_t{1}));
  if (whole <= value_nbytes + std::min(gaps, bitmap)) return {Kind::kWhole, 0, 0};
  Descriptor descriptor{Kind::kBitmap, 0, 0};
  std::size_t nbytes = bitmap;
  if (gaps <= bitmap) {  // so far the least that they may take
    payload.resize(begin + 4 + bytes_of_bits(positions.size() * (rice + 1) + (n >> rice)) + kWord);
    std::byte* out = write_gaps(positions, rice, write_count(&payload[begin], positions.size()));
    gaps = static_cast<std::size_t>(out - &payload[begin]);
    if (gaps <= bitmap) {
      descriptor = {Kind::kGaps, rice, 0};
      nbytes = gaps;
    }
    if (whole <= nbytes + value_nbytes) {
      payload.resize(begin);
      return {Kind::kWhole, 0, 0};
    }
  }
  if (descriptor.kind == Kind::kBitmap) {
    payload.resize(begin);
    payload.resize(begin + nbytes + kWord);
    write_bits(positions, &payload[begin]);
  }
  payload.resize(begin + nbytes);
  payload.insert(payload.end(), values, values + value_nbytes);
  descriptor.nbytes = static_cast<std::uint32_t>(nbytes + value_nbytes);
  return descriptor;
}

void check_descriptor(Descriptor descriptor, std::int64_t elements, std::int64_t itemsize) {
  const std::uint64_t nbytes = descriptor.nbytes;
  const auto whole = static_cast<std::uint64_t>(elements * itemsize);
  const bool right = descriptor.rice <= (descriptor.kind == Kind::kGaps ? kMaxRice : 0) &&
                     (descriptor.kind == Kind::kSame    ? nbytes == 0
                      : descriptor.kind == Kind::kWhole ? nbytes == 0 || nbytes == whole
                                                        : nbytes > 0 && nbytes < whole);
  KIMISYS_CHECK(right, kBad, "a block of ", elements, " elements of ", itemsize,
                " bytes is described as kind ", static_cast<std::uint32_t>(descriptor.kind),
                " with Rice parameter ", descriptor.rice, " and ", nbytes,
                " bytes; the record is damaged: pull in full");
}

Decoded decode(Descriptor descriptor, std::span<const std::byte> payload, std::int64_t elements,
               std::int64_t itemsize, std::vector<std::uint32_t>& scratch) {
  check_descriptor(descriptor, elements, itemsize);
  KIMISYS_CHECK(payload.size() == descriptor.nbytes, kBad, "a block's payload has ", payload.size(),
                " bytes where its descriptor says ", descriptor.nbytes, "; pull in full");
  const auto size = static_cast<std::size_t>(itemsize);
  if (descriptor.kind == Kind::kGaps) {
    return decode_gaps(descriptor.rice, payload, elements, size, scratch);
  }
  KIMISYS_CHECK(descriptor.kind == Kind::kBitmap, kBad,
                "only gaps and bitmaps are decoded, not kind ",
                static_cast<std::uint32_t>(descriptor.kind));
  return decode_bitmap(payload, elements, size, scratch);
}

}  // namespace kimisys::broadcast
