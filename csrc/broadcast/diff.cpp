#include "broadcast/diff.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <map>
#include <tuple>

#include "base/error.h"
#include "broadcast/code.h"
#include "broadcast/mix.h"
#include "reshard/box.h"
#include "reshard/implementation.h"
#include "reshard/memory.h"

namespace kimisys::broadcast {

using reshard::Dims;
using reshard::Fragment;
using reshard::kMaxDims;
using reshard::Layout;
using reshard::Region;
using reshard::Tensor;

namespace {

// From this share of changed elements on (of 2) a block's new bits are summed anew: two mixes for
// each change against one for each element.
constexpr std::size_t kMixesPerChange = 2;

struct Axis {
  std::int64_t extent = 1;
  std::int64_t live_stride = 0;      // bytes
  std::int64_t snapshot_stride = 0;  // bytes
  std::int64_t index_stride = 0;     // elements of the whole tensor
};

// Where the elements of a region lie on both sides: runs along the last axis, which the outer ones
// enumerate in row-major order.
struct Walk {
  std::array<Axis, kMaxDims> outer{};
  std::size_t outer_count = 0;
  Axis run;
  std::int64_t runs = 1;
};

bool goes_on(const Axis& outer, const Axis& inner) {
  return outer.live_stride == inner.live_stride * inner.extent &&
         outer.snapshot_stride == inner.snapshot_stride * inner.extent &&
         outer.index_stride == inner.index_stride * inner.extent;
}

// Axes of extent 1 dropped; neighbours merged where nothing lies between them on any side.
Walk make_walk(const Dims& extent, const Dims& live_strides, const Dims& snapshot_strides,
               const Dims& shape, Axis fallback) {
  std::array<Axis, kMaxDims> axes{};
  std::size_t count = 0;  // innermost first
  std::int64_t index_stride = 1;
  for (std::size_t d = shape.size(); d-- > 0; index_stride *= shape[d]) {
    if (extent[d] == 1) continue;
    const Axis axis{extent[d], live_strides[d], snapshot_strides[d], index_stride};
    if (count > 0 && goes_on(axis, axes[count - 1])) {
      axes[count - 1].extent *= axis.extent;
    } else {
      axes[count++] = axis;
    }
  }
  Walk walk;
  walk.run = count > 0 ? axes[0] : fallback;
  for (std::size_t i = count; i-- > 1;) {
    walk.outer[walk.outer_count++] = axes[i];
    walk.runs *= axes[i].extent;
  }
  return walk;
}

// Steps through the runs of a walk: how far the current one is from the first.
class Odometer {
 public:
  explicit Odometer(const Walk& walk) : walk_(walk) {}

  std::int64_t live() const { return live_; }          // bytes
  std::int64_t snapshot() const { return snapshot_; }  // bytes
  std::int64_t index() const { return index_; }        // elements of the tensor

  void next() {
    for (std::size_t d = walk_.outer_count; d-- > 0;) {
      const Axis& axis = walk_.outer[d];
      move(axis, 1);
      if (++at_[d] < axis.extent) return;
      move(axis, -axis.extent);
      at_[d] = 0;
    }
  }

 private:
  void move(const Axis& axis, std::int64_t steps) {
    live_ += steps * axis.live_stride;
    snapshot_ += steps * axis.snapshot_stride;
    index_ += steps * axis.index_stride;
  }

