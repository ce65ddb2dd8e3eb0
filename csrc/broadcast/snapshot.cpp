#include "broadcast/snapshot.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "broadcast/words.h"

namespace kimisys::broadcast {
namespace {

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

// The size may not change under a reader: touching a lost page would kill it.
constexpr int kSizeSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
// Nor may anyone but the creator, through the map it has, write.
constexpr int kSeals = kSizeSeals | F_SEAL_FUTURE_WRITE;

[[noreturn]] void fail_system(const char* what, int error) {
  fail(ErrorCode::kSnapshot, what, ": ", std::strerror(error));
}

// Allocates the whole file now: a shortage is an error here rather than a SIGBUS in the middle of a
// publish. Some kernels let a signal interrupt the call and undo what it did so far; in small steps
// a program with a timer still gets on.
void allocate(int descriptor, std::size_t size) {
  constexpr std::size_t kStep = std::size_t{16} << 20U;
  for (std::size_t begin = 0; begin < size; begin += kStep) {
    const auto step = static_cast<off_t>(std::min(kStep, size - begin));
    int error = EINTR;
    while (error == EINTR) error = ::posix_fallocate(descriptor, static_cast<off_t>(begin), step);
    if (error != 0) fail_system("cannot allocate the memory of a snapshot", error);
  }
}

Mapping map(int descriptor, std::size_t nbytes, int protection) {
  void* address = ::mmap(nullptr, nbytes, protection, MAP_SHARED, descriptor, 0);
  if (address == MAP_FAILED) fail_system("cannot map a snapshot", errno);
  return Mapping({address, nbytes});
}

bool is_odd(std::uint64_t sequence) { return (sequence & 1U) != 0; }

// Size of the file behind a foreign descriptor, once it is known to be a memfd of sealed size.
std::size_t sealed_size(int descriptor) {
  struct stat status{};
  if (::fstat(descriptor, &status) != 0) fail_system("cannot inspect a snapshot", errno);
  const int seals = ::fcntl(descriptor, F_GET_SEALS);
  KIMISYS_CHECK(S_ISREG(status.st_mode) && seals >= 0 && (seals & kSizeSeals) == kSizeSeals,
                ErrorCode::kSnapshot,
                "the descriptor is not a memory file of sealed size; it does not come from a "
                "kimisys publisher");
  KIMISYS_CHECK(static_cast<std::size_t>(status.st_size) >= kHeaderNbytes, ErrorCode::kSnapshot,
                "a snapshot of ", status.st_size, " bytes is shorter than its header");
  return static_cast<std::size_t>(status.st_size);
}

}  // namespace

Snapshot Snapshot::create(std::size_t data_nbytes, std::size_t digest_count,
                          std::size_t log_nbytes) {
  Snapshot snapshot;
  snapshot.parts_ = Parts::of(data_nbytes, digest_count, log_nbytes);
  const Parts& parts = snapshot.parts_;
  snapshot.descriptor_ =
      FileDescriptor(::memfd_create("kimisys-snapshot", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  const int descriptor = snapshot.descriptor_.get();
  if (descriptor < 0) fail_system("cannot create a snapshot", errno);
  allocate(descriptor, parts.nbytes);
  snapshot.mapping_ = map(descriptor, parts.nbytes, PROT_READ | PROT_WRITE);
  parts.write({snapshot.address(), kHeaderNbytes});
  if (::fcntl(descriptor, F_ADD_SEALS, kSeals) != 0) fail_system("cannot seal a snapshot", errno);
  snapshot.writable_ = true;
  snapshot.log_ = std::make_unique<Log>(
      std::span(snapshot.address() + parts.log_offset, parts.log_nbytes), snapshot.words());
  return snapshot;
}

Snapshot Snapshot::open(int descriptor) {
  Snapshot snapshot;
  snapshot.descriptor_ = FileDescriptor(::fcntl(descriptor, F_DUPFD_CLOEXEC, 0));
  if (!snapshot.descriptor_) fail_system("cannot take over a snapshot's descriptor", errno);
  const std::size_t size = sealed_size(snapshot.descriptor_.get());
  snapshot.mapping_ = map(snapshot.descriptor_.get(), size, PROT_READ);
  // Read once: what is checked here is what is used later, whatever the peer writes there.
  snapshot.parts_ = Parts::parse({snapshot.address(), kHeaderNbytes}, size);
  return snapshot;
}

Words& Snapshot::words() const { return *reinterpret_cast<Words*>(address() + kWordsOffset); }

std::byte* Snapshot::digest_at(std::size_t index) const {
  return address() + parts_.digest_offset + index * kWord;
}

std::span<const std::byte> Snapshot::memory() const { return {address(), parts_.nbytes}; }

std::span<std::byte> Snapshot::data() const {
  return {address() + parts_.data_offset, parts_.data_nbytes};
}

void Snapshot::read(std::span<const Range> ranges, std::span<std::byte> into) const {
  const auto inside = [](std::int64_t offset, std::int64_t nbytes, std::size_t size) {
    const auto limit = static_cast<std::int64_t>(size);
    return offset >= 0 && nbytes >= 0 && nbytes <= limit && offset <= limit - nbytes;
  };
  for (const Range& range : ranges) {
    KIMISYS_CHECK(inside(range.offset, range.nbytes, parts_.nbytes) &&
                      inside(range.into, range.nbytes, into.size()),
                  ErrorCode::kSnapshot, "cannot read ", range.nbytes, " bytes from byte ",
                  range.offset, " of a snapshot of ", parts_.nbytes, " bytes to byte ", range.into,
                  " of ", into.size());
  }
  // Orders what was read before, of data() too, before these reads: they may be the look at
  // sequence or tail that confirms it. And these before every later read, which may confirm them.
  std::atomic_thread_fence(std::memory_order_acquire);
  for (const Range& range : ranges) {
    load_bytes(address(), static_cast<std::size_t>(range.offset), into.data() + range.into,
               static_cast<std::size_t>(range.nbytes));
  }
  std::atomic_thread_fence(std::memory_order_acquire);
}

Log& Snapshot::log() const {
  check_writable();
  return *log_;
}

bool Snapshot::complete() const {
  return version() != kNone && !is_odd(words().sequence.load(std::memory_order_relaxed));
}

std::uint64_t Snapshot::version() const { return words().version.load(std::memory_order_relaxed); }

std::vector<std::uint64_t> Snapshot::digests() const {
  std::vector<std::uint64_t> values(digest_count());
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = load_word(digest_at(i));
  return values;
}

void Snapshot::check_writable() const {
  KIMISYS_CHECK(
      writable_, ErrorCode::kSnapshot,
      "this snapshot was opened from a peer and is read-only; only its creator publishes");
}

void Snapshot::begin(std::uint64_t version) {
  check_writable();
  Words& words = this->words();
  const std::uint64_t last = words.version.load(std::memory_order_relaxed);
  KIMISYS_CHECK(version != kNone && (last == kNone || version > last), ErrorCode::kVersion,
                "cannot publish version ", version, " after version ", last,
                "; versions strictly increase");
  // From even to odd, or from the odd number of a failed write to the next odd number.
  const std::uint64_t sequence = words.sequence.load(std::memory_order_relaxed);
  intact_ = !is_odd(sequence);
  words.sequence.store(sequence + (intact_ ? 1 : 2), std::memory_order_relaxed);
  // Orders the odd sequence before every data byte that follows. A release fence would not do: the
  // executor writes with streaming stores, and on x86 only a full fence (mfence or a locked
  // instruction, as the compiler likes) keeps those from passing an earlier plain store.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  writing_ = true;
  next_version_ = version;
}

void Snapshot::check_writing() const {
  KIMISYS_CHECK(writing_, ErrorCode::kSnapshot, "no publish is under way; call begin() first");
}

void Snapshot::commit(std::span<const std::uint64_t> digests) {
  check_writing();
  KIMISYS_CHECK(digests.size() == digest_count(), ErrorCode::kSnapshot, "the snapshot holds ",
                digest_count(), " digests, got ", digests.size());
  Words& words = this->words();
  // Readers copy the digests while this goes on and then discard them: atomic words make that race
  // a defined one.
  for (std::size_t i = 0; i < digests.size(); ++i) {
    store_word(digest_at(i), digests[i]);
  }
  // The release store below does not wait for streaming stores. Those of this thread are completed
  // here; other threads complete theirs before they report their work done, as commit() demands:
  // the executor ends each batch by finish_streaming().
  std::atomic_thread_fence(std::memory_order_seq_cst);
  words.version.store(next_version_, std::memory_order_relaxed);
  words.sequence.store(words.sequence.load(std::memory_order_relaxed) + 1,
                       std::memory_order_release);
  writing_ = false;
}

void Snapshot::abort() {
  check_writing();
  writing_ = false;
  // After a failed write the bytes are of no version: the sequence stays odd.
  if (!intact_) return;
  Words& words = this->words();
  words.sequence.store(words.sequence.load(std::memory_order_relaxed) + 1,
                       std::memory_order_release);
}

Published Snapshot::published() const {
  Words& words = this->words();
  Published result;
  result.sequence = words.sequence.load(std::memory_order_acquire);
  KIMISYS_CHECK(!is_odd(result.sequence), ErrorCode::kSnapshot,
                "the snapshot is being written, or its publisher failed or died while writing; "
                "pull after the next successful publish");
  result.version = words.version.load(std::memory_order_relaxed);
  result.digests = digests();
  confirm(result);
  KIMISYS_CHECK(result.version != kNone, ErrorCode::kVersion,
                "the snapshot has no version yet; pull after the first publish");
  return result;
}

void Snapshot::confirm(const Published& published) const {
  // Orders every read before it ahead of the second look at the sequence.
  std::atomic_thread_fence(std::memory_order_acquire);
  const std::uint64_t now = words().sequence.load(std::memory_order_relaxed);
  KIMISYS_CHECK(
      now == published.sequence, ErrorCode::kSnapshot, "version ", published.version,
      " was overwritten while it was read; what was read may be torn: discard it and pull "
      "again after the publish");
}

}  // namespace kimisys::broadcast
