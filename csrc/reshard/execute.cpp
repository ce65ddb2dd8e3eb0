#include "reshard/execute.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <string_view>

#include "base/error.h"
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

struct Interval {
  const std::byte* begin;
  const std::byte* end;
  const Buffer* buffer;
  bool is_destination;
};

// The memory of each buffer of a layout, in the order of its buffer table; null where not needed.
std::vector<Memory> resolve(const Layout& layout, const MemoryMap& map,
                            const std::vector<bool>& needed, const char* side) {
  std::vector<Memory> found(layout.buffers().size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (!needed[i]) continue;
    const Buffer& buffer = layout.buffers()[i];
    const auto entry = map.find({buffer.rank, buffer.name});
    KIMISYS_CHECK(entry != map.end(), kBad, side, " buffer '", buffer.name, "' of rank ",
                  buffer.rank, " is missing; pass it under the key (rank, name)");
    KIMISYS_CHECK(entry->second.nbytes == buffer.nbytes, kBad, side, " buffer '", buffer.name,
                  "' of rank ", buffer.rank, " has ", entry->second.nbytes,
                  " bytes where the layout says ", buffer.nbytes);
    found[i] = entry->second;
  }
  return found;
}

// Buffers of the destination that are asked for: all of them, or those that a share writes into.
std::vector<bool> written_buffers(const Plan& plan) {
  const Layout& to = plan.destination();
  std::vector<bool> is_written(to.buffers().size(), !plan.share_of());
  for (const Step& step : plan.steps()) is_written[to.buffer_of(step.destination_fragment)] = true;
  for (std::size_t i = 0; plan.fills_padding() && i < to.padding().size(); ++i) {
    is_written[to.buffer_of_padding(i)] = true;
  }
  return is_written;
}

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

Block make_block(const Copy& copy, const std::byte* source, std::byte* destination) {
  Block block{.source = source + copy.source_offset,
              .destination = destination + copy.destination_offset,
              .dims = copy.region.extent.size(),
              .source_dtype = copy.source_dtype,
              .destination_dtype = copy.destination_dtype};
  for (std::size_t d = 0; d < block.dims; ++d) {
    block.axes[d] = {copy.region.extent[d], copy.source_strides[d], copy.destination_strides[d]};
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

void execute(const Plan& plan, const MemoryMap& sources, const MemoryMap& destinations,
             const ExecuteOptions& options) {
  const Layout& from = plan.source();
  const Layout& to = plan.destination();
  const RowSet* rows = choose(options.implementation);

  std::vector<bool> is_read(from.buffers().size(), false);
  for (const Step& step : plan.steps()) is_read[from.buffer_of(step.source_fragment)] = true;
  const std::vector<bool> is_written = written_buffers(plan);
  const auto source_memory = resolve(from, sources, is_read, "source");
  const auto destination_memory = resolve(to, destinations, is_written, "destination");
  for (std::size_t i = 0; i < destination_memory.size(); ++i) {
    KIMISYS_CHECK(!is_written[i] || destination_memory[i].writable, kBad, "destination buffer '",
                  to.buffers()[i].name, "' of rank ", to.buffers()[i].rank,
                  " is read-only; pass memory that may be written");
  }
  std::vector<Interval> intervals;
  add_intervals(from, source_memory, false, intervals);
  add_intervals(to, destination_memory, true, intervals);
  check_no_overlap(std::move(intervals));

  std::vector<Block> blocks;
  blocks.reserve(plan.steps().size());
  for (std::size_t i = 0; i < plan.steps().size(); ++i) {
    const Step& step = plan.steps()[i];
    blocks.push_back(make_block(plan.copy(i),
                                source_memory[from.buffer_of(step.source_fragment)].data,
                                destination_memory[to.buffer_of(step.destination_fragment)].data));
  }
  std::vector<Blank> blanks;
  for (std::size_t i = 0; i < to.padding().size(); ++i) {
    const Padding& padding = to.padding()[i];
    if (padding.nbytes == 0 || !plan.fills_padding()) continue;
    blanks.push_back(
        {destination_memory[to.buffer_of_padding(i)].data + padding.byte_offset, padding.nbytes});
  }
  if (rows == nullptr) return execute_naive(blocks, blanks);
  execute_native(blocks, blanks, options.threads, *rows);
}

}  // namespace kimisys::reshard
