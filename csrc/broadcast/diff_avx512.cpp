#include "broadcast/diff_avx512.h"

#if defined(__x86_64__)
// GCC 12 takes the undefined sources of its own intrinsics for a mistake of ours (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>

namespace kimisys::broadcast {
namespace {

// Every function of this file carries it: what is inlined elsewhere must not.
#define KIMISYS_AVX512 __attribute__((target("arch=x86-64-v4,avx512vbmi2")))
#define KIMISYS_INLINE KIMISYS_AVX512 __attribute__((always_inline)) static inline

// Where the next change of a list goes.
struct Tail {
  std::uint32_t* positions;
  std::byte* before;
  std::byte* after;
};

// One struct per width: a vector is one cache line of the snapshot, its mask has a bit per element.
// Compressing to memory is slow on some processors, hence registers are compressed and stored
// whole: what lies beyond the last change is overwritten by the next.
struct Width1 {
  static constexpr int kSize = 1;
  using Mask = __mmask64;
  KIMISYS_INLINE Mask differs(__m512i a, __m512i b) { return _mm512_cmpneq_epi8_mask(a, b); }
  KIMISYS_INLINE __m512i load(Mask mask, const std::byte* at) {
    return _mm512_maskz_loadu_epi8(mask, at);
  }
  KIMISYS_INLINE void store(Mask mask, std::byte* at, __m512i bits) {
    _mm512_mask_storeu_epi8(at, mask, bits);
  }
  KIMISYS_INLINE __m512i compress(Mask mask, __m512i bits) {
    return _mm512_maskz_compress_epi8(mask, bits);
  }
  KIMISYS_INLINE void lanes(Mask mask, int count, std::uint32_t position, std::uint32_t* out) {
    alignas(64) static constexpr auto kLanes = [] {
      std::array<std::uint8_t, 64> lanes{};
      for (std::size_t i = 0; i < lanes.size(); ++i) lanes[i] = static_cast<std::uint8_t>(i);
      return lanes;
    }();
    alignas(64) std::uint8_t numbers[64];
    _mm512_store_si512(numbers, compress(mask, _mm512_load_si512(kLanes.data())));
    const __m512i first = _mm512_set1_epi32(static_cast<int>(position));
    for (int i = 0; i < count; i += 16) {
      const auto* part = reinterpret_cast<const __m128i*>(numbers + i);
      const __m512i wide = _mm512_cvtepu8_epi32(_mm_load_si128(part));
      _mm512_storeu_si512(out + i, _mm512_add_epi32(wide, first));
    }
  }
};

struct Width2 {
  static constexpr int kSize = 2;
  using Mask = __mmask32;
  KIMISYS_INLINE Mask differs(__m512i a, __m512i b) { return _mm512_cmpneq_epi16_mask(a, b); }
  KIMISYS_INLINE __m512i load(Mask mask, const std::byte* at) {
    return _mm512_maskz_loadu_epi16(mask, at);
  }
  KIMISYS_INLINE void store(Mask mask, std::byte* at, __m512i bits) {
    _mm512_mask_storeu_epi16(at, mask, bits);
  }
  KIMISYS_INLINE __m512i compress(Mask mask, __m512i bits) {
    return _mm512_maskz_compress_epi16(mask, bits);
  }
  KIMISYS_INLINE void lanes(Mask mask, int count, std::uint32_t position, std::uint32_t* out) {
    alignas(64) static constexpr auto kLanes = [] {
      std::array<std::uint16_t, 32> lanes{};
      for (std::size_t i = 0; i < lanes.size(); ++i) lanes[i] = static_cast<std::uint16_t>(i);
      return lanes;
    }();
    const __m512i numbers = compress(mask, _mm512_load_si512(kLanes.data()));
    const __m512i first = _mm512_set1_epi32(static_cast<int>(position));
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(numbers));
    _mm512_storeu_si512(out, _mm512_add_epi32(low, first));
    if (count > 16) {
      const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(numbers, 1));
      _mm512_storeu_si512(out + 16, _mm512_add_epi32(high, first));
    }
  }
};

