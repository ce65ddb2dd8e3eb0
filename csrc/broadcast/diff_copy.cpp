// Blocks copied whole: cast, copied and digested in one pass over memory.
#include <algorithm>
#include <array>
#include <cstdint>

#include "broadcast/diff.h"
#include "broadcast/diff_band.h"
#include "broadcast/digest_stream.h"
#include "reshard/box.h"
#include "reshard/implementation.h"
#include "reshard/rows.h"

namespace kimisys::broadcast {

using reshard::Region;
using reshard::Row;
using reshard::RowKind;

namespace {

// Bytes of the snapshot that wait in the first-level cache to be digested and written out.
constexpr std::int64_t kPiece = 4096;

// What copies the runs of a pair of dtypes and returns what they add to the digest.
class RunCopy {
 public:
  RunCopy(DType from, DType to, const DiffKernel& kernel)
      : itemsize_(itemsize(to)),
        live_itemsize_(itemsize(from)),
        stream_(from == to ? stream_of(kernel.name, width_of(to)) : nullptr),
        dense_(reshard::choose_row(from, to, RowKind::kDense, *kernel.rows)),
        strided_(reshard::choose_row(from, to, RowKind::kStrided, *kernel.rows)),
        write_past_(reshard::choose_row(to, to, RowKind::kStreaming, *kernel.rows)),
        write_(reshard::choose_row(to, to, RowKind::kStrided, *kernel.rows)),
        sum_(kernel.runs[width_of(to)]) {}

  std::uint64_t operator()(const Run& run, std::uint64_t counter, std::uint64_t step) const {
    const bool dense = run.live_stride == live_itemsize_;
    const bool past = run.snapshot_stride == itemsize_ && run.count * itemsize_ >= kStreamBytes;
    if (stream_ != nullptr && dense && past && on_element(run.snapshot)) {
      return stream_(run.snapshot, run.live, run.count, counter, step);
    }
    alignas(64) std::array<std::byte, kPiece> piece;
    const std::int64_t most = kPiece / itemsize_;
    std::uint64_t sum = 0;
    for (std::int64_t at = 0; at < run.count; at += most) {
      const std::int64_t count = std::min(most, run.count - at);
      const std::byte* from = run.live + at * run.live_stride;
      std::byte* to = run.snapshot + at * run.snapshot_stride;
      (dense ? dense_ : strided_)(count, from, run.live_stride, piece.data(), itemsize_);
      sum += sum_(piece.data(), count, itemsize_, counter + static_cast<std::uint64_t>(at) * step,
                  step);
      (past ? write_past_ : write_)(count, piece.data(), itemsize_, to, run.snapshot_stride);
    }
    return sum;
  }

 private:
  bool on_element(const std::byte* address) const {
    return reinterpret_cast<std::uintptr_t>(address) % static_cast<std::size_t>(itemsize_) == 0;
  }

  std::int64_t itemsize_;
  std::int64_t live_itemsize_;
  Stream stream_;
  Row dense_;
  Row strided_;
  Row write_past_;
  Row write_;
  RunSum sum_;
};

}  // namespace

std::vector<Region> counted_parts(const Region& region, const std::vector<Region>& counted) {
  std::vector<Region> parts;
  for (const Region& box : counted) {
    if (const auto part = reshard::intersect(region, box)) parts.push_back(*part);
  }
  return parts;
}

std::uint64_t Diff::sum_parts(const Pair& pair, const std::vector<Region>& parts,
                              const std::byte* snapshot, const DiffKernel& kernel) {
  const RunSum sum = kernel.runs[width_of(pair.to)];
  std::uint64_t total = 0;
  for (const Region& part : parts) {
    const Walk walk = make_walk(part.extent, pair.snapshot_strides, pair.snapshot_strides,
                                pair.shape, {1, 0, itemsize(pair.to), 1});
    const std::byte* data = snapshot + pair.snapshot_offset +
                            distance(pair.region.offset, part.offset, pair.snapshot_strides);
    const std::int64_t index = flat_index(part.offset, pair.shape);
    Odometer at(walk);
    for (std::int64_t i = 0; i < walk.runs; ++i, at.next()) {
      total += sum(data + at.snapshot(), walk.run.extent, walk.run.snapshot_stride,
                   counter_of(pair.key, index + at.index()),
                   static_cast<std::uint64_t>(walk.run.index_stride) * kGolden);
    }
  }
  return total;
}

void Diff::copy_rows(const Band& band, std::size_t member, const DiffKernel& kernel) const {
  const bool dense = band.dense && kernel.name != reshard::kNaive;
  const reshard::Row row = reshard::choose_row(
      band.pair->from, band.pair->to, dense ? reshard::RowKind::kDense : reshard::RowKind::kStrided,
      *kernel.rows);
  Odometer at(band.walk);
  for (std::int64_t i = 0; i < band.walk.runs; ++i, at.next()) {
    const Run run = band.run(band.members[member], at);
    row(run.count, run.live, run.live_stride, run.snapshot, run.snapshot_stride);
  }
}

// All members row by row, so that memory is walked from one end to the other.
std::vector<std::uint64_t> Diff::copy_whole(const Band& band, const DiffKernel& kernel) {
  const Pair& pair = *band.pair;
  const RunCopy copy(pair.from, pair.to, kernel);
  const std::uint64_t step = static_cast<std::uint64_t>(band.walk.run.index_stride) * kGolden;
  std::vector<std::uint64_t> sums(band.members.size(), 0);
  Odometer at(band.walk);
  for (std::int64_t i = 0; i < band.walk.runs; ++i, at.next()) {
    for (std::size_t m = 0; m < band.members.size(); ++m) {
      const Band::Member& member = band.members[m];
      sums[m] += copy(band.run(member, at), counter_of(pair.key, member.index + at.index()), step);
    }
  }
  return sums;
}

void Diff::copy(std::size_t chunk, const std::vector<const std::byte*>& live, std::byte* snapshot,
                std::vector<std::uint64_t>& sums, const DiffKernel& kernel) {
  for (const auto& [first, last] : bands(chunk)) {
    const Band band = this->band(first, last, live, snapshot);
    const Pair& pair = *band.pair;
    std::vector<std::vector<Region>> parts;
    bool fused = kernel.name != reshard::kNaive;
    for (const Band::Member& member : band.members) {
      const Region& region = blocks_.blocks()[member.block].region;
      parts.push_back(counted_parts(region, pair.counted));
      fused = fused && is_whole(region, parts.back());
    }
    const std::vector<std::uint64_t> whole =
        fused ? copy_whole(band, kernel) : std::vector<std::uint64_t>{};
    for (std::size_t m = 0; m < band.members.size(); ++m) {
      if (!fused) copy_rows(band, m, kernel);
      const std::uint64_t sum = fused ? whole[m] : sum_parts(pair, parts[m], snapshot, kernel);
      sums_[band.members[m].block] = {sum, true, false};
      sums[pair.tensor] += sum;
    }
  }
}

}  // namespace kimisys::broadcast
