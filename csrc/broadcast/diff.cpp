#include "broadcast/diff.h"

#include <algorithm>
#include <map>
#include <string_view>
#include <tuple>

#include "base/error.h"
#include "broadcast/diff_band.h"
#include "broadcast/mix.h"
#include "reshard/box.h"
#include "reshard/memory.h"

namespace kimisys::broadcast {

using reshard::Dims;
using reshard::Fragment;
using reshard::Layout;
using reshard::Region;
using reshard::Tensor;

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
