#include "broadcast/snapshot.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <limits>
#include <new>

#include "base/error.h"

namespace kimisys::broadcast {
namespace {

using Word = std::atomic<std::uint64_t>;
static_assert(Word::is_always_lock_free && sizeof(Word) == 8);

constexpr std::uint64_t kMagic = 0x504e535359534d4bU;  // "KMSYSSNP" in memory
constexpr std::uint64_t kFormat = 1;
constexpr std::uint64_t kNoVersion = std::numeric_limits<std::uint64_t>::max();
constexpr std::size_t kAlignment = 4096;

// The first bytes of the file. Everything but the two words is written once, before sealing.
struct Header {
  std::uint64_t magic;
  std::uint64_t format;
  std::uint64_t nbytes;
  std::uint64_t digest_count;
  Word sequence;
  Word version;
};

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

// The size may not change under a reader: touching a lost page would kill it.
constexpr int kSizeSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
// Nor may anyone but the creator, through the map it has, write.
constexpr int kSeals = kSizeSeals | F_SEAL_FUTURE_WRITE;

// Callers keep digest_count below 2^60.
constexpr std::size_t data_offset(std::size_t digest_count) {
  const std::size_t end = sizeof(Header) + digest_count * sizeof(std::uint64_t);
  return (end + kAlignment - 1) / kAlignment * kAlignment;
}

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

Header& header_of(const Mapping& mapping) { return *static_cast<Header*>(mapping.get().address); }

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
  KIMISYS_CHECK(static_cast<std::size_t>(status.st_size) >= sizeof(Header), ErrorCode::kSnapshot,
                "a snapshot of ", status.st_size, " bytes is shorter than its header");
  return static_cast<std::size_t>(status.st_size);
}

void check_header(std::uint64_t magic, std::uint64_t format, std::uint64_t nbytes,
                  std::uint64_t digest_count, std::size_t size) {
  KIMISYS_CHECK(magic == kMagic, ErrorCode::kSnapshot,
                "the shared memory does not begin with the mark of a kimisys snapshot");
  KIMISYS_CHECK(format == kFormat, ErrorCode::kSnapshot, "the snapshot has format ", format,
                ", this build reads format ", kFormat, "; install the same kimisys on both sides");
  KIMISYS_CHECK(digest_count <= size / sizeof(std::uint64_t) && data_offset(digest_count) <= size &&
                    size - data_offset(digest_count) == nbytes,
                ErrorCode::kSnapshot, "the snapshot's header promises ", digest_count,
                " digests and ", nbytes, " bytes, but the memory has ", size, " bytes in all");
}

}  // namespace

