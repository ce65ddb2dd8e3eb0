#include "broadcast/diff_kernels.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "base/error.h"
#include "broadcast/blocks.h"
#include "broadcast/diff_avx512.h"
#include "broadcast/mix.h"

namespace kimisys::broadcast {
namespace {

template <typename Word>
constexpr Word keep(Word bits) {
  return bits;
}

// Appends without a branch: what did not change is overwritten by the next.
template <typename Word>
[[gnu::always_inline]] inline void append(Word before, Word after, std::uint32_t position,
                                          ChangeList& out, std::size_t& count) {
  out.positions[count] = position;
  std::memcpy(&out.before[count * sizeof(Word)], &before, sizeof(Word));
  std::memcpy(&out.after[count * sizeof(Word)], &after, sizeof(Word));
  count += before != after ? 1 : 0;
}

// Element by element, in any order of bytes.
template <typename Live, typename Word, Word (*kConvert)(Live)>
void compare_strided(const Run& run, std::uint32_t position, ChangeList& out) {
  for (std::int64_t i = 0; i < run.count; ++i) {
    Live live;
    Word before;
    std::byte* at = run.snapshot + i * run.snapshot_stride;
    std::memcpy(&live, run.live + i * run.live_stride, sizeof(Live));
    std::memcpy(&before, at, sizeof(Word));
    const Word after = kConvert(live);
    if (before == after) continue;
    std::memcpy(at, &after, sizeof(Word));
    append(before, after, position + static_cast<std::uint32_t>(i), out, out.count);
  }
}

// Both sides dense: a few cache lines are tested at once, in 64-bit words or what the compiler
// makes of them, and looked at closely only where they differ.
template <typename Live, typename Word, Word (*kConvert)(Live)>
[[gnu::always_inline]] inline void compare_dense(const Run& run, std::uint32_t position,
                                                 ChangeList& out) {
  constexpr std::size_t kBytes = 256;
  constexpr std::int64_t kPiece = kBytes / sizeof(Word);
  std::size_t count = out.count;
  std::int64_t i = 0;
  for (; i + kPiece <= run.count; i += kPiece) {
    const std::byte* live = run.live + i * static_cast<std::int64_t>(sizeof(Live));
    std::byte* snapshot = run.snapshot + i * static_cast<std::int64_t>(sizeof(Word));
    std::array<Word, kPiece> after;
    std::array<Word, kPiece> before;
    for (std::size_t k = 0; k < kPiece; ++k) {
      Live bits;
      std::memcpy(&bits, live + k * sizeof(Live), sizeof(Live));
      after[k] = kConvert(bits);
    }
    std::memcpy(before.data(), snapshot, kBytes);
    Word differs = 0;
    for (std::size_t k = 0; k < kPiece; ++k) {
      differs = static_cast<Word>(differs | (before[k] ^ after[k]));
    }
    if (differs == 0) continue;
    constexpr std::size_t kLine = 64 / sizeof(Word);
    for (std::size_t line = 0; line < kPiece; line += kLine) {
      const std::size_t known = count;
      for (std::size_t k = line; k < line + kLine; ++k) {
        append(before[k], after[k],
               position + static_cast<std::uint32_t>(i) + static_cast<std::uint32_t>(k), out,
               count);
      }
      if (count != known) std::memcpy(snapshot + line * sizeof(Word), &after[line], 64);
    }
  }
  out.count = count;
  const Run rest{run.live + i * static_cast<std::int64_t>(sizeof(Live)),
                 run.snapshot + i * static_cast<std::int64_t>(sizeof(Word)), run.count - i,
                 sizeof(Live), sizeof(Word)};
  compare_strided<Live, Word, kConvert>(rest, position + static_cast<std::uint32_t>(i), out);
}

template <typename Live, typename Word, Word (*kConvert)(Live)>
[[gnu::always_inline]] inline std::int64_t count_run(const Run& run, std::int64_t live_stride,
                                                     std::int64_t snapshot_stride) {
  std::uint32_t count = 0;
  for (std::int64_t i = 0; i < run.count; ++i) {
    Live live;
    Word before;
    std::memcpy(&live, run.live + i * live_stride, sizeof(Live));
    std::memcpy(&before, run.snapshot + i * snapshot_stride, sizeof(Word));
    count += kConvert(live) != before ? 1U : 0U;
  }
  return count;
}

// A dense run is told apart at compile time: with known strides the compiler vectorises the loads.
template <typename Live, typename Word, Word (*kConvert)(Live)>
[[gnu::always_inline]] inline std::int64_t count_any(const Run& run) {
  if (run.live_stride == sizeof(Live) && run.snapshot_stride == sizeof(Word)) {
    return count_run<Live, Word, kConvert>(run, sizeof(Live), sizeof(Word));
  }
  return count_run<Live, Word, kConvert>(run, run.live_stride, run.snapshot_stride);
}

template <typename Word>
[[gnu::always_inline]] inline std::uint64_t sum_changes(const ChangeList& changes,
                                                        std::size_t begin, std::size_t end,
                                                        std::uint32_t origin,
                                                        const Counters& counters) {
  // p / row, exact for all positions and rows of a block: p times the rounded-up quotient is less
  // than 2^-22 off, and 1 / row is more.
  constexpr unsigned kShift = 40;
  const std::uint64_t reciprocal = ((std::uint64_t{1} << kShift) + counters.row - 1) / counters.row;
  const std::uint64_t step = counters.step;
  const std::uint64_t skip = counters.skip;
  const std::uint64_t first = counters.first;
  const std::uint32_t* positions = changes.positions.get();
  const std::byte* before = changes.before.get();
  const std::byte* after = changes.after.get();
  std::uint64_t sum = 0;
  for (std::size_t i = begin; i < end; ++i) {
    Word gone;
    Word come;
    std::memcpy(&gone, before + i * sizeof(Word), sizeof(Word));
    std::memcpy(&come, after + i * sizeof(Word), sizeof(Word));
    const std::uint64_t at = positions[i] - origin;
    const std::uint64_t index = at * step + (at * reciprocal >> kShift) * skip;
    const std::uint64_t counter = first + index * kGolden;
    sum += mix(counter, sizeof(Word) == 8 ? fold(come) : come) -
           mix(counter, sizeof(Word) == 8 ? fold(gone) : gone);
  }
  return sum;
}

constexpr Comparisons kStrided = {{compare_strided<std::uint8_t, std::uint8_t, keep>,
                                   compare_strided<std::uint16_t, std::uint16_t, keep>,
                                   compare_strided<std::uint32_t, std::uint32_t, keep>,
                                   compare_strided<std::uint64_t, std::uint64_t, keep>},
                                  compare_strided<std::uint32_t, std::uint16_t, bfloat16_bits>,
                                  compare_strided<std::uint16_t, std::uint32_t, float32_bits>};

// The same loops compiled for one instruction set.
#define KIMISYS_DIFF_KERNEL(Name, attribute)                                                       \
  struct Name {                                                                                    \
    template <typename Live, typename Word, Word (*kConvert)(Live)>                                \
    attribute static void compare(const Run& run, std::uint32_t position, ChangeList& out) {       \
      compare_dense<Live, Word, kConvert>(run, position, out);                                     \
    }                                                                                              \
    template <typename Word>                                                                       \
    attribute static std::uint64_t sum(const ChangeList& changes, std::size_t begin,               \
                                       std::size_t end, std::uint32_t origin,                      \
                                       const Counters& counters) {                                 \
      return sum_changes<Word>(changes, begin, end, origin, counters);                             \
    }                                                                                              \
    template <typename Live, typename Word, Word (*kConvert)(Live)>                                \
    attribute static std::int64_t count(const Run& run) {                                          \
      return count_any<Live, Word, kConvert>(run);                                                 \
    }                                                                                              \
    static constexpr ByCast<CountRun> counts() {                                                   \
      return {                                                                                     \
          {count<std::uint8_t, std::uint8_t, keep>, count<std::uint16_t, std::uint16_t, keep>,     \
           count<std::uint32_t, std::uint32_t, keep>, count<std::uint64_t, std::uint64_t, keep>},  \
          count<std::uint32_t, std::uint16_t, bfloat16_bits>,                                      \
          count<std::uint16_t, std::uint32_t, float32_bits>};                                      \
    }                                                                                              \
    static constexpr Comparisons dense() {                                                         \
      return {                                                                                     \
          {compare<std::uint8_t, std::uint8_t, keep>, compare<std::uint16_t, std::uint16_t, keep>, \
           compare<std::uint32_t, std::uint32_t, keep>,                                            \
           compare<std::uint64_t, std::uint64_t, keep>},                                           \
          compare<std::uint32_t, std::uint16_t, bfloat16_bits>,                                    \
          compare<std::uint16_t, std::uint32_t, float32_bits>};                                    \
    }                                                                                              \
    static constexpr std::array<SumChanges, 4> sums() {                                            \
      return {&sum<std::uint8_t>, &sum<std::uint16_t>, &sum<std::uint32_t>, &sum<std::uint64_t>};  \
    }                                                                                              \
  }

KIMISYS_DIFF_KERNEL(Generic, );
#if defined(__x86_64__)
KIMISYS_DIFF_KERNEL(Avx2, __attribute__((target("arch=x86-64-v3"))));
KIMISYS_DIFF_KERNEL(Avx512, __attribute__((target("arch=x86-64-v4"))));
#endif

// The digest's and the copies' kernels of that name; the last ones for a name that they lack.
template <typename Sets>
const auto* named(const Sets& sets, std::string_view name) {
  const auto found =
      std::find_if(sets.begin(), sets.end(), [name](const auto& set) { return set.name == name; });
  return found == sets.end() ? &sets.back() : &*found;
}

template <typename Set>
DiffKernel make(std::string_view name, const Comparisons& dense) {
  return {name,
          dense,
          Set::counts(),
          kStrided,
          Set::sums(),
          named(digest_kernels(), name)->by_width,
          named(reshard::row_sets(), name)};
}

std::vector<DiffKernel> supported_kernels() {
  std::vector<DiffKernel> kernels;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512vbmi2")) {
    kernels.push_back(make<Avx512>("avx512", avx512_comparisons()));
  }
  if (__builtin_cpu_supports("x86-64-v3")) {
    kernels.push_back(make<Avx2>("avx2", Avx2::dense()));
  }
#endif
  kernels.push_back(make<Generic>("generic", Generic::dense()));
  kernels.push_back(make<Generic>("naive", kStrided));
  return kernels;
}

}  // namespace

