#include "reshard/execute.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <string_view>

#include "base/error.h"
#include "reshard/box.h"
#include "reshard/kernels.h"

namespace kimisys::reshard {
namespace {

constexpr auto kBad = ErrorCode::kBufferMismatch;

constexpr std::string_view kNaive = "naive";

// The rows of the implementation asked for; null for the naive one.
const RowSet* choose(const std::string& asked) {
  std::string name = asked;
  if (name.empty()) {
    const char* forced = std::getenv("KIMISYS_RESHARD_IMPLEMENTATION");
    if (forced != nullptr) name = forced;
  }
  if (name.empty()) return &row_sets().front();
  if (name == kNaive) return nullptr;
  for (const RowSet& known : row_sets()) {
    if (known.name == name) return &known;
  }
  std::string list;
  for (const std::string& known : implementations()) {
    list.append(list.empty() ? "" : ", ").append(known);
  }
  fail(ErrorCode::kLayout, "unknown reshard implementation '", name,
       "' (argument or KIMISYS_RESHARD_IMPLEMENTATION); this machine has ", list);
}

// Fills what execute() needs of one side's memory: null data where a buffer is not needed.
std::vector<Memory> resolve(const Layout& layout, const Memories& given,
                            const std::vector<bool>& needed, const char* side) {
  const std::vector<Buffer>& buffers = layout.buffers();
  std::vector<Memory> found(buffers.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (!needed[i]) continue;
    KIMISYS_CHECK(i < given.size() && given[i].has_value(), kBad, side, " buffer '",
                  buffers[i].name, "' of rank ", buffers[i].rank,
                  " is missing; pass it under the key (rank, name)");
    KIMISYS_CHECK(given[i]->nbytes == buffers[i].nbytes, kBad, side, " buffer '", buffers[i].name,
                  "' of rank ", buffers[i].rank, " has ", given[i]->nbytes,
                  " bytes where the layout says ", buffers[i].nbytes);
    found[i] = *given[i];
  }
  return found;
}

// Buffers of the destination that are asked for: all of them, or those that a share writes into.
std::vector<bool> written_buffers(const Plan& plan) {
  const Layout& to = plan.destination();
  std::vector<bool> is_written(to.buffers().size(), !plan.share_of());
  for (const Step& step : plan.steps()) is_written[to.buffer_of(step.destination_fragment)] = true;
  if (!plan.fills_padding()) return is_written;
  for (std::size_t i = 0; i < to.padding().size(); ++i) {
    if (to.padding()[i].nbytes > 0) is_written[to.buffer_of_padding(i)] = true;
  }
  return is_written;
}

void check_writable(const Layout& layout, const std::vector<Memory>& memory,
                    const std::vector<bool>& is_written) {
  for (std::size_t i = 0; i < memory.size(); ++i) {
    KIMISYS_CHECK(!is_written[i] || memory[i].writable, kBad, "destination buffer '",
                  layout.buffers()[i].name, "' of rank ", layout.buffers()[i].rank,
                  " is read-only; pass memory that may be written");
  }
}

struct Interval {
  const std::byte* begin;
  const std::byte* end;
  const Buffer* buffer;
  bool is_destination;
};

void add_intervals(const Layout& layout, const std::vector<Memory>& memory, bool is_destination,
                   std::vector<Interval>& intervals) {
  for (std::size_t i = 0; i < memory.size(); ++i) {
    if (memory[i].nbytes == 0) continue;
    intervals.push_back(
        {memory[i].data, memory[i].data + memory[i].nbytes, &layout.buffers()[i], is_destination});
  }
}

void check_no_overlap(std::vector<Interval> intervals) {
  const std::less<const std::byte*> before;
  std::sort(intervals.begin(), intervals.end(),
            [before](const Interval& a, const Interval& b) { return before(a.begin, b.begin); });
  // The interval that reaches furthest so far, of each kind. Sources may share memory.
  const Interval* source = nullptr;
  const Interval* destination = nullptr;
  for (const Interval& it : intervals) {
    const auto check = [&](const Interval* other) {
      if (other == nullptr || !before(it.begin, other->end)) return;
      fail(kBad, it.is_destination ? "destination" : "source", " buffer '", it.buffer->name,
           "' of rank ", it.buffer->rank, " overlaps the memory of ",
           other->is_destination ? "destination" : "source", " buffer '", other->buffer->name,
           "' of rank ", other->buffer->rank, "; copy in place is not supported");
    };
    check(destination);
    if (it.is_destination) check(source);
    const Interval*& furthest = it.is_destination ? destination : source;
    if (furthest == nullptr || before(furthest->end, it.end)) furthest = &it;
  }
}

DType dtype_of(const Layout& layout, std::size_t fragment) {
  return layout.tensors()[layout.tensor_of(fragment)].dtype;
}

Block make_block(const Plan& plan, const Step& step, const std::byte* source,
                 std::byte* destination) {
  const Fragment& from = plan.source().fragments()[step.source_fragment];
  const Fragment& to = plan.destination().fragments()[step.destination_fragment];
  Block block{.source = source + byte_offset_at(from, step.region.offset),
              .destination = destination + byte_offset_at(to, step.region.offset),
              .dims = step.region.extent.size(),
              .source_dtype = dtype_of(plan.source(), step.source_fragment),
              .destination_dtype = dtype_of(plan.destination(), step.destination_fragment)};
  for (std::size_t d = 0; d < block.dims; ++d) {
    block.axes[d] = {step.region.extent[d], from.byte_strides[d], to.byte_strides[d]};
  }
  return block;
}

}  // namespace

std::vector<std::string> implementations() {
  std::vector<std::string> names;
  for (const RowSet& set : row_sets()) names.emplace_back(set.name);
  names.emplace_back(kNaive);
  return names;
}

struct Execution::Blocks {
  const RowSet* rows;  // null: the naive implementation
  std::vector<Block> blocks;
  std::vector<Blank> blanks;
  std::optional<Work> work;
};

Execution::~Execution() = default;
Execution::Execution(Execution&&) noexcept = default;

Execution::Execution(const Plan& plan, const Memories& sources, const Memories& destinations,
                     const ExecuteOptions& options) {
  const Layout& from = plan.source();
  const Layout& to = plan.destination();
  auto made = std::make_unique<Blocks>();
  made->rows = choose(options.implementation);

  std::vector<bool> is_read(from.buffers().size(), false);
  for (const Step& step : plan.steps()) is_read[from.buffer_of(step.source_fragment)] = true;
  const std::vector<bool> is_written = written_buffers(plan);
  const auto source_memory = resolve(from, sources, is_read, "source");
  const auto destination_memory = resolve(to, destinations, is_written, "destination");
  check_writable(to, destination_memory, is_written);
  std::vector<Interval> intervals;
  add_intervals(from, source_memory, false, intervals);
  add_intervals(to, destination_memory, true, intervals);
  check_no_overlap(std::move(intervals));

  made->blocks.reserve(plan.steps().size());
  for (const Step& step : plan.steps()) {
    made->blocks.push_back(
        make_block(plan, step, source_memory[from.buffer_of(step.source_fragment)].data,
                   destination_memory[to.buffer_of(step.destination_fragment)].data));
  }
  const std::size_t paddings = plan.fills_padding() ? to.padding().size() : 0;
  for (std::size_t i = 0; i < paddings; ++i) {
    const Padding& padding = to.padding()[i];
    if (padding.nbytes == 0) continue;
    made->blanks.push_back(
        {destination_memory[to.buffer_of_padding(i)].data + padding.byte_offset, padding.nbytes});
  }
  if (made->rows != nullptr) {
    made->work.emplace(std::move(made->blocks), std::move(made->blanks), options.threads);
  }
  blocks_ = std::move(made);
}

void Execution::run() const {
  if (blocks_->work) return blocks_->work->run(*blocks_->rows);
  execute_naive(blocks_->blocks, blocks_->blanks);
}

void execute(const Plan& plan, const Memories& sources, const Memories& destinations,
             const ExecuteOptions& options) {
  Execution(plan, sources, destinations, options).run();
}

}  // namespace kimisys::reshard
