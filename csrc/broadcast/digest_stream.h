// A dense run copied past the caches and digested on its way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kimisys::broadcast {

// From so many bytes on a dense run is worth writing past the caches.
inline constexpr std::int64_t kStreamBytes = 512;

// Copies `count` elements and returns the sum of mix over them, as RunSum does. `destination` lies
// on an element. Each is read once: what is summed is what is written. The thread calls
// reshard::finish_streaming() afterwards.
using Stream = std::uint64_t (*)(std::byte* destination, const std::byte* source,
                                 std::int64_t count, std::uint64_t counter, std::uint64_t step);

// For elements of 1 << width bytes; null where the instruction set has none.
Stream stream_of(std::string_view implementation, std::size_t width);

}  // namespace kimisys::broadcast
