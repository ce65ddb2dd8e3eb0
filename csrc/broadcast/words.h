// Bytes of shared memory read and written as atomic 8-byte words, so that a reader beside a writer
// is a race with a defined outcome: each word is old or new. What the words make together is for a
// sequence to tell (see snapshot.h). The memory begins at a multiple of eight.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace kimisys::broadcast {

inline constexpr std::size_t kWord = sizeof(std::uint64_t);

constexpr std::size_t round_up(std::size_t nbytes, std::size_t alignment) {
  return (nbytes + alignment - 1) / alignment * alignment;
}

inline std::uint64_t load_word(const std::byte* memory) {
  // atomic_ref takes no const in C++20; a relaxed load of eight bytes does not write.
  auto* word = reinterpret_cast<std::uint64_t*>(const_cast<std::byte*>(memory));
  return std::atomic_ref(*word).load(std::memory_order_relaxed);
}

inline void store_word(std::byte* memory, std::uint64_t value) {
  auto* word = reinterpret_cast<std::uint64_t*>(memory);
  std::atomic_ref(*word).store(value, std::memory_order_relaxed);
}

// Copies bytes [offset, offset + nbytes) of `memory`; all words that they touch must be mapped.
inline void load_bytes(const std::byte* memory, std::size_t offset, std::byte* into,
                       std::size_t nbytes) {
  const auto take = [&](std::size_t count) {
    const std::uint64_t word = load_word(memory + offset / kWord * kWord);
    std::memcpy(into, reinterpret_cast<const std::byte*>(&word) + offset % kWord, count);
    offset += count;
    into += count;
    nbytes -= count;
  };
  if (offset % kWord != 0 && nbytes > 0) take(std::min(nbytes, kWord - offset % kWord));
  const std::size_t whole = nbytes / kWord;
  for (std::size_t i = 0; i < whole; ++i) {
    const std::uint64_t word = load_word(memory + offset + i * kWord);
    std::memcpy(into + i * kWord, &word, kWord);
  }
  offset += whole * kWord;
  into += whole * kWord;
  nbytes -= whole * kWord;
  if (nbytes > 0) take(nbytes);
}

// Writes the bytes from a multiple of eight on; the last word is filled up with zeros.
inline void store_bytes(std::byte* memory, std::span<const std::byte> bytes) {
  const std::size_t whole = bytes.size() / kWord;
  for (std::size_t i = 0; i < whole; ++i) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i * kWord, kWord);
    store_word(memory + i * kWord, word);
  }
  if (const std::size_t rest = bytes.size() % kWord; rest > 0) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + whole * kWord, rest);
    store_word(memory + whole * kWord, word);
  }
}

}  // namespace kimisys::broadcast
