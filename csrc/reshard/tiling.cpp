#include "reshard/tiling.h"

#include <algorithm>
#include <utility>

namespace kimisys::reshard {
namespace {

// A piece seen from inside its first `depth` axes.
struct View {
  const Piece* piece;
  std::size_t depth;
  std::int64_t offset;
};

// Where the last byte of the views ends, if no two of them share a byte and none reaches below
// `begin`. May give nothing for views that are apart: it follows pieces that repeat with the same
// period and leaves the rest to the list of runs.
std::optional<std::int64_t> end_if_apart(std::vector<View> views, std::int64_t begin) {
  std::sort(views.begin(), views.end(),
            [](const View& a, const View& b) { return a.offset < b.offset; });
  std::int64_t position = begin;
  for (std::size_t i = 0; i < views.size();) {
    const Piece& piece = *views[i].piece;
    if (views[i].offset < position) return std::nullopt;
    position = views[i].offset;
    if (views[i].depth == piece.axes.size()) {
      position += piece.run;
      ++i;
      continue;
    }
    // All that lies in the first period must repeat like this piece, and stay within that period.
    const Piece::Axis axis = piece.axes[views[i].depth];
    std::vector<View> period;
    for (; i < views.size() && views[i].offset < position + axis.stride; ++i) {
      const View& view = views[i];
      if (view.depth == view.piece->axes.size() || view.piece->axes[view.depth] != axis) {
        return std::nullopt;
      }
      period.push_back({view.piece, view.depth + 1, view.offset});
    }
    if (period.empty()) return std::nullopt;  // a stride of 0
    const auto end = end_if_apart(std::move(period), position);
    if (!end || *end > position + axis.stride) return std::nullopt;
    position = *end + (axis.extent - 1) * axis.stride;
  }
  return position;
}

std::optional<std::int64_t> end_if_apart(const std::vector<Piece>& pieces) {
  std::vector<View> views;
  views.reserve(pieces.size());
  for (const Piece& piece : pieces) views.push_back({&piece, 0, piece.offset});
  return end_if_apart(std::move(views), 0);
}

// Of pieces that share no byte: how many bytes they have.
std::int64_t total_bytes(const std::vector<Piece>& pieces) {
  std::int64_t sum = 0;
  for (const Piece& piece : pieces) {
    std::int64_t bytes = piece.run;
    for (const Piece::Axis& axis : piece.axes) bytes *= axis.extent;
    sum += bytes;
  }
  return sum;
}

std::int64_t end_of(const Piece& piece) {
  std::int64_t end = piece.offset + piece.run;
  for (const Piece::Axis& axis : piece.axes) end += (axis.extent - 1) * axis.stride;
  return end;
}

struct Run {
  std::int64_t begin;
  std::int64_t end;
  std::size_t owner;
};

void list_runs(const Piece& piece, std::size_t depth, std::int64_t offset, std::vector<Run>& runs) {
  if (depth == piece.axes.size()) {
    runs.push_back({offset, offset + piece.run, piece.owner});
    return;
  }
  const Piece::Axis& axis = piece.axes[depth];
  for (std::int64_t i = 0; i < axis.extent; ++i) {
    list_runs(piece, depth + 1, offset + i * axis.stride, runs);
  }
}

// The first bytes that two runs share, or, if the runs are to tile [0, nbytes), that none has.
std::optional<Violation> first_violation(std::vector<Run> runs,
                                         std::optional<std::int64_t> nbytes) {
  using Kind = Violation::Kind;
  std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.begin < b.begin; });
  std::int64_t position = 0;
  std::optional<std::size_t> last;
  for (const Run& run : runs) {
    if (nbytes && run.begin > position) {
      return Violation{Kind::kHole, position, run.begin, last, run.owner};
    }
    if (run.begin < position) {
      return Violation{Kind::kOverlap, run.begin, std::min(position, run.end), last, run.owner};
    }
    position = run.end;
    last = run.owner;
  }
  if (nbytes && position < *nbytes) {
    return Violation{Kind::kHole, position, *nbytes, last, std::nullopt};
  }
  return std::nullopt;
}

// kMaxRuns + 1 if there are more.
std::int64_t count_runs(const std::vector<Piece>& pieces) {
  std::int64_t sum = 0;
  for (const Piece& piece : pieces) {
    std::int64_t runs = 1;
    for (const Piece::Axis& axis : piece.axes) {
      if (axis.extent > kMaxRuns / runs) return kMaxRuns + 1;
      runs *= axis.extent;
    }
    sum += runs;
    if (sum > kMaxRuns) break;
  }
  return sum;
}

// A repeated axis of stride 0 writes the same bytes again; found before its runs are listed.
std::optional<Violation> self_overlap(const std::vector<Piece>& pieces) {
  for (const Piece& piece : pieces) {
    if (!piece.axes.empty() && piece.axes.back().stride == 0) {
      return Violation{Violation::Kind::kOverlap, piece.offset, piece.offset + piece.run,
                       piece.owner, piece.owner};
    }
  }
  return std::nullopt;
}

std::optional<Violation> violation_of_runs(const std::vector<Piece>& pieces,
                                           std::optional<std::int64_t> nbytes) {
  if (auto violation = self_overlap(pieces)) return violation;
  if (count_runs(pieces) > kMaxRuns) {
    std::int64_t end = nbytes.value_or(0);
    for (const Piece& piece : pieces) end = std::max(end, end_of(piece));
    return Violation{Violation::Kind::kUnknown, 0, end, std::nullopt, std::nullopt};
  }
  std::vector<Run> runs;
  for (const Piece& piece : pieces) list_runs(piece, 0, piece.offset, runs);
  return first_violation(std::move(runs), nbytes);
}

}  // namespace

Piece make_piece(std::int64_t offset, const Dims& extent, const Dims& byte_strides,
                 std::int64_t itemsize, std::size_t owner) {
  Piece piece{offset, {}, itemsize, owner};
  for (std::size_t d = 0; d < extent.size(); ++d) {
    if (extent[d] != 1) piece.axes.push_back({extent[d], byte_strides[d]});
  }
  std::stable_sort(piece.axes.begin(), piece.axes.end(),
                   [](const auto& a, const auto& b) { return a.stride > b.stride; });
  while (!piece.axes.empty() && piece.axes.back().stride == piece.run) {
    piece.run *= piece.axes.back().extent;
    piece.axes.pop_back();
  }
  for (std::size_t d = piece.axes.size(); d-- > 1;) {
    Piece::Axis& outer = piece.axes[d - 1];
    const Piece::Axis& inner = piece.axes[d];
    if (outer.stride != inner.stride * inner.extent) continue;
    outer = {outer.extent * inner.extent, inner.stride};
    piece.axes.erase(piece.axes.begin() + static_cast<std::ptrdiff_t>(d));
  }
  return piece;
}

std::optional<Violation> check_tiling(const std::vector<Piece>& pieces, std::int64_t nbytes) {
  const auto end = end_if_apart(pieces);
  if (end && *end <= nbytes && total_bytes(pieces) == nbytes) return std::nullopt;
  return violation_of_runs(pieces, nbytes);
}

std::optional<Violation> check_apart(const std::vector<Piece>& pieces) {
  if (end_if_apart(pieces)) return std::nullopt;
  return violation_of_runs(pieces, std::nullopt);
}

}  // namespace kimisys::reshard
