#include "broadcast/scatter_elements.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "broadcast/mix.h"

namespace kimisys::broadcast {
namespace {

// Elements that are located, and fetched into the cache, ahead of those that are worked on: enough
// to hide the memory's latency, few enough to stay in the first-level cache.
constexpr std::size_t kTile = 256;

// position / length is position * factor >> kShift with factor = 2^kShift / length rounded up: the
// product is too large by at most position / 2^kShift < 1 / 2^18 <= 1 / length, so it does not
// reach the next whole number.
constexpr unsigned kShift = 36;
static_assert(kMaxBlockElements <= std::int64_t{1} << (kShift / 2));

template <typename Word>
struct Tile {
  std::size_t count = 0;
  std::array<std::int64_t, kTile> offset;
  std::array<std::uint64_t, kTile> counter;
  std::array<Word, kTile> fresh;
};

template <typename Word>
[[gnu::always_inline]] inline Word load(const std::byte* address) {
  Word word;
  std::memcpy(&word, address, sizeof(Word));
  return word;
}

template <typename Word>
[[gnu::always_inline]] constexpr std::uint64_t bits_of(Word word) {
  return sizeof(Word) == 8 ? fold(word) : word;
}

std::int64_t row_length(const Walk& walk) { return walk.axes[walk.dims - 1].extent; }

// The changes within the part of the outermost axis that the target has; the inner axes are left
// for locate().
Changes restricted(const Walk& walk, const Changes& changes, std::int64_t itemsize) {
  std::int64_t inner = 1;
  for (std::size_t d = 1; d < walk.dims; ++d) inner *= walk.axes[d].extent;
  const Walk::Axis& outer = walk.axes[0];
  const auto below = [](std::uint32_t position, std::int64_t end) { return position < end; };
  const auto first = std::lower_bound(changes.positions.begin(), changes.positions.end(),
                                      outer.begin * inner, below);
  const auto last =
      std::lower_bound(first, changes.positions.end(), (outer.begin + outer.count) * inner, below);
  return {{first, last}, changes.values + (first - changes.positions.begin()) * itemsize};
}

// One axis: every restricted position is inside.
template <typename Word>
[[gnu::always_inline]] inline void locate_run(const Walk& walk, const std::uint32_t* positions,
                                              const std::byte* values, std::size_t count,
                                              Tile<Word>& tile) {
  const Walk::Axis axis = walk.axes[0];
  const std::int64_t offset = walk.offset - axis.begin * axis.byte_stride;
  const std::uint64_t counter =
      walk.counter - static_cast<std::uint64_t>(axis.begin) * axis.counter_step;
  for (std::size_t i = 0; i < count; ++i) {
    tile.offset[i] = offset + std::int64_t{positions[i]} * axis.byte_stride;
    tile.counter[i] = counter + std::uint64_t{positions[i]} * axis.counter_step;
  }
  std::memcpy(tile.fresh.data(), values, count * sizeof(Word));
  tile.count = count;
}

// Two axes. kWhole: the target has the rows' full length, so every restricted position is inside.
template <typename Word, bool kWhole>
[[gnu::always_inline]] inline void locate_rows(const Walk& walk, const std::uint32_t* positions,
                                               const std::byte* values, std::size_t count,
                                               Tile<Word>& tile) {
  const Walk::Axis outer = walk.axes[0];
  const Walk::Axis inner = walk.axes[1];
  const auto length = static_cast<std::uint64_t>(inner.extent);
  const std::uint64_t factor = (std::uint64_t{1} << kShift) / length + 1;
  const std::int64_t offset =
      walk.offset - outer.begin * outer.byte_stride - inner.begin * inner.byte_stride;
  const std::uint64_t counter = walk.counter -
                                static_cast<std::uint64_t>(outer.begin) * outer.counter_step -
                                static_cast<std::uint64_t>(inner.begin) * inner.counter_step;
  const auto begin = static_cast<std::uint64_t>(inner.begin);
  const auto width = static_cast<std::uint64_t>(inner.count);
  std::size_t kept = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t position = positions[i];
    const std::uint64_t row = position * factor >> kShift;
    const std::uint64_t column = position - row * length;
    tile.offset[kept] = offset + static_cast<std::int64_t>(row) * outer.byte_stride +
                        static_cast<std::int64_t>(column) * inner.byte_stride;
    tile.counter[kept] = counter + row * outer.counter_step + column * inner.counter_step;
    if constexpr (kWhole) {
      ++kept;
    } else {
      tile.fresh[kept] = load<Word>(values + i * sizeof(Word));
      kept += column - begin < width ? 1 : 0;  // wraps around below `begin`
    }
  }
  if constexpr (kWhole) std::memcpy(tile.fresh.data(), values, count * sizeof(Word));
  tile.count = kept;
}

// A row of three and more axes: its place in the destination, if the target has it.
struct Row {
  std::int64_t number = -1;
  bool inside = false;
  std::int64_t offset = 0;
  std::uint64_t counter = 0;
};

Row find_row(const Walk& walk, std::int64_t number) {
  Row row{number, true, walk.offset, walk.counter};
  std::int64_t rest = number;
  for (std::size_t d = walk.dims - 1; d-- > 0; rest /= walk.axes[d].extent) {
    const Walk::Axis& axis = walk.axes[d];
    const std::int64_t index = rest % axis.extent - axis.begin;
    row.inside = row.inside && index >= 0 && index < axis.count;
    row.offset += index * axis.byte_stride;
    row.counter += static_cast<std::uint64_t>(index) * axis.counter_step;
  }
  return row;
}

template <typename Word>
inline void locate_any(const Walk& walk, const std::uint32_t* positions, const std::byte* values,
                       std::size_t count, Tile<Word>& tile, Row& row) {
  const Walk::Axis inner = walk.axes[walk.dims - 1];
  const std::int64_t length = row_length(walk);
  tile.count = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t position = positions[i];
    if (row.number < 0 || position - row.number * length >= length) {
      row = find_row(walk, position / length);
    }
    const std::int64_t column = position - row.number * length - inner.begin;
    if (!row.inside || column < 0 || column >= inner.count) continue;
    tile.offset[tile.count] = row.offset + column * inner.byte_stride;
    tile.counter[tile.count] =
        row.counter + static_cast<std::uint64_t>(column) * inner.counter_step;
    tile.fresh[tile.count] = load<Word>(values + i * sizeof(Word));
    ++tile.count;
  }
}