Snapshot Snapshot::create(std::size_t nbytes, std::size_t digest_count) {
  constexpr std::size_t kLimit = std::size_t{1} << 60U;
  KIMISYS_CHECK(nbytes < kLimit && digest_count < kLimit / 8, ErrorCode::kSnapshot,
                "a snapshot of ", nbytes, " bytes and ", digest_count, " digests is too large");
  const std::size_t size = data_offset(digest_count) + nbytes;
  Snapshot snapshot;
  snapshot.descriptor_ =
      FileDescriptor(::memfd_create("kimisys-snapshot", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  const int descriptor = snapshot.descriptor_.get();
  if (descriptor < 0) fail_system("cannot create a snapshot", errno);
  allocate(descriptor, size);
  snapshot.mapping_ = map(descriptor, size, PROT_READ | PROT_WRITE);
  new (snapshot.mapping_.get().address)
      Header{kMagic, kFormat, nbytes, digest_count, 0, kNoVersion};
  if (::fcntl(descriptor, F_ADD_SEALS, kSeals) != 0) fail_system("cannot seal a snapshot", errno);
  auto* begin = static_cast<std::byte*>(snapshot.mapping_.get().address);
  snapshot.data_ = {begin + data_offset(digest_count), nbytes};
  snapshot.digest_count_ = digest_count;
  snapshot.writable_ = true;
  return snapshot;
}

Snapshot Snapshot::open(int descriptor) {
  Snapshot snapshot;
  snapshot.descriptor_ = FileDescriptor(::fcntl(descriptor, F_DUPFD_CLOEXEC, 0));
  if (!snapshot.descriptor_) fail_system("cannot take over a snapshot's descriptor", errno);
  const std::size_t size = sealed_size(snapshot.descriptor_.get());
  snapshot.mapping_ = map(snapshot.descriptor_.get(), size, PROT_READ);
  // Read once: what is checked here is what is used later, whatever the peer writes there.
  const Header& header = header_of(snapshot.mapping_);
  const std::uint64_t nbytes = header.nbytes;
  const std::uint64_t digest_count = header.digest_count;
  check_header(header.magic, header.format, nbytes, digest_count, size);
  auto* begin = static_cast<std::byte*>(snapshot.mapping_.get().address);
  snapshot.data_ = {begin + data_offset(digest_count), nbytes};
  snapshot.digest_count_ = digest_count;
  return snapshot;
}

std::uint64_t* Snapshot::digests() const {
  return reinterpret_cast<std::uint64_t*>(static_cast<std::byte*>(mapping_.get().address) +
                                          sizeof(Header));
}

void Snapshot::begin(std::uint64_t version) {
  KIMISYS_CHECK(
      writable_, ErrorCode::kSnapshot,
      "this snapshot was opened from a peer and is read-only; only its creator publishes");
  Header& header = header_of(mapping_);
  const std::uint64_t last = header.version.load(std::memory_order_relaxed);
  KIMISYS_CHECK(version != kNoVersion && (last == kNoVersion || version > last),
                ErrorCode::kVersion, "cannot publish version ", version, " after version ", last,
                "; versions strictly increase");
  // From even to odd, or from the odd number of a failed write to the next odd number.
  const std::uint64_t sequence = header.sequence.load(std::memory_order_relaxed);
  intact_ = !is_odd(sequence);
  header.sequence.store(sequence + (intact_ ? 1 : 2), std::memory_order_relaxed);
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
  KIMISYS_CHECK(digests.size() == digest_count_, ErrorCode::kSnapshot, "the snapshot holds ",
                digest_count_, " digests, got ", digests.size());
  Header& header = header_of(mapping_);
  // Readers copy the digests while this goes on and then discard them: atomic words make that race
  // a defined one.
  for (std::size_t i = 0; i < digests.size(); ++i) {
    std::atomic_ref(this->digests()[i]).store(digests[i], std::memory_order_relaxed);
  }
  // The release store below does not wait for streaming stores. Those of this thread are completed
  // here; other threads complete theirs before they report their work done, as commit() demands:
  // the executor ends each batch by finish_streaming().
  std::atomic_thread_fence(std::memory_order_seq_cst);
  header.version.store(next_version_, std::memory_order_relaxed);
  header.sequence.store(header.sequence.load(std::memory_order_relaxed) + 1,
                        std::memory_order_release);
  writing_ = false;
}

void Snapshot::abort() {
  check_writing();
  writing_ = false;
  // After a failed write the bytes are of no version: the sequence stays odd.
  if (!intact_) return;
  Header& header = header_of(mapping_);
  header.sequence.store(header.sequence.load(std::memory_order_relaxed) + 1,
                        std::memory_order_release);
}

Published Snapshot::published() const {
  const Header& header = header_of(mapping_);
  Published result;
  result.sequence = header.sequence.load(std::memory_order_acquire);
  KIMISYS_CHECK(!is_odd(result.sequence), ErrorCode::kSnapshot,
                "the snapshot is being written, or its publisher failed or died while writing; "
                "pull after the next successful publish");
  result.version = header.version.load(std::memory_order_relaxed);
  result.digests.resize(digest_count_);
  for (std::size_t i = 0; i < digest_count_; ++i) {
    result.digests[i] = std::atomic_ref(digests()[i]).load(std::memory_order_relaxed);
  }
  confirm(result);
  KIMISYS_CHECK(result.version != kNoVersion, ErrorCode::kVersion,
                "the snapshot has no version yet; pull after the first publish");
  return result;
}

void Snapshot::confirm(const Published& published) const {
  // Orders every read before it ahead of the second look at the sequence.
  std::atomic_thread_fence(std::memory_order_acquire);
  const std::uint64_t now = header_of(mapping_).sequence.load(std::memory_order_relaxed);
  KIMISYS_CHECK(
      now == published.sequence, ErrorCode::kSnapshot, "version ", published.version,
      " was overwritten while it was read; what was read may be torn: discard it and pull "
      "again after the publish");
}

}  // namespace kimisys::broadcast
