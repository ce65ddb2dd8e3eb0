// What one element adds to its tensor's digest: mix(key(tensor name), flat index, bits).
//
// The counter key + index * kGolden walks the 64-bit circle with the golden ratio as its step, so
// the counters of n elements keep a distance of at least 2^64 / (2.24 n) from each other. The
// element's bits are xor-ed into the low end, where they cannot bridge that distance as long as n
// stays below 2^61 for one-byte, 2^46 for two-byte and 1.9e9 for four-byte elements: within a
// tensor, every (index, bits) has a word of its own. Two odd multiplications and two xor-shifts,
// each invertible, then spread every bit over the word, so distinct words stay distinct and sums of
// them are as good as random. A zero element adds mix(counter), hence a missing element shows.
//
// This is a checksum against faults and mistakes; it is not meant to resist an adversary.
#pragma once

#include <cstdint>
#include <string_view>

namespace kimisys::broadcast {

inline constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15U;  // 2^64 / golden ratio, odd
inline constexpr std::uint64_t kFirst = 0xbf58476d1ce4e5b9U;   // the multipliers of splitmix64's
inline constexpr std::uint64_t kSecond = 0x94d049bb133111ebU;  // finaliser (Stafford's "mix 13")

// Inlined into functions compiled for several instruction sets, hence the attribute.
[[gnu::always_inline]] constexpr std::uint64_t mix(std::uint64_t counter, std::uint64_t bits) {
  std::uint64_t word = (counter ^ bits) * kFirst;
  word = (word ^ (word >> 32U)) * kSecond;
  return word ^ (word >> 29U);
}

// Multiplication carries upwards only, so the high half of an 8-byte element is folded down first;
// for smaller elements this changes nothing.
[[gnu::always_inline]] constexpr std::uint64_t fold(std::uint64_t bits) {
  return bits ^ (bits >> 32U);
}

// FNV-1a over the bytes of the name, then mixed.
constexpr std::uint64_t tensor_key(std::string_view name) {
  std::uint64_t hash = 0xcbf29ce484222325U;
  for (const char letter : name) {
    hash = (hash ^ static_cast<unsigned char>(letter)) * 0x100000001b3U;
  }
  return mix(hash, 0);
}

}  // namespace kimisys::broadcast