// Calls work(tile) for tile after tile of the changes in the target. While one is worked on, the
// lines of the next are on their way.
template <typename Word, typename Work>
[[gnu::always_inline]] inline void for_tiles(const Walk& walk, const Changes& all,
                                             const std::byte* buffer, Work work) {
  const Changes changes = restricted(walk, all, sizeof(Word));
  std::array<Tile<Word>, 2> tiles;
  std::size_t next = 0;
  Row row;
  tiles[1].count = 0;
  const std::size_t total = changes.positions.size();
  for (std::size_t at = 0;; at += kTile, next = 1 - next) {
    Tile<Word>& ahead = tiles[next];
    const std::size_t count = at < total ? std::min(kTile, total - at) : 0;
    const std::uint32_t* positions = changes.positions.data() + at;
    const std::byte* values = changes.values + at * sizeof(Word);
    if (count == 0) {
      ahead.count = 0;
    } else if (walk.dims == 1) {
      locate_run(walk, positions, values, count, ahead);
    } else if (walk.dims > 2) {
      locate_any(walk, positions, values, count, ahead, row);
    } else if (walk.axes[1].count == walk.axes[1].extent) {
      locate_rows<Word, true>(walk, positions, values, count, ahead);
    } else {
      locate_rows<Word, false>(walk, positions, values, count, ahead);
    }
    for (std::size_t i = 0; i < ahead.count; ++i) {
      // Into the second-level cache: more fetches can be on their way there than to the first.
      __builtin_prefetch(buffer + ahead.offset[i], 0, 2);
    }
    work(tiles[1 - next]);
    if (count == 0) break;
  }
}

template <typename Word>
[[gnu::always_inline]] inline std::uint64_t measure_all(const Walk& walk, const Changes& changes,
                                                        const std::byte* buffer) {
  std::uint64_t sum = 0;
  for_tiles<Word>(walk, changes, buffer,
                  [&](const Tile<Word>& tile) __attribute__((always_inline)) {
                    std::array<Word, kTile> old;
                    for (std::size_t i = 0; i < tile.count; ++i)
                      old[i] = load<Word>(buffer + tile.offset[i]);
                    for (std::size_t i = 0; i < tile.count; ++i) {
                      sum += mix(tile.counter[i], bits_of(tile.fresh[i]));
                      sum -= mix(tile.counter[i], bits_of(old[i]));
                    }
                  });
  return sum;
}

template <typename Word>
[[gnu::always_inline]] inline std::int64_t write_all(const Walk& walk, const Changes& changes,
                                                     std::byte* buffer) {
  std::size_t written = 0;
  for_tiles<Word>(walk, changes, buffer,
                  [&](const Tile<Word>& tile) __attribute__((always_inline)) {
                    for (std::size_t i = 0; i < tile.count; ++i) {
                      std::memcpy(buffer + tile.offset[i], &tile.fresh[i], sizeof(Word));
                    }
                    written += tile.count;
                  });
  return static_cast<std::int64_t>(written);
}

