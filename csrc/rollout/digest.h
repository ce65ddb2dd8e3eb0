// A 64-bit chain over records: each word of each record changes all that follows.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace kimisys::rollout {

template <typename Record>
std::uint64_t chain(std::uint64_t digest, const Record& record) {
  static_assert(std::has_unique_object_representations_v<Record> && sizeof(Record) % 8 == 0);
  std::array<std::uint64_t, sizeof(Record) / 8> words;
  std::memcpy(words.data(), &record, sizeof(Record));
  for (const std::uint64_t word : words) {
    // Multiplication by an odd number is a bijection, and so is the shift: no word is lost.
    digest = (digest ^ word) * 0x9e3779b97f4a7c15U;
    digest ^= digest >> 29U;
  }
  return digest;
}

}  // namespace kimisys::rollout
