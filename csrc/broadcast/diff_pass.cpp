// The passes of the diff over one chunk.
#include <algorithm>

#include "broadcast/code.h"
#include "broadcast/diff.h"
#include "broadcast/diff_band.h"
#include "reshard/box.h"

namespace kimisys::broadcast {

using reshard::Dims;
using reshard::Region;

namespace {

// A change in a list costs as much to sum as three elements in a row (2.8 to 3.4, measured on Zen 4
// with each kernel): a block with more changes is summed anew.
constexpr std::size_t kElementsPerChange = 3;

// The changes of a block, all of which count.
std::uint64_t sum_changes(const ChangeList& changes, const Walk& walk, std::uint64_t counter,
                          SumChanges sum) {
  // The last two axes at a time: the counters of more do not come from one division.
  const bool rows = walk.outer_count > 0;
  Walk planes = walk;
  planes.outer_count -= rows ? 1 : 0;
  const Axis outer = rows ? walk.outer[walk.outer_count - 1] : Axis{};
  const auto step = static_cast<std::uint64_t>(walk.run.index_stride);
  const auto row = static_cast<std::uint64_t>(walk.run.extent);
  const auto skip = static_cast<std::uint64_t>(outer.index_stride) - row * step;
  const auto plane = static_cast<std::uint32_t>(walk.run.extent * outer.extent);
  const std::uint32_t* positions = changes.positions.get();
  std::uint64_t total = 0;
  std::size_t begin = 0;
  Odometer at(planes);
  for (std::uint32_t origin = 0; begin < changes.count; origin += plane) {
    const std::size_t end =
        planes.outer_count == 0
            ? changes.count
            : static_cast<std::size_t>(
                  std::lower_bound(positions + begin, positions + changes.count, origin + plane) -
                  positions);
    const Counters counters{counter_of(counter, at.index()), row, step, skip};
    total += sum(changes, begin, end, origin, counters);
    begin = end;
    at.next();
  }
  return total;
}

// Those of the changes that lie in the parts, one by one.
std::uint64_t sum_some_changes(const ChangeList& changes, const Region& region,
                               const std::vector<Region>& parts, const Dims& shape,
                               std::uint64_t key, SumChanges sum) {
  std::uint64_t total = 0;
  Region element{Dims(shape.size()), Dims(shape.size(), 1)};
  for (std::size_t i = 0; i < changes.count; ++i) {
    std::int64_t rest = changes.positions[i];
    for (std::size_t d = shape.size(); d-- > 0; rest /= region.extent[d]) {
      element.offset[d] = region.offset[d] + rest % region.extent[d];
    }
    const bool counts = std::any_of(parts.begin(), parts.end(), [&](const Region& part) {
      return reshard::contains(part, element);
    });
    if (!counts) continue;
    const Counters counters{counter_of(key, flat_index(element.offset, shape)), 1, 0, 0};
    total += sum(changes, i, i + 1, changes.positions[i], counters);
  }
  return total;
}

// The block's bits in row-major order, out of the snapshot.
void append_whole(const Walk& walk, const std::byte* snapshot, DType dtype,
                  const DiffKernel& kernel, std::vector<std::byte>& payload) {
  const auto item = static_cast<std::size_t>(itemsize(dtype));
  const std::size_t nbytes = static_cast<std::size_t>(walk.run.extent) * item;
  const bool dense = walk.run.snapshot_stride == itemsize(dtype);
  const reshard::Row row =
      reshard::choose_row(dtype, dtype, reshard::RowKind::kStrided, *kernel.rows);
  Odometer at(walk);
  for (std::int64_t i = 0; i < walk.runs; ++i, at.next()) {
    const std::byte* from = snapshot + at.snapshot();
    if (dense) {
      payload.insert(payload.end(), from, from + nbytes);
    } else {
      payload.resize(payload.size() + nbytes);
      row(walk.run.extent, from, walk.run.snapshot_stride, &payload[payload.size() - nbytes],
          itemsize(dtype));
    }
  }
}

void add_whole(const Walk& walk, const std::byte* snapshot, std::int64_t elements, DType dtype,
               const DiffKernel& kernel, ChunkDelta& out) {
  const std::int64_t nbytes = elements * itemsize(dtype);
  Descriptor descriptor{Kind::kWhole, 0, 0};
  if (out.whole_inline) {
    append_whole(walk, snapshot, dtype, kernel, out.payload);
    descriptor.nbytes = static_cast<std::uint32_t>(nbytes);
    out.whole_nbytes += nbytes;
  } else {
    out.referred_nbytes += nbytes;
  }
  out.descriptors.push_back(descriptor.word());
}

void add_increment(std::vector<std::pair<std::size_t, std::uint64_t>>& increments,
                   std::size_t tensor, std::uint64_t increment) {
  const auto found =
      std::lower_bound(increments.begin(), increments.end(), std::pair{tensor, std::uint64_t{0}});
  if (found != increments.end() && found->first == tensor) {
    found->second += increment;
  } else {
    increments.insert(found, {tensor, increment});
  }
}

}  // namespace

std::uint64_t Diff::increment(const Band& band, std::size_t member, const ChangeList& changes,
                              const std::byte* snapshot, const DiffKernel& kernel) {
  const Pair& pair = *band.pair;
  const Band::Member& at = band.members[member];
  const Region& region = blocks_.blocks()[at.block].region;
  const std::vector<Region> parts = counted_parts(region, pair.counted);
  if (parts.empty()) return 0;
  Sum& sum = sums_[at.block];
  std::uint64_t grown = 0;
  if (sum.known && changes.count * kElementsPerChange > static_cast<std::size_t>(band.elements)) {
    grown = sum_parts(pair, parts, snapshot, kernel) - sum.value;
  } else if (is_whole(region, parts)) {
    grown = sum_changes(changes, band.walk, counter_of(pair.key, at.index),
                        kernel.changes[width_of(pair.to)]);
  } else {
    grown = sum_some_changes(changes, region, parts, pair.shape, pair.key,
                             kernel.changes[width_of(pair.to)]);
  }
  sum.value += grown;
  return grown;
}

void Diff::finish(const Band& band, std::size_t member, const ChangeList& changes,
                  std::byte* snapshot, ChunkDelta& out, const DiffKernel& kernel) {
  const Pair& pair = *band.pair;
  bool& whole = sums_[band.members[member].block].whole;
  whole = false;
  if (changes.count == 0) {
    out.descriptors.push_back(Descriptor{}.word());
    return;
  }
  out.changed += static_cast<std::int64_t>(changes.count);
  if (!pair.counted.empty()) {
    add_increment(out.increments, pair.tensor, increment(band, member, changes, snapshot, kernel));
  }
  const Descriptor descriptor =
      encode({changes.positions.get(), changes.count}, changes.after.get(), band.elements,
             itemsize(pair.to), out.payload);
  whole = descriptor.kind == Kind::kWhole;
  if (whole) {
    add_whole(band.walk, band.members[member].snapshot, band.elements, pair.to, kernel, out);
  } else {
    out.descriptors.push_back(descriptor.word());
  }
}

std::int64_t Diff::count_whole(const Band& band, std::size_t member,
                               const DiffKernel& kernel) const {
  const CountRun count_run = kernel.counts.of(band.pair->from, band.pair->to);
  std::int64_t count = 0;
  Odometer at(band.walk);
  for (std::int64_t i = 0; i < band.walk.runs; ++i, at.next()) {
    count += count_run(band.run(band.members[member], at));
  }
  // A bitmap and the values would not be shorter.
  const std::int64_t spared = (band.elements - count) * itemsize(band.pair->to);
  return spared <= (band.elements + 7) / 8 ? count : 0;
}

void Diff::replace(const Band& band, std::size_t member, std::int64_t count, std::byte* snapshot,
                   ChunkDelta& out, const DiffKernel& kernel) {
  const Pair& pair = *band.pair;
  const std::size_t block = band.members[member].block;
  const std::vector<Region> parts = counted_parts(blocks_.blocks()[block].region, pair.counted);
  Sum& sum = sums_[block];
  const std::uint64_t gone = sum.known ? sum.value : sum_parts(pair, parts, snapshot, kernel);
  copy_rows(band, member, kernel);
  sum.value = sum_parts(pair, parts, snapshot, kernel);
  sum.known = true;
  out.changed += count;
  if (!parts.empty()) add_increment(out.increments, pair.tensor, sum.value - gone);
  add_whole(band.walk, band.members[member].snapshot, band.elements, pair.to, kernel, out);
}

void Diff::compare(std::size_t chunk, const std::vector<const std::byte*>& live,
                   std::byte* snapshot, ChunkDelta& out, const DiffKernel& kernel) {
  out.payload.clear();
  out.descriptors.clear();
  out.increments.clear();
  out.changed = out.whole_nbytes = out.referred_nbytes = 0;
  for (const auto& [first, last] : bands(chunk)) {
    const Band band = this->band(first, last, live, snapshot);
    const Pair& pair = *band.pair;
    if (out.scratch.size() < band.members.size()) out.scratch.resize(band.members.size());
    std::vector<std::int64_t> whole(band.members.size(), 0);
    std::vector<std::size_t> left;
    for (std::size_t m = 0; m < band.members.size(); ++m) {
      // Who was written whole last time is likely to be so again: counting first spares the lists.
      if (sums_[band.members[m].block].whole) whole[m] = count_whole(band, m, kernel);
      if (whole[m] > 0) continue;
      left.push_back(m);
      out.scratch[m].reserve(band.elements, static_cast<std::size_t>(itemsize(pair.to)));
      out.scratch[m].count = 0;
    }
    const CompareRun compare_run =
        (band.dense ? kernel.dense : kernel.strided).of(pair.from, pair.to);
    std::uint32_t position = 0;
    Odometer at(band.walk);
    for (std::int64_t i = 0; i < band.walk.runs && !left.empty(); ++i, at.next()) {
      for (const std::size_t m : left) {
        compare_run(band.run(band.members[m], at), position, out.scratch[m]);
      }
      position += static_cast<std::uint32_t>(band.walk.run.extent);
    }
    for (std::size_t m = 0; m < band.members.size(); ++m) {
      if (whole[m] > 0) {
        replace(band, m, whole[m], snapshot, out, kernel);
      } else {
        finish(band, m, out.scratch[m], snapshot, out, kernel);
      }
    }
  }
}

}  // namespace kimisys::broadcast
