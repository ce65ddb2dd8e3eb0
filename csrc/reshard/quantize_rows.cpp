#include "reshard/quantize_rows.h"

#include <cstring>
#include <vector>

#include "base/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 calls the deliberately undefined operands inside its own intrinsics uninitialized.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#endif

// This file is compiled with -ffp-contract=off: a multiplication fused with the addition that
// rounds it would round once where the definition rounds twice.

namespace kimisys::reshard {
namespace {

template <typename Signed>
constexpr std::int64_t kItem = sizeof(Signed);

template <typename Signed>
inline __attribute__((always_inline)) Signed load(const std::byte* row, std::int64_t i) {
  Signed bits;
  std::memcpy(&bits, row + i * kItem<Signed>, sizeof(Signed));
  return bits;
}

template <typename Signed>
inline __attribute__((always_inline)) float widen(Signed bits) {
  if constexpr (sizeof(Signed) == 2) {
    return std::bit_cast<float>(float32_bits(static_cast<std::uint16_t>(bits)));
  } else {
    return std::bit_cast<float>(bits);
  }
}

template <typename Signed>
inline __attribute__((always_inline)) void raise(std::int64_t n, const std::byte* __restrict row,
                                                 Signed* __restrict most) {
  constexpr auto kMagnitude = static_cast<Signed>(sizeof(Signed) == 2 ? 0x7fff : 0x7fffffff);
  for (std::int64_t i = 0; i < n; ++i) {
    const auto bits = static_cast<Signed>(load<Signed>(row, i) & kMagnitude);
    most[i] = most[i] > bits ? most[i] : bits;
  }
}

// Elements from `first` on, one by one.
template <typename Signed>
inline __attribute__((always_inline)) void round_from(std::int64_t first, std::int64_t n,
                                                      const std::byte* row, const float* inverse,
                                                      std::byte* values) {
  for (std::int64_t i = first; i < n; ++i) {
    values[i] = std::byte{float8_in_range(widen(load<Signed>(row, i)) * inverse[i])};
  }
}

struct Generic {
  template <typename Signed>
  static void maxima(std::int64_t n, const std::byte* row, Signed* most) {
    raise<Signed>(n, row, most);
  }
  template <typename Signed>
  static void values(std::int64_t n, const std::byte* row, const float* inverse, std::byte* out) {
    round_from<Signed>(0, n, row, inverse, out);
  }
};

#if defined(__x86_64__)
// GCC vectorises `raise`; of float8_in_range, whose elements change their width twice, it makes
// 1 to 2.4 elements per ns where the intrinsics below make 5 to 6 (one thread, AMD EPYC).

#define KIMISYS_AVX2 __attribute__((target("arch=x86-64-v3")))
#define KIMISYS_AVX512 __attribute__((target("arch=x86-64-v4")))

struct Avx2 {
  template <typename Signed>
  KIMISYS_AVX2 static void maxima(std::int64_t n, const std::byte* row, Signed* most) {
    raise<Signed>(n, row, most);
  }

  template <typename Signed>
  KIMISYS_AVX2 static __m256i widened(const std::byte* row, std::int64_t i) {
    const void* from = row + i * kItem<Signed>;
    if constexpr (sizeof(Signed) == 4) return _mm256_loadu_si256(static_cast<const __m256i*>(from));
    const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(from));
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
  }

