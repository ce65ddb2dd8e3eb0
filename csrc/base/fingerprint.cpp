#include "base/fingerprint.h"

#include <array>
#include <cstddef>
#include <cstdint>

namespace kimisys {
namespace {

// Odd numbers with about as many ones as zeros.
constexpr std::uint64_t kLow = 0x9e3779b97f4a7c15U;
constexpr std::uint64_t kHigh = 0xd1b54a32d192ed03U;

// The two halves of a 128-bit product, folded: each input bit reaches all output bits.
std::uint64_t fold(std::uint64_t a, std::uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64U);
}

// Up to eight bytes, the first one lowest.
std::uint64_t word_at(std::string_view bytes, std::size_t at) {
  std::uint64_t word = 0;
  for (std::size_t i = 0; i < 8 && at + i < bytes.size(); ++i) {
    word |= std::uint64_t{static_cast<unsigned char>(bytes[at + i])} << (8 * i);
  }
  return word;
}

}  // namespace

std::string fingerprint(std::string_view bytes) {
  // Two lanes with keys of their own, each a chain over all words; a word is mixed before it joins
  // the chain, so that a zero product cannot wipe what came before.
  std::uint64_t low = kLow ^ bytes.size();
  std::uint64_t high = kHigh ^ (bytes.size() << 1U);
  for (std::size_t at = 0; at < bytes.size(); at += 8) {
    const std::uint64_t word = word_at(bytes, at);
    low = (low << 23U | low >> 41U) + fold(word ^ kLow, kHigh ^ (at + 1));
    low *= kHigh;
    high = (high << 29U | high >> 35U) ^ fold(word ^ kHigh, kLow + (at + 1));
    high *= kLow;
  }
  const std::array<std::uint64_t, 2> sums = {fold(low ^ high >> 32U, kHigh) + high,
                                             fold(high ^ low >> 29U, kLow) + low};
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string text;
  for (const std::uint64_t sum : sums) {
    for (unsigned shift = 64; shift > 0; shift -= 4) text += kDigits[sum >> (shift - 4) & 15U];
  }
  return text;
}

}  // namespace kimisys