void ChangeList::reserve(std::int64_t elements, std::size_t itemsize) {
  constexpr std::size_t kBeyond = 64;  // a vector of one-byte elements
  const std::size_t wanted = static_cast<std::size_t>(elements) + kBeyond;
  if (capacity_ < wanted) {
    positions = std::make_unique_for_overwrite<std::uint32_t[]>(wanted);
    capacity_ = wanted;
  }
  if (value_capacity_ < wanted * itemsize) {
    before = std::make_unique_for_overwrite<std::byte[]>(wanted * itemsize);
    after = std::make_unique_for_overwrite<std::byte[]>(wanted * itemsize);
    value_capacity_ = wanted * itemsize;
  }
}

std::span<const DiffKernel> diff_kernels() {
  static const std::vector<DiffKernel> kernels = supported_kernels();
  return kernels;
}

const DiffKernel& diff_kernel(std::string_view implementation) {
  std::string_view name = implementation;
  if (name.empty()) {
    const char* forced = std::getenv("KIMISYS_BROADCAST_IMPLEMENTATION");
    if (forced != nullptr) name = forced;
  }
  if (name.empty()) return diff_kernels().front();
  std::string known;
  for (const DiffKernel& kernel : diff_kernels()) {
    if (kernel.name == name) return kernel;
    known.append(known.empty() ? "" : ", ").append(kernel.name);
  }
  fail(ErrorCode::kLayout, "unknown diff implementation '", name,
       "' (argument or KIMISYS_BROADCAST_IMPLEMENTATION); this machine has ", known);
}

}  // namespace kimisys::broadcast
