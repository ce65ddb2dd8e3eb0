// The proof of a plan. It shares no code with the planner: it looks only at the two layouts and the
// steps, so that a planner's mistake cannot prove itself.
//
// 1. Every step copies one region that both its fragments hold, inside both buffers.
// 2. Within each destination fragment the steps' boxes are disjoint and their volumes add up to the
//    fragment's: so each of its elements is written exactly once.
//    The share of one source rank may leave elements to others, but not write one twice.
// 3. Within each destination buffer, fragments and padding tile [0, nbytes) exactly.
//    Of the share of one source rank, the fragments and padding that it writes share no byte.
#include <algorithm>
#include <optional>
#include <sstream>
#include <string>
#include <utility>

#include "base/error.h"
#include "base/lists.h"
#include "reshard/plan.h"
#include "reshard/tiling.h"

namespace kimisys::reshard {
namespace {

constexpr auto kBad = ErrorCode::kPlan;

bool inside(const Region& inner, const Region& outer) {
  if (inner.offset.size() != outer.offset.size() || inner.extent.size() != outer.extent.size()) {
    return false;
  }
  for (std::size_t d = 0; d < inner.offset.size(); ++d) {
    if (inner.extent[d] < 1 || inner.offset[d] < outer.offset[d] ||
        inner.offset[d] - outer.offset[d] > outer.extent[d] - inner.extent[d]) {
      return false;
    }
  }
  return true;
}

bool disjoint(const Region& a, const Region& b) {
  for (std::size_t d = 0; d < a.offset.size(); ++d) {
    if (a.offset[d] >= b.offset[d] + b.extent[d] || b.offset[d] >= a.offset[d] + a.extent[d]) {
      return true;
    }
  }
  return false;
}

// First and one-past-last byte that reading or writing `region` of `fragment` touches.
std::pair<std::int64_t, std::int64_t> byte_range(const Fragment& fragment, const Region& region,
                                                 std::int64_t item) {
  std::int64_t begin = fragment.byte_offset;
  std::int64_t end = fragment.byte_offset + item;
  for (std::size_t d = 0; d < region.offset.size(); ++d) {
    const std::int64_t first = region.offset[d] - fragment.region.offset[d];
    begin += first * fragment.byte_strides[d];
    end += (first + region.extent[d] - 1) * fragment.byte_strides[d];
  }
  return {begin, end};
}

class Prover {
 public:
  Prover(const Layout& source, const Layout& destination, const std::vector<Step>& steps,
         std::optional<std::int64_t> share_of)
      : source_(source), destination_(destination), steps_(steps), share_of_(share_of) {}

  Proof run() {
    if (share_of_) check_share();
    for (const Step& step : steps_) check_step(step);
    const Lists steps_to(destination_.fragments().size(), steps_.size(), [this](std::size_t i) {
      return static_cast<std::int64_t>(steps_[i].destination_fragment);
    });
    Proof proof;
    proof.copies = static_cast<std::int64_t>(steps_.size());
    std::vector<const Region*> boxes;
    for (std::size_t i = 0; i < steps_to.size(); ++i) {
      boxes.clear();
      for (const std::size_t step : steps_to[i]) boxes.push_back(&steps_[step].region);
      proof.copied_bytes += check_fragment(i, boxes);
    }
    check_buffers(steps_to);
    if (fills_padding()) proof.padding_bytes = padding_bytes();
    if (share_of_) {
      proof.destination_bytes = proof.copied_bytes + proof.padding_bytes;
      return proof;
    }
    for (const Buffer& buffer : destination_.buffers()) proof.destination_bytes += buffer.nbytes;
    KIMISYS_CHECK(proof.destination_bytes == proof.copied_bytes + proof.padding_bytes, kBad,
                  "the plan writes ", proof.copied_bytes, " + ", proof.padding_bytes,
                  " bytes where the destination ranks ", ranks_text(destination_.ranks()), " have ",
                  proof.destination_bytes);
    return proof;
  }

 private:
  void check_share() const {
    const std::vector<std::int64_t> ranks = source_.ranks();
    KIMISYS_CHECK(std::binary_search(ranks.begin(), ranks.end(), *share_of_), kBad,
                  "the plan is said to be the share of source rank ", *share_of_,
                  ", which the source does not have; its ranks are ", ranks_text(ranks));
  }

  bool fills_padding() const { return !share_of_ || *share_of_ == source_.ranks().front(); }

