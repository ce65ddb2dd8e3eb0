// Whole blocks, copied and digested in one pass.
#include <algorithm>
#include <utility>

#include "base/error.h"
#include "base/thread_pool.h"
#include "broadcast/mix.h"
#include "broadcast/scatter.h"
#include "broadcast/scatter_boxes.h"
#include "reshard/box.h"
#include "reshard/stream.h"

namespace kimisys::broadcast {
namespace {

using reshard::Dims;
using reshard::Memories;
using reshard::Memory;
using reshard::Region;
using reshard::Tensor;

// Elements that one task of the thread pool lands.
constexpr std::int64_t kTaskElements = std::int64_t{1} << 17;

// A target, or several that lie side by side, of the blocks of one fragment.
struct Piece {
  std::size_t place = 0;  // of one of the blocks
  Target target;
};

// Appends a target to its left neighbour, if that is the right neighbour's continuation at the
// destination too.
bool extend(Piece& left, const Target& right) {
  const std::size_t dims = right.box.extent.size();
  if (dims == 0 || left.target.buffer != right.buffer || left.target.sum != right.sum) return false;
  Region& box = left.target.box;
  for (std::size_t d = 0; d + 1 < dims; ++d) {
    if (box.offset[d] != right.box.offset[d] || box.extent[d] != right.box.extent[d]) return false;
  }
  const std::size_t last = dims - 1;
  if (box.offset[last] + box.extent[last] != right.box.offset[last] ||
      left.target.strides != right.strides ||
      left.target.offset + box.extent[last] * right.strides[last] != right.offset) {
    return false;
  }
  box.extent[last] += right.box.extent[last];
  return true;
}

// The targets of these blocks. The blocks of a band are joined, so that memory is walked in rows of
// the band rather than of each block.
std::vector<Piece> joined(const Targets& targets, const std::vector<std::size_t>& places) {
  std::vector<Piece> pieces;
  std::size_t previous = 0;  // pieces from here on are those of the block before, or joined to them
  for (std::size_t i = 0; i < places.size(); ++i) {
    const bool same_fragment =
        i > 0 && targets.block(places[i]).fragment == targets.block(places[i - 1]).fragment;
    if (!same_fragment) previous = pieces.size();
    const std::size_t before = pieces.size();
    std::size_t kept = before;
    for (const Target& target : targets.of(places[i])) {
      const auto left = std::find_if(pieces.begin() + static_cast<std::ptrdiff_t>(previous),
                                     pieces.begin() + static_cast<std::ptrdiff_t>(before),
                                     [&](Piece& piece) { return extend(piece, target); });
      if (left == pieces.begin() + static_cast<std::ptrdiff_t>(before)) {
        pieces.push_back({places[i], target});
      } else {
        kept = std::min(kept, static_cast<std::size_t>(left - pieces.begin()));
      }
    }
    previous = kept;
  }
  return pieces;
}

// Cuts a piece into boxes of at most kTaskElements, of whole rows where that is possible.
void cut(const Piece& piece, const Tensor& tensor, std::vector<Piece>& boxes) {
  const Region& whole = piece.target.box;
  const std::size_t dims = whole.extent.size();
  Dims step = whole.extent;
  std::int64_t elements = 1;
  for (std::size_t d = dims; d-- > 0; elements *= step[d]) {
    step[d] = std::clamp<std::int64_t>(kTaskElements / elements, 1, step[d]);
  }
  Dims at(dims, 0);
  for (;;) {
    Piece box = piece;
    std::uint64_t index_step = 1;
    for (std::size_t d = dims; d-- > 0; index_step *= static_cast<std::uint64_t>(tensor.shape[d])) {
      box.target.box.offset[d] += at[d];
      box.target.box.extent[d] = std::min(step[d], whole.extent[d] - at[d]);
      box.target.offset += at[d] * piece.target.strides[d];
      box.target.counter += static_cast<std::uint64_t>(at[d]) * index_step * kGolden;
    }
    boxes.push_back(std::move(box));
    std::size_t d = dims;
    for (; d > 0; --d) {
      at[d - 1] += step[d - 1];
      if (at[d - 1] < whole.extent[d - 1]) break;
      at[d - 1] = 0;
    }
    if (d == 0) return;
  }
}

}  // namespace

Sums Scatter::land(std::int64_t rank, std::span<const std::uint32_t> blocks,
                   std::span<const std::byte> image, std::int64_t begin,
                   const Memories& destinations, bool subtract, std::size_t threads) const {
  const Targets& targets = *this->targets(rank);
  const std::vector<std::size_t> places = targets.places(blocks);
  const auto end = begin + static_cast<std::int64_t>(image.size());
  for (const std::size_t place : places) {
    const Range range = targets.span(place);
    KIMISYS_CHECK(range.offset >= begin && range.end() <= end, ErrorCode::kBufferMismatch, "block ",
                  targets.needed()[place], " of trainer rank ", rank, " lies in bytes ",
                  range.offset, " to ", range.end(), " of the snapshot, the image holds ", begin,
                  " to ", end, "; read a window of windows() that has the block");
  }
  const std::vector<Memory> memory = checked(destinations, true);
  std::vector<Piece> boxes;
  for (const Piece& piece : joined(targets, places)) {
    cut(piece, targets.tensor(piece.place), boxes);
  }
  std::vector<std::uint64_t> partial(boxes.size(), 0);
  parallel_for(boxes.size(), threads, [&](std::size_t i) {
    const auto& [place, target] = boxes[i];
    const reshard::Fragment& fragment = targets.fragment(place);
    const std::byte* source =
        image.data() + (reshard::byte_offset_at(fragment, target.box.offset) - begin);
    const bool counts = !sums_[target.sum].rounds.empty();
    const Box box = make_box(targets.tensor(place), target, source, fragment.byte_strides,
                             memory[target.buffer].data, implementation_ != "naive");
    partial[i] = run_box(box, {true, counts, counts && subtract}, implementation_);
    reshard::finish_streaming();
  });
  std::vector<std::uint64_t> by_sum(sums_.size(), 0);
  for (std::size_t i = 0; i < boxes.size(); ++i) by_sum[boxes[i].target.sum] += partial[i];
  return spread(by_sum);
}

void Scatter::fill_padding(const Memories& destinations) const {
  const std::vector<Memory> memory = checked(destinations, true);
  if (!fills_padding_) return;
  for (std::size_t i = 0; i < destination_->padding().size(); ++i) {
    const reshard::Padding& padding = destination_->padding()[i];
    if (padding.nbytes == 0) continue;
    std::fill_n(memory[destination_->buffer_of_padding(i)].data + padding.byte_offset,
                padding.nbytes, std::byte{0});
  }
}

}  // namespace kimisys::broadcast