  // float8_in_range, in the lowest byte of each element.
  template <typename Signed>
  KIMISYS_AVX2 static __m256i rounded(const std::byte* row, const float* inverse, std::int64_t i) {
    const __m256i smallest = _mm256_set1_epi32(121 << 23);
    const __m256i bits = _mm256_castps_si256(
        _mm256_mul_ps(_mm256_castsi256_ps(widened<Signed>(row, i)), _mm256_loadu_ps(inverse + i)));
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
    const __m256i exponent =
        _mm256_and_si256(_mm256_max_epi32(magnitude, smallest), _mm256_set1_epi32(0x7f800000));
    const __m256i shifter = _mm256_add_epi32(exponent, _mm256_set1_epi32(20 << 23));
    const __m256i sum = _mm256_castps_si256(
        _mm256_add_ps(_mm256_castsi256_ps(magnitude), _mm256_castsi256_ps(shifter)));
    const __m256i steps =
        _mm256_add_epi32(_mm256_sub_epi32(sum, shifter),
                         _mm256_srli_epi32(_mm256_sub_epi32(exponent, smallest), 20));
    const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80));
    return _mm256_or_si256(steps, sign);
  }

  template <typename Signed>
  KIMISYS_AVX2 static void values(std::int64_t n, const std::byte* row, const float* inverse,
                                  std::byte* out) {
    // Packing works within 128-bit halves; this puts their pieces in order again.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    std::int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
      const __m256i low = _mm256_packus_epi32(rounded<Signed>(row, inverse, i),
                                              rounded<Signed>(row, inverse, i + 8));
      const __m256i high = _mm256_packus_epi32(rounded<Signed>(row, inverse, i + 16),
                                               rounded<Signed>(row, inverse, i + 24));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                          _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
    }
    round_from<Signed>(i, n, row, inverse, out);
  }
};

struct Avx512 {
  template <typename Signed>
  KIMISYS_AVX512 static void maxima(std::int64_t n, const std::byte* row, Signed* most) {
    raise<Signed>(n, row, most);
  }

  template <typename Signed>
  KIMISYS_AVX512 static __m512i widened(const std::byte* row, std::int64_t i) {
    const void* from = row + i * kItem<Signed>;
    if constexpr (sizeof(Signed) == 4) return _mm512_loadu_si512(from);
    const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(from));
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
  }

  template <typename Signed>
  KIMISYS_AVX512 static void values(std::int64_t n, const std::byte* row, const float* inverse,
                                    std::byte* out) {
    const __m512i smallest = _mm512_set1_epi32(121 << 23);
    std::int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      const __m512i bits = _mm512_castps_si512(_mm512_mul_ps(
          _mm512_castsi512_ps(widened<Signed>(row, i)), _mm512_loadu_ps(inverse + i)));
      const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
      const __m512i exponent =
          _mm512_and_si512(_mm512_max_epi32(magnitude, smallest), _mm512_set1_epi32(0x7f800000));
      const __m512i shifter = _mm512_add_epi32(exponent, _mm512_set1_epi32(20 << 23));
      const __m512i sum = _mm512_castps_si512(
          _mm512_add_ps(_mm512_castsi512_ps(magnitude), _mm512_castsi512_ps(shifter)));
      const __m512i steps =
          _mm512_add_epi32(_mm512_sub_epi32(sum, shifter),
                           _mm512_srli_epi32(_mm512_sub_epi32(exponent, smallest), 20));
      const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                       _mm512_cvtepi32_epi8(_mm512_or_si512(steps, sign)));
    }
    round_from<Signed>(i, n, row, inverse, out);
  }
};
#endif

template <typename Set>
constexpr QuantizeRows make_rows(std::string_view name) {
  return {name,
          {Set::template maxima<std::int16_t>, Set::template values<std::int16_t>},
          {Set::template maxima<std::int32_t>, Set::template values<std::int32_t>}};
}

std::vector<QuantizeRows> supported_rows() {
  std::vector<QuantizeRows> rows;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4")) rows.push_back(make_rows<Avx512>("avx512"));
  if (__builtin_cpu_supports("x86-64-v3")) rows.push_back(make_rows<Avx2>("avx2"));
#endif
  rows.push_back(make_rows<Generic>("generic"));
  return rows;
}

}  // namespace

std::span<const QuantizeRows> quantize_rows() {
  static const std::vector<QuantizeRows> rows = supported_rows();
  return rows;
}

}  // namespace kimisys::reshard
