// Dense runs written past the caches: for more bytes than they hold. A plain store first reads the
// line that it writes into; a streaming store does not, which saves a third of a copy's traffic.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kimisys::reshard {

// Copies nbytes; any alignment. Whole cache lines in 16-byte stores where the processor has them,
// the rest with memcpy.
void stream_bytes(std::byte* destination, const std::byte* source, std::size_t nbytes);

// Makes what this thread has streamed visible to other threads, in order.
void finish_streaming();

#if defined(__x86_64__)
// The same in stores of a line, and the casts of n elements straight from registers: the caller
// asks the processor for x86-64-v4. Elements of the destination must not straddle lines.
void stream_bytes_avx512(std::byte* destination, const std::byte* source, std::size_t nbytes);
void stream_narrow_avx512(std::byte* destination, const std::byte* source, std::size_t n);
void stream_widen_avx512(std::byte* destination, const std::byte* source, std::size_t n);
#endif

}  // namespace kimisys::reshard