struct Width4 {
  static constexpr int kSize = 4;
  using Mask = __mmask16;
  KIMISYS_INLINE Mask differs(__m512i a, __m512i b) { return _mm512_cmpneq_epi32_mask(a, b); }
  KIMISYS_INLINE __m512i load(Mask mask, const std::byte* at) {
    return _mm512_maskz_loadu_epi32(mask, at);
  }
  KIMISYS_INLINE void store(Mask mask, std::byte* at, __m512i bits) {
    _mm512_mask_storeu_epi32(at, mask, bits);
  }
  KIMISYS_INLINE __m512i compress(Mask mask, __m512i bits) {
    return _mm512_maskz_compress_epi32(mask, bits);
  }
  KIMISYS_INLINE void lanes(Mask mask, int /*count*/, std::uint32_t position, std::uint32_t* out) {
    const __m512i numbers =
        _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(static_cast<int>(position)));
    _mm512_storeu_si512(out, compress(mask, numbers));
  }
};

struct Width8 {
  static constexpr int kSize = 8;
  using Mask = __mmask8;
  KIMISYS_INLINE Mask differs(__m512i a, __m512i b) { return _mm512_cmpneq_epi64_mask(a, b); }
  KIMISYS_INLINE __m512i load(Mask mask, const std::byte* at) {
    return _mm512_maskz_loadu_epi64(mask, at);
  }
  KIMISYS_INLINE void store(Mask mask, std::byte* at, __m512i bits) {
    _mm512_mask_storeu_epi64(at, mask, bits);
  }
  KIMISYS_INLINE __m512i compress(Mask mask, __m512i bits) {
    return _mm512_maskz_compress_epi64(mask, bits);
  }
  KIMISYS_INLINE void lanes(Mask mask, int /*count*/, std::uint32_t position, std::uint32_t* out) {
    const __m256i numbers = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                             _mm256_set1_epi32(static_cast<int>(position)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm256_maskz_compress_epi32(mask, numbers));
  }
};

// How live elements become those of the snapshot: one vector's worth, all of it or the lanes of a
// mask.
template <typename Width>
struct Same {
  static constexpr int kLiveSize = Width::kSize;
  KIMISYS_INLINE __m512i load(const std::byte* live) { return _mm512_loadu_si512(live); }
  KIMISYS_INLINE __m512i load(typename Width::Mask mask, const std::byte* live) {
    return Width::load(mask, live);
  }
};

// bfloat16_bits of base/dtype.h on 16 lanes.
KIMISYS_INLINE __m256i narrow_16(__m512i bits) {
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmpgt_epu32_mask(
      _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)), _mm512_set1_epi32(0x7f800000));
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}

KIMISYS_INLINE __m512i joined(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

struct Narrow {
  static constexpr int kLiveSize = 4;
  KIMISYS_INLINE __m512i load(const std::byte* live) {
    return joined(narrow_16(_mm512_loadu_si512(live)), narrow_16(_mm512_loadu_si512(live + 64)));
  }
  KIMISYS_INLINE __m512i load(__mmask32 mask, const std::byte* live) {
    const auto low = static_cast<__mmask16>(mask);
    const auto high = static_cast<__mmask16>(mask >> 16U);
    return joined(narrow_16(_mm512_maskz_loadu_epi32(low, live)),
                  narrow_16(_mm512_maskz_loadu_epi32(high, live + 64)));
  }
};

struct Widen {
  static constexpr int kLiveSize = 2;
  KIMISYS_INLINE __m512i wide(__m256i bits) {
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
  }
  KIMISYS_INLINE __m512i load(const std::byte* live) {
    return wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(live)));
  }
  KIMISYS_INLINE __m512i load(__mmask16 mask, const std::byte* live) {
    return wide(_mm256_maskz_loadu_epi16(mask, live));
  }
};

// Appends the lanes of `mask`; returns how many.
template <typename Width>
KIMISYS_INLINE void append(typename Width::Mask mask, __m512i before, __m512i after,
                           std::uint32_t position, Tail& tail) {
  const int count = std::popcount(mask);
  Width::lanes(mask, count, position, tail.positions);
  _mm512_storeu_si512(tail.before, Width::compress(mask, before));
  _mm512_storeu_si512(tail.after, Width::compress(mask, after));
  tail.positions += count;
  tail.before += count * Width::kSize;
  tail.after += count * Width::kSize;
}