  std::int64_t padding_bytes() const {
    std::int64_t sum = 0;
    for (const Padding& padding : destination_.padding()) sum += padding.nbytes;
    return sum;
  }

  void check_step(const Step& step) const {
    KIMISYS_CHECK(step.source_fragment < source_.fragments().size() &&
                      step.destination_fragment < destination_.fragments().size(),
                  kBad, "a step names fragment ", step.source_fragment, " of the source or ",
                  step.destination_fragment, " of the destination, which does not exist");
    const Fragment& from = source_.fragments()[step.source_fragment];
    const Fragment& to = destination_.fragments()[step.destination_fragment];
    KIMISYS_CHECK(!share_of_ || *share_of_ == from.rank, kBad, "the share of source rank ",
                  share_of_.value_or(0), " reads from source rank ", from.rank);
    const Tensor& held = source_.tensors()[source_.tensor_of(step.source_fragment)];
    const Tensor& wanted =
        destination_.tensors()[destination_.tensor_of(step.destination_fragment)];
    KIMISYS_CHECK(held.name == wanted.name && held.shape == wanted.shape, kBad, "tensor '",
                  wanted.name, "' ", to_string(wanted.shape), " of destination rank ", to.rank,
                  " would be written from tensor '", held.name, "' ", to_string(held.shape),
                  " of source rank ", from.rank);
    KIMISYS_CHECK(can_cast(held.dtype, wanted.dtype), kBad, "tensor '", wanted.name, "' region ",
                  step.region, " from source rank ", from.rank, " to destination rank ", to.rank,
                  " would need a cast from ", dtype_name(held.dtype), " to ",
                  dtype_name(wanted.dtype));
    check_side(step, from, held, source_.buffers()[source_.buffer_of(step.source_fragment)],
               "source");
    check_side(step, to, wanted,
               destination_.buffers()[destination_.buffer_of(step.destination_fragment)],
               "destination");
  }

  static void check_side(const Step& step, const Fragment& fragment, const Tensor& tensor,
                         const Buffer& buffer, const char* side) {
    KIMISYS_CHECK(inside(step.region, fragment.region), kBad, "tensor '", tensor.name, "' region ",
                  step.region, " is not what ", side, " rank ", fragment.rank,
                  " holds there: its fragment is ", fragment.region);
    const auto [begin, end] = byte_range(fragment, step.region, itemsize(tensor.dtype));
    KIMISYS_CHECK(begin >= 0 && end <= buffer.nbytes, kBad, "tensor '", tensor.name, "' region ",
                  step.region, " touches bytes [", begin, ":", end, ") of buffer '", buffer.name,
                  "' of ", side, " rank ", buffer.rank, ", which has ", buffer.nbytes, " bytes");
  }

  // Returns the bytes written into the fragment.
  std::int64_t check_fragment(std::size_t index, std::vector<const Region*>& boxes) const {
    const Fragment& fragment = destination_.fragments()[index];
    check_disjoint(fragment, boxes);
    std::int64_t written = 0;  // disjoint boxes inside the fragment cannot overflow it
    for (const Region* box : boxes) written += box->elements();
    const std::int64_t wanted = fragment.region.elements();
    KIMISYS_CHECK(written == wanted || share_of_, kBad, "tensor '", fragment.tensor, "' region ",
                  fragment.region, " on destination rank ", fragment.rank, " has ", wanted,
                  " elements, of which the plan writes ", written,
                  "; the rest has no source. Source ranks are ", ranks_text(source_.ranks()));
    return written * itemsize(destination_.tensors()[destination_.tensor_of(index)].dtype);
  }

  void check_disjoint(const Fragment& fragment, std::vector<const Region*>& boxes) const {
    if (boxes.size() < 2) return;
    if (fragment.region.offset.empty()) report_twice(fragment, *boxes[0]);
    // Sweep along the axis on which the boxes start at the most places, so that few are alive at
    // once.
    const std::size_t axis = sweep_axis(boxes);
    std::sort(boxes.begin(), boxes.end(), [axis](const Region* a, const Region* b) {
      return a->offset[axis] < b->offset[axis];
    });
    std::vector<const Region*> alive;
    for (const Region* box : boxes) {
      std::erase_if(alive, [&](const Region* other) {
        return other->offset[axis] + other->extent[axis] <= box->offset[axis];
      });
      for (const Region* other : alive) {
        if (!disjoint(*box, *other)) report_twice(fragment, *box);
      }
      alive.push_back(box);
    }
  }