  const Walk& walk_;
  std::array<std::int64_t, kMaxDims> at_{};
  std::int64_t live_ = 0;
  std::int64_t snapshot_ = 0;
  std::int64_t index_ = 0;
};

std::int64_t flat_index(const Dims& at, const Dims& shape) {
  std::int64_t index = 0;
  for (std::size_t d = 0; d < shape.size(); ++d) index = index * shape[d] + at[d];
  return index;
}

std::uint64_t counter_of(std::uint64_t key, std::int64_t index) {
  return key + static_cast<std::uint64_t>(index) * kGolden;
}

// The place of `to` in memory whose strides are these, from where `from` lies.
std::int64_t distance(const Dims& from, const Dims& to, const Dims& strides) {
  std::int64_t bytes = 0;
  for (std::size_t d = 0; d < from.size(); ++d) bytes += (to[d] - from[d]) * strides[d];
  return bytes;
}

std::size_t width_of(DType dtype) {
  return static_cast<std::size_t>(std::countr_zero(static_cast<unsigned>(itemsize(dtype))));
}

}  // namespace

// The blocks of a band: alike but for where they begin.
struct Diff::Band {
  struct Member {
    std::size_t block = 0;
    const std::byte* live = nullptr;
    std::byte* snapshot = nullptr;
    std::int64_t index = 0;  // of its first element in the tensor
  };

  const Pair* pair = nullptr;
  Walk walk;
  std::int64_t elements = 0;  // of each block
  std::vector<Member> members;
  bool dense = false;