// Fewer elements than a vector has.
template <typename Width, typename Live>
KIMISYS_INLINE void compare_part(int count, const std::byte* live, std::byte* snapshot,
                                 std::uint32_t position, Tail& tail) {
  using Mask = typename Width::Mask;
  const auto lanes = static_cast<Mask>((std::uint64_t{1} << static_cast<unsigned>(count)) - 1);
  const __m512i after = Live::load(lanes, live);
  const __m512i before = Width::load(lanes, snapshot);
  const auto mask = static_cast<Mask>(Width::differs(before, after) & lanes);
  if (mask == 0) return;
  Width::store(mask, snapshot, after);
  append<Width>(mask, before, after, position, tail);
}

// Up to 64 vectors: first all masks, without a branch that random changes could mislead; then the
// vectors that have any, whose lines the first level still holds.
template <typename Width, typename Live>
KIMISYS_INLINE void compare_piece(int vectors, const std::byte* live, std::byte* snapshot,
                                  std::uint32_t position, Tail& tail) {
  constexpr int kLanes = 64 / Width::kSize;
  std::uint64_t changed = 0;
  for (int v = 0; v < vectors; ++v) {
    const __m512i after = Live::load(live + v * kLanes * Live::kLiveSize);
    const auto mask = Width::differs(_mm512_loadu_si512(snapshot + v * 64), after);
    changed |= std::uint64_t{mask != 0} << static_cast<unsigned>(v);
  }
  for (; changed != 0; changed &= changed - 1) {
    const int v = std::countr_zero(changed);
    std::byte* line = snapshot + v * 64;
    const __m512i after = Live::load(live + v * kLanes * Live::kLiveSize);
    const __m512i before = _mm512_loadu_si512(line);
    _mm512_storeu_si512(line, after);
    append<Width>(Width::differs(before, after), before, after,
                  position + static_cast<std::uint32_t>(v * kLanes), tail);
  }
}

template <typename Width, typename Live>
KIMISYS_AVX512 void compare(const Run& run, std::uint32_t position, ChangeList& out) {
  constexpr std::int64_t kLanes = 64 / Width::kSize;
  constexpr std::int64_t kVectors = 32;
  const Tail begin{&out.positions[out.count], &out.before[out.count * Width::kSize],
                   &out.after[out.count * Width::kSize]};
  Tail tail = begin;
  const std::byte* live = run.live;
  std::byte* snapshot = run.snapshot;
  std::int64_t left = run.count;
  const auto advance = [&](std::int64_t count) {
    live += count * Live::kLiveSize;
    snapshot += count * Width::kSize;
    position += static_cast<std::uint32_t>(count);
    left -= count;
  };
  // To a cache line of the snapshot, then whole lines, then the rest.
  const auto odd = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(snapshot) % 64);
  if (odd != 0 && odd % Width::kSize == 0) {
    const std::int64_t head = std::min(left, (64 - odd) / Width::kSize);
    compare_part<Width, Live>(static_cast<int>(head), live, snapshot, position, tail);
    advance(head);
  }
  while (left >= kLanes) {
    const std::int64_t vectors = std::min(kVectors, left / kLanes);
    compare_piece<Width, Live>(static_cast<int>(vectors), live, snapshot, position, tail);
    advance(vectors * kLanes);
  }
  if (left > 0) {
    compare_part<Width, Live>(static_cast<int>(left), live, snapshot, position, tail);
  }
  out.count += static_cast<std::size_t>(tail.positions - begin.positions);
}

}  // namespace

Comparisons avx512_comparisons() {
  return {{compare<Width1, Same<Width1>>, compare<Width2, Same<Width2>>,
           compare<Width4, Same<Width4>>, compare<Width8, Same<Width8>>},
          compare<Width2, Narrow>,
          compare<Width4, Widen>};
}

}  // namespace kimisys::broadcast
#endif