  static std::size_t sweep_axis(const std::vector<const Region*>& boxes) {
    std::size_t best = 0;
    std::size_t most = 0;
    for (std::size_t d = 0; d < boxes.front()->offset.size(); ++d) {
      std::vector<std::int64_t> starts;
      for (const Region* box : boxes) starts.push_back(box->offset[d]);
      std::sort(starts.begin(), starts.end());
      starts.erase(std::unique(starts.begin(), starts.end()), starts.end());
      if (starts.size() > most) {
        most = starts.size();
        best = d;
      }
    }
    return best;
  }

  [[noreturn]] void report_twice(const Fragment& fragment, const Region& box) const {
    std::vector<std::int64_t> ranks;
    for (const Step& step : steps_) {
      if (&destination_.fragments()[step.destination_fragment] != &fragment) continue;
      if (disjoint(step.region, box)) continue;
      ranks.push_back(source_.fragments()[step.source_fragment].rank);
    }
    fail(kBad, "tensor '", fragment.tensor, "' region ", box, " on destination rank ",
         fragment.rank, " would be written more than once, from source ranks ", ranks_text(ranks));
  }

  void check_buffers(const Lists& steps_to) const {
    const std::vector<std::vector<Piece>> pieces = written_pieces(steps_to);
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      const Buffer& buffer = destination_.buffers()[i];
      const auto violation =
          share_of_ ? check_apart(pieces[i]) : check_tiling(pieces[i], buffer.nbytes);
      if (violation) report(buffer, *violation);
    }
  }

  // What is written of each buffer: by a share, only the fragments that its steps name.
  std::vector<std::vector<Piece>> written_pieces(const Lists& steps_to) const {
    std::vector<std::vector<Piece>> pieces(destination_.buffers().size());
    const std::size_t count = destination_.fragments().size();
    for (std::size_t i = 0; i < count; ++i) {
      const Fragment& fragment = destination_.fragments()[i];
      if (fragment.region.empty() || (share_of_ && steps_to[i].empty())) continue;
      const DType dtype = destination_.tensors()[destination_.tensor_of(i)].dtype;
      pieces[destination_.buffer_of(i)].push_back(make_piece(
          fragment.byte_offset, fragment.region.extent, fragment.byte_strides, itemsize(dtype), i));
    }
    if (!fills_padding()) return pieces;
    // Paddings are owners too: they are numbered after the fragments.
    for (std::size_t i = 0; i < destination_.padding().size(); ++i) {
      const Padding& padding = destination_.padding()[i];
      if (padding.nbytes == 0) continue;
      pieces[destination_.buffer_of_padding(i)].push_back(
          make_piece(padding.byte_offset, {}, {}, padding.nbytes, count + i));
    }
    return pieces;
  }

  std::string owner_text(const std::optional<std::size_t>& owner) const {
    if (!owner) return "the end of the buffer";
    const std::size_t count = destination_.fragments().size();
    if (*owner >= count) return "padding";
    const Fragment& fragment = destination_.fragments()[*owner];
    std::ostringstream text;
    text << "tensor '" << fragment.tensor << "' region " << fragment.region;
    return text.str();
  }

  [[noreturn]] void report(const Buffer& buffer, const Violation& violation) const {
    std::ostringstream where;
    where << "bytes [" << violation.begin << ":" << violation.end << ") of buffer '" << buffer.name
          << "' on destination rank " << buffer.rank;
    KIMISYS_CHECK(violation.kind != Violation::Kind::kUnknown, kBad, "the fragments that write ",
                  where.str(), " follow no regular pattern and have more than ", kMaxRuns,
                  " runs; no layout of a framework does. Mend their strides");
    if (violation.kind == Violation::Kind::kOverlap) {
      fail(kBad, where.str(), " would be written twice: by ", owner_text(violation.before),
           " and by ", owner_text(violation.after),
           ". Two fragments may not share destination bytes; mend offsets or strides");
    }
    fail(kBad, where.str(), " would not be written: they lie between ",
         violation.before ? owner_text(violation.before) : "the start of the buffer", " and ",
         owner_text(violation.after), ". Add the missing fragment, or declare them as Padding");
  }

  const Layout& source_;
  const Layout& destination_;
  const std::vector<Step>& steps_;
  const std::optional<std::int64_t> share_of_;
};

}  // namespace

Proof prove(const Layout& source, const Layout& destination, const std::vector<Step>& steps,
            std::optional<std::int64_t> share_of) {
  return Prover(source, destination, steps, share_of).run();
}

}  // namespace kimisys::reshard