// The definition: every position taken apart, axis by axis, and looked for in the target.
struct Naive {
  template <typename Word, typename Visit>
  static void visit(const Walk& walk, const Changes& changes, Visit visit_one) {
    for (std::size_t i = 0; i < changes.positions.size(); ++i) {
      std::int64_t rest = changes.positions[i];
      std::int64_t offset = walk.offset;
      std::uint64_t counter = walk.counter;
      bool inside = true;
      for (std::size_t d = walk.dims; d-- > 0; rest /= walk.axes[d].extent) {
        const Walk::Axis& axis = walk.axes[d];
        const std::int64_t index = rest % axis.extent - axis.begin;
        inside = inside && index >= 0 && index < axis.count;
        offset += index * axis.byte_stride;
        counter += static_cast<std::uint64_t>(index) * axis.counter_step;
      }
      if (inside) visit_one(offset, counter, load<Word>(changes.values + i * sizeof(Word)));
    }
  }
  template <typename Word>
  static std::uint64_t measure(const Walk& walk, const Changes& changes, const std::byte* buffer) {
    std::uint64_t sum = 0;
    visit<Word>(walk, changes, [&](std::int64_t offset, std::uint64_t counter, Word fresh) {
      sum += mix(counter, bits_of(fresh)) - mix(counter, bits_of(load<Word>(buffer + offset)));
    });
    return sum;
  }
  template <typename Word>
  static std::int64_t write(const Walk& walk, const Changes& changes, std::byte* buffer) {
    std::int64_t written = 0;
    visit<Word>(walk, changes, [&](std::int64_t offset, std::uint64_t, Word fresh) {
      std::memcpy(buffer + offset, &fresh, sizeof(Word));
      ++written;
    });
    return written;
  }
};

// The same loops compiled for one instruction set.
#define KIMISYS_ELEMENT_KERNEL(Name, attribute)                                      \
  struct Name {                                                                      \
    template <typename Word>                                                         \
    attribute static std::uint64_t measure(const Walk& walk, const Changes& changes, \
                                           const std::byte* buffer) {                \
      return measure_all<Word>(walk, changes, buffer);                               \
    }                                                                                \
    template <typename Word>                                                         \
    attribute static std::int64_t write(const Walk& walk, const Changes& changes,    \
                                        std::byte* buffer) {                         \
      return write_all<Word>(walk, changes, buffer);                                 \
    }                                                                                \
  }

KIMISYS_ELEMENT_KERNEL(Generic, );
#if defined(__x86_64__)
KIMISYS_ELEMENT_KERNEL(Avx2, __attribute__((target("arch=x86-64-v3"))));
KIMISYS_ELEMENT_KERNEL(Avx512, __attribute__((target("arch=x86-64-v4"))));
#endif

template <typename Loops>
ElementKernel kernel_of(std::string_view name, bool merged) {
  return {name,
          merged,
          {&Loops::template measure<std::uint8_t>, &Loops::template measure<std::uint16_t>,
           &Loops::template measure<std::uint32_t>, &Loops::template measure<std::uint64_t>},
          {&Loops::template write<std::uint8_t>, &Loops::template write<std::uint16_t>,
           &Loops::template write<std::uint32_t>, &Loops::template write<std::uint64_t>}};
}

std::vector<ElementKernel> supported_kernels() {
  std::vector<ElementKernel> kernels;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4")) kernels.push_back(kernel_of<Avx512>("avx512", true));
  if (__builtin_cpu_supports("x86-64-v3")) kernels.push_back(kernel_of<Avx2>("avx2", true));
#endif
  kernels.push_back(kernel_of<Generic>("generic", true));
  kernels.push_back(kernel_of<Naive>("naive", false));
  return kernels;
}

}  // namespace

Walk make_walk(const reshard::Tensor& tensor, const Block& block, const Target& target,
               bool merged) {
  Walk walk{.offset = target.offset, .counter = target.counter};
  std::vector<Walk::Axis> axes;  // innermost first
  std::uint64_t step = kGolden;
  for (std::size_t d = tensor.shape.size(); d-- > 0;
       step *= static_cast<std::uint64_t>(tensor.shape[d])) {
    const std::int64_t extent = block.region.extent[d];
    if (extent == 1) continue;
    const Walk::Axis axis{extent, target.box.offset[d] - block.region.offset[d],
                          target.box.extent[d], target.strides[d], step};
    if (merged && !axes.empty()) {
      Walk::Axis& inner = axes.back();
      const bool goes_on =
          axis.byte_stride == inner.byte_stride * inner.extent &&
          axis.counter_step == inner.counter_step * static_cast<std::uint64_t>(inner.extent);
      if (inner.count == inner.extent && (goes_on || axis.count == 1)) {
        inner.begin = axis.begin * inner.extent;
        inner.count = axis.count * inner.extent;
        inner.extent *= extent;
        continue;
      }
    }
    axes.push_back(axis);
  }
  if (axes.empty()) axes.push_back({});
  walk.dims = axes.size();
  std::reverse_copy(axes.begin(), axes.end(), walk.axes.begin());
  return walk;
}

std::span<const ElementKernel> element_kernels() {
  static const std::vector<ElementKernel> kernels = supported_kernels();
  return kernels;
}

}  // namespace kimisys::broadcast
