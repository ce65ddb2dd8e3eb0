#include "broadcast/publish.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <set>
#include <utility>

#include "base/error.h"
#include "base/thread_pool.h"
#include "broadcast/code.h"
#include "reshard/stream.h"

namespace kimisys::broadcast {
namespace {

// Of the log, at most one part in so many goes to blocks that a record holds whole: the rest is for
// those that are worth a delta, so that a chain stays long.
constexpr std::uint64_t kWholePart = 8;

}  // namespace

// What a publish reads, and how.
struct PublisherCore::Source {
  const std::vector<const std::byte*>& live;
  const DiffKernel& kernel;
  std::size_t threads;
  const EachChunk& each_chunk;
};

// The record that a publish writes. Chunks write their own entries of the tables.
struct PublisherCore::Writing {
  Writing(Draft begun, std::uint64_t limit, const Blocks& blocks)
      : draft(std::move(begun)),
        whole_limit(static_cast<std::int64_t>(limit)),
        chunk_offsets(blocks.chunk_count()),
        descriptors(blocks.blocks().size()) {}

  Draft draft;
  std::int64_t whole_limit;  // bytes of whole blocks that the record may hold
  std::atomic<std::int64_t> whole_taken = 0;
  std::vector<std::uint64_t> chunk_offsets;
  std::vector<std::uint32_t> descriptors;
};

// A workspace for as long as a thread is at a chunk.
class PublisherCore::Lease {
 public:
  explicit Lease(PublisherCore& core) : core_(core) {
    const std::lock_guard lock(core.mutex_);
    if (core.free_.empty()) {
      core.free_.reserve(core.spaces_.size() + 1);  // so that giving it back cannot fail
      core.spaces_.push_back(std::make_unique<Workspace>());
      core.spaces_.back()->clear(core.diff_.tensor_count());
      core.free_.push_back(core.spaces_.back().get());
    }
    space_ = core.free_.back();
    core.free_.pop_back();
  }
  ~Lease() {
    const std::lock_guard lock(core_.mutex_);
    core_.free_.push_back(space_);
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  Workspace& operator*() const { return *space_; }

 private:
  PublisherCore& core_;
  Workspace* space_;
};

void PublisherCore::Workspace::clear(std::size_t tensors) {
  sums.assign(tensors, 0);
  increments.clear();
  changed = whole_nbytes = referred_nbytes = 0;
}

PublisherCore::PublisherCore(const reshard::Layout& live_rank, const reshard::Layout& snapshot_rank,
                             const reshard::Layout& counted, std::shared_ptr<Snapshot> memory)
    : memory_(std::move(memory)), diff_(live_rank, snapshot_rank, counted) {
  memory_->log();  // raises where it is read-only
  KIMISYS_CHECK(static_cast<std::int64_t>(memory_->data().size()) == diff_.snapshot_nbytes() &&
                    memory_->digest_count() == diff_.tensor_count(),
                ErrorCode::kSnapshot, "the shared memory has ", memory_->data().size(),
                " bytes of data and ", memory_->digest_count(), " digests, the snapshot layout ",
                diff_.snapshot_nbytes(), " bytes and ", diff_.tensor_count(),
                " tensors; create it with these sizes");
  for (const Block& block : diff_.blocks().blocks()) {
    const auto tensor = snapshot_rank.tensor_of(block.fragment);
    block_nbytes_.push_back(block.region.elements() *
                            itemsize(snapshot_rank.tensors()[tensor].dtype));
  }
  std::set<std::size_t> tensors;
  for (std::size_t i = 0; i < counted.fragments().size(); ++i) tensors.insert(counted.tensor_of(i));
  counted_tensors_ = tensors.size();
}

Publish PublisherCore::publish(std::uint64_t version, const reshard::Memories& live, bool full,
                               std::size_t threads, std::string_view implementation,
                               const EachChunk& each_chunk) {
  const DiffKernel& kernel = diff_kernel(implementation);
  const std::vector<const std::byte*> memory = diff_.live_memory(live);
  const Source source{memory, kernel, threads, each_chunk};
  Publish result;
  result.version = version;
  result.elements = diff_.elements();
  result.nbytes = diff_.nbytes();
  if (!full && memory_->complete()) result.base = memory_->version();
  for (const auto& space : spaces_) space->clear(diff_.tensor_count());

  memory_->begin(version);
  std::optional<Draft> draft;
  if (result.base) {
    const Blocks& blocks = diff_.blocks();
    draft = Draft::begin(memory_->log(), version, *result.base, blocks.chunk_count(),
                         counted_tensors_, blocks.blocks().size());
  }
  if (draft) {
    publish_changes(source, *std::move(draft), result);
  } else {
    publish_all(source, result);
  }
  return result;
}

void PublisherCore::publish_all(const Source& source, Publish& result) {
  each(source, [&](std::size_t chunk, Workspace& space) {
    diff_.copy(chunk, source.live, memory_->data().data(), space.sums, source.kernel);
  });
  std::vector<std::uint64_t> digests(diff_.tensor_count(), 0);
  for (const auto& space : spaces_) {
    for (std::size_t i = 0; i < digests.size(); ++i) digests[i] += space->sums[i];
  }
  memory_->log().restart();
  memory_->commit(digests);
  result.base.reset();
  result.changed = result.elements;
}

void PublisherCore::publish_changes(const Source& source, Draft draft, Publish& result) {
  const Blocks& blocks = diff_.blocks();
  Writing writing(std::move(draft), memory_->log().capacity() / kWholePart, blocks);
  each(source,
       [&](std::size_t chunk, Workspace& space) { compare_chunk(chunk, source, writing, space); });
  std::map<std::size_t, std::uint64_t> steps;
  for (const auto& space : spaces_) {
    for (const auto& [tensor, increment] : space->increments) steps[tensor] += increment;
    result.changed += space->changed;
    result.whole_nbytes += space->whole_nbytes;
    result.referred_nbytes += space->referred_nbytes;
  }
  std::vector<std::uint64_t> digests = memory_->digests();
  for (const auto& [tensor, increment] : steps) digests[tensor] += increment;
  result.record_nbytes = writing.draft.finish(
      std::move(writing.chunk_offsets), {steps.begin(), steps.end()},
      std::move(writing.descriptors), static_cast<std::uint64_t>(result.changed));
  memory_->log().publish(writing.draft.position());
  memory_->commit(digests);
}

void PublisherCore::each(const Source& source,
                         const std::function<void(std::size_t, Workspace&)>& body) {
  parallel_for(diff_.blocks().chunk_count(), source.threads, [&](std::size_t chunk) {
    const Lease lease(*this);
    body(chunk, *lease);
    reshard::finish_streaming();  // what this thread wrote is there before commit() says so
    if (source.each_chunk) source.each_chunk(chunk);
  });
}

void PublisherCore::compare_chunk(std::size_t chunk, const Source& source, Writing& writing,
                                  Workspace& space) {
  ChunkDelta& delta = space.delta;
  delta.whole_inline = writing.whole_taken.load(std::memory_order_relaxed) < writing.whole_limit;
  diff_.compare(chunk, source.live, memory_->data().data(), delta, source.kernel);
  keep_whole(delta, chunk, writing);
  if (!delta.payload.empty()) {
    const auto offset = writing.draft.reserve(delta.payload.size());
    if (offset) {
      writing.draft.append(*offset, delta.payload);
      writing.chunk_offsets[chunk] = *offset;
    } else {
      refer(delta, chunk, true);
    }
  }
  std::ranges::copy(delta.descriptors,
                    writing.descriptors.begin() +
                        static_cast<std::ptrdiff_t>(diff_.blocks().chunk_begins()[chunk]));
  space.increments.insert(space.increments.end(), delta.increments.begin(), delta.increments.end());
  space.changed += delta.changed;
  space.whole_nbytes += delta.whole_nbytes;
  space.referred_nbytes += delta.referred_nbytes;
}

// Whole blocks stay in the record only as long as their part of the log lasts.
void PublisherCore::keep_whole(ChunkDelta& delta, std::size_t chunk, Writing& writing) const {
  if (delta.whole_nbytes == 0) return;
  if (writing.whole_taken.fetch_add(delta.whole_nbytes) + delta.whole_nbytes <=
      writing.whole_limit) {
    return;
  }
  refer(delta, chunk, false);
}

// Takes the payload of the whole blocks, or of all blocks, out of the delta: readers find their
// bits in the snapshot's data.
void PublisherCore::refer(ChunkDelta& delta, std::size_t chunk, bool all) const {
  const std::size_t first = diff_.blocks().chunk_begins()[chunk];
  std::size_t from = 0;
  std::size_t to = 0;
  for (std::size_t i = 0; i < delta.descriptors.size(); ++i) {
    const Descriptor descriptor = Descriptor::of(delta.descriptors[i]);
    if (descriptor.nbytes == 0) continue;  // the same, or referred to already
    if (all || descriptor.kind == Kind::kWhole) {
      delta.descriptors[i] = Descriptor{Kind::kWhole, 0, 0}.word();
      delta.referred_nbytes += block_nbytes_[first + i];
    } else {
      std::memmove(delta.payload.data() + to, delta.payload.data() + from, descriptor.nbytes);
      to += descriptor.nbytes;
    }
    from += descriptor.nbytes;
  }
  delta.payload.resize(to);
  delta.whole_nbytes = 0;
}

}  // namespace kimisys::broadcast