  Run run(const Member& member, const Odometer& at) const {
    return {member.live + at.live(), member.snapshot + at.snapshot(), walk.run.extent,
            walk.run.live_stride, walk.run.snapshot_stride};
  }
};

Diff::Diff(const Layout& live_rank, const Layout& snapshot_rank, const Layout& counted)
    : live_(live_rank), blocks_(snapshot_rank), sums_(blocks_.blocks().size()) {
  KIMISYS_CHECK(snapshot_rank.buffers().size() == 1, ErrorCode::kLayout,
                "a rank's snapshot has one buffer, this layout has ",
                snapshot_rank.buffers().size(),
                "; make it with snapshot_layout and take one rank's part");
  tensor_count_ = snapshot_rank.tensors().size();
  snapshot_nbytes_ = snapshot_rank.buffers()[0].nbytes;
  std::map<std::tuple<std::string_view, Dims, Dims>, std::vector<std::size_t>> twins;
  for (std::size_t i = live_.fragments().size(); i-- > 0;) {  // the first is taken from the back
    const Fragment& fragment = live_.fragments()[i];
    twins[{fragment.tensor, fragment.region.offset, fragment.region.extent}].push_back(i);
  }
  for (std::size_t i = 0; i < snapshot_rank.fragments().size(); ++i) {
    const Fragment& fragment = snapshot_rank.fragments()[i];
    const Tensor& tensor = snapshot_rank.tensors()[snapshot_rank.tensor_of(i)];
    auto& free = twins[{fragment.tensor, fragment.region.offset, fragment.region.extent}];
    KIMISYS_CHECK(!free.empty(), ErrorCode::kLayout, "tensor '", fragment.tensor, "' ",
                  fragment.region, " of the snapshot of rank ", fragment.rank,
                  " is no fragment of the live layout; make the snapshot's layout from the live "
                  "one with snapshot_layout");
    const std::size_t twin = free.back();
    free.pop_back();
    const Tensor& live_tensor = live_.tensors()[live_.tensor_of(twin)];
    KIMISYS_CHECK(can_cast(live_tensor.dtype, tensor.dtype) && live_tensor.shape == tensor.shape,
                  ErrorCode::kLayout, "tensor ", live_tensor, " cannot be published as ", tensor,
                  "; shapes are equal, and dtypes equal or float32 and bfloat16");
    const Fragment& live = live_.fragments()[twin];
    pairs_.push_back({snapshot_rank.tensor_of(i),
                      live_.buffer_of(twin),
                      live_tensor.dtype,
                      tensor.dtype,
                      live.byte_offset,
                      fragment.byte_offset,
                      live.byte_strides,
                      fragment.byte_strides,
                      fragment.region,
                      tensor.shape,
                      tensor_key(tensor.name),
                      {}});
    elements_ += fragment.region.elements();
    nbytes_ += fragment.region.elements() * itemsize(tensor.dtype);
  }
  add_counted(snapshot_rank, counted);
}

void Diff::add_counted(const Layout& snapshot_rank, const Layout& counted) {
  std::map<std::size_t, std::vector<std::size_t>> by_tensor;
  for (std::size_t i = 0; i < pairs_.size(); ++i) by_tensor[pairs_[i].tensor].push_back(i);
  for (const Fragment& part : counted.fragments()) {
    if (part.region.empty()) continue;
    const auto tensor = snapshot_rank.find_tensor(part.tensor);
    const std::vector<std::size_t>* candidates = nullptr;
    if (tensor && by_tensor.contains(*tensor)) candidates = &by_tensor[*tensor];
    Pair* owner = nullptr;
    for (std::size_t c = 0; candidates != nullptr && owner == nullptr && c < candidates->size();
         ++c) {
      Pair& pair = pairs_[(*candidates)[c]];
      if (pair.region.empty() || !reshard::contains(pair.region, part.region)) continue;
      const std::int64_t offset =
          pair.snapshot_offset +
          distance(pair.region.offset, part.region.offset, pair.snapshot_strides);
      if (offset == part.byte_offset && pair.snapshot_strides == part.byte_strides) owner = &pair;
    }
    KIMISYS_CHECK(owner != nullptr, ErrorCode::kLayout, "tensor '", part.tensor, "' ", part.region,
                  " is counted by rank ", part.rank, ", whose snapshot does not hold it at byte ",
                  part.byte_offset, "; pass the snapshot layout's cover().of_rank()");
    owner->counted.push_back(part.region);
  }
}

std::vector<const std::byte*> Diff::live_memory(const reshard::Memories& live) const {
  std::vector<bool> needed(live_.buffers().size(), false);
  for (const Pair& pair : pairs_) {
    if (!pair.region.empty()) needed[pair.live_buffer] = true;
  }
  std::vector<const std::byte*> data;
  for (const reshard::Memory& memory :
       reshard::needed_memory(live_, live, needed, reshard::Side::kSource)) {
    data.push_back(memory.data);
  }
  return data;
}

Diff::Band Diff::band(std::size_t first, std::size_t last,
                      const std::vector<const std::byte*>& live, std::byte* snapshot) const {
  Band band;
  const Region& region = blocks_.blocks()[first].region;
  const Pair& pair = pairs_[blocks_.blocks()[first].fragment];
  band.pair = &pair;
  band.elements = region.elements();
  band.walk = make_walk(region.extent, pair.live_strides, pair.snapshot_strides, pair.shape,
                        {1, itemsize(pair.from), itemsize(pair.to), 1});
  band.dense = band.walk.run.live_stride == itemsize(pair.from) &&
               band.walk.run.snapshot_stride == itemsize(pair.to);
  for (std::size_t block = first; block < last; ++block) {
    const Dims& corner = blocks_.blocks()[block].region.offset;
    band.members.push_back({block,
                            live[pair.live_buffer] + pair.live_offset +
                                distance(pair.region.offset, corner, pair.live_strides),
                            snapshot + pair.snapshot_offset +
                                distance(pair.region.offset, corner, pair.snapshot_strides),
                            flat_index(corner, pair.shape)});
  }
  return band;
}

namespace {

// The parts of a region that the digests count.
std::vector<Region> counted_parts(const Region& region, const std::vector<Region>& counted) {
  std::vector<Region> parts;
  for (const Region& box : counted) {
    if (const auto part = reshard::intersect(region, box)) parts.push_back(*part);
  }
  return parts;
}

bool is_whole(const Region& region, const std::vector<Region>& parts) {
  return parts.size() == 1 && parts[0] == region;
}

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

std::uint64_t Diff::increment(const Band& band, std::size_t member, const ChangeList& changes,
                              const std::byte* snapshot, const DiffKernel& kernel) {
  const Pair& pair = *band.pair;
  const Band::Member& at = band.members[member];
  const Region& region = blocks_.blocks()[at.block].region;
  const std::vector<Region> parts = counted_parts(region, pair.counted);
  if (parts.empty()) return 0;
  Sum& sum = sums_[at.block];
  std::uint64_t grown = 0;
  if (sum.known && changes.count * kMixesPerChange > static_cast<std::size_t>(band.elements)) {
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
  if (changes.count == 0) {
    out.descriptors.push_back(Descriptor{}.word());
    return;
  }
  out.changed += static_cast<std::int64_t>(changes.count);
  if (!pair.counted.empty()) {
    add_increment(out.increments, pair.tensor, increment(band, member, changes, snapshot, kernel));
  }
  Descriptor descriptor = encode({changes.positions.get(), changes.count}, changes.after.get(),
                                 band.elements, itemsize(pair.to), out.payload);
  if (descriptor.kind == Kind::kWhole) {
    const std::int64_t nbytes = band.elements * itemsize(pair.to);
    if (out.whole_inline) {
      append_whole(band.walk, band.members[member].snapshot, pair.to, kernel, out.payload);
      descriptor.nbytes = static_cast<std::uint32_t>(nbytes);
      out.whole_nbytes += nbytes;
    } else {
      out.referred_nbytes += nbytes;
    }
  }
  out.descriptors.push_back(descriptor.word());
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
    for (std::size_t m = 0; m < band.members.size(); ++m) {
      out.scratch[m].reserve(band.elements, static_cast<std::size_t>(itemsize(pair.to)));
      out.scratch[m].count = 0;
    }
    const CompareRun compare_run = kernel.compare(pair.from, pair.to, band.dense);
    std::uint32_t position = 0;
    Odometer at(band.walk);
    for (std::int64_t i = 0; i < band.walk.runs; ++i, at.next()) {
      for (std::size_t m = 0; m < band.members.size(); ++m) {
        compare_run(band.run(band.members[m], at), position, out.scratch[m]);
      }
      position += static_cast<std::uint32_t>(band.walk.run.extent);
    }
    for (std::size_t m = 0; m < band.members.size(); ++m) {
      finish(band, m, out.scratch[m], snapshot, out, kernel);
    }
  }
}

void Diff::copy(std::size_t chunk, const std::vector<const std::byte*>& live, std::byte* snapshot,
                std::vector<std::uint64_t>& sums, const DiffKernel& kernel) {
  for (const auto& [first, last] : bands(chunk)) {
    const Band band = this->band(first, last, live, snapshot);
    const Pair& pair = *band.pair;
    const bool dense = band.dense && kernel.name != reshard::kNaive;
    const reshard::Row row = reshard::choose_row(
        pair.from, pair.to, dense ? reshard::RowKind::kDense : reshard::RowKind::kStrided,
        *kernel.rows);
    for (const Band::Member& member : band.members) {
      Odometer at(band.walk);
      for (std::int64_t i = 0; i < band.walk.runs; ++i, at.next()) {
        const Run run = band.run(member, at);
        row(run.count, run.live, run.live_stride, run.snapshot, run.snapshot_stride);
      }
      const Region& region = blocks_.blocks()[member.block].region;
      sums_[member.block] = {sum_parts(pair, counted_parts(region, pair.counted), snapshot, kernel),
                             true};
      sums[pair.tensor] += sums_[member.block].value;
    }
  }
}

std::vector<std::pair<std::size_t, std::size_t>> Diff::bands(std::size_t chunk) const {
  const auto begins = blocks_.band_begins();
  std::vector<std::pair<std::size_t, std::size_t>> found;
  auto at = std::lower_bound(begins.begin(), begins.end(), blocks_.chunk_begins()[chunk]);
  for (; *at < blocks_.chunk_begins()[chunk + 1]; ++at) found.emplace_back(*at, at[1]);
  return found;
}

std::vector<std::string_view> diff_implementations() {
  std::vector<std::string_view> names;
  for (const DiffKernel& kernel : diff_kernels()) names.push_back(kernel.name);
  return names;
}

}  // namespace kimisys::broadcast
