#include "broadcast/parts.h"

#include <array>
#include <cstring>
#include <new>

#include "base/error.h"
#include "broadcast/words.h"

namespace kimisys::broadcast {
namespace {

constexpr std::uint64_t kMagic = 0x504e535359534d4bU;  // "KMSYSSNP" in memory
constexpr std::uint64_t kFormat = 2;
constexpr std::size_t kLimit = std::size_t{1} << 60U;
constexpr std::size_t kLine = 64;
constexpr std::size_t kPage = 4096;

// The head of the header, as words: magic, format, then the parts.
using Head = std::array<std::uint64_t, 9>;
static_assert(sizeof(Head) <= kWordsOffset && kWordsOffset + sizeof(Words) <= kHeaderNbytes);

Head head_of(const Parts& parts) {
  return {kMagic,
          kFormat,
          parts.nbytes,
          parts.digest_offset,
          parts.digest_count,
          parts.log_offset,
          parts.log_nbytes,
          parts.data_offset,
          parts.data_nbytes};
}

}  // namespace

Parts Parts::of(std::size_t data_nbytes, std::size_t digest_count, std::size_t log_nbytes) {
  KIMISYS_CHECK(data_nbytes < kLimit && digest_count < kLimit / kWord && log_nbytes < kLimit,
                ErrorCode::kSnapshot, "a snapshot of ", data_nbytes, " bytes, ", digest_count,
                " digests and a log of ", log_nbytes, " bytes is too large");
  Parts parts;
  parts.digest_offset = kHeaderNbytes;
  parts.digest_count = digest_count;
  parts.log_offset = round_up(parts.digest_offset + digest_count * kWord, kLine);
  parts.log_nbytes = round_up(log_nbytes, kWord);
  parts.data_offset = round_up(parts.log_offset + parts.log_nbytes, kPage);
  parts.data_nbytes = data_nbytes;
  parts.nbytes = parts.data_offset + data_nbytes;
  return parts;
}

Parts Parts::parse(std::span<const std::byte> header, std::size_t nbytes) {
  KIMISYS_CHECK(header.size() >= sizeof(Head) && nbytes >= kHeaderNbytes, ErrorCode::kSnapshot,
                "a snapshot of ", nbytes, " bytes is shorter than its header");
  Head head{};
  std::memcpy(head.data(), header.data(), sizeof(head));
  KIMISYS_CHECK(head[0] == kMagic, ErrorCode::kSnapshot,
                "the shared memory does not begin with the mark of a kimisys snapshot");
  KIMISYS_CHECK(head[1] == kFormat, ErrorCode::kSnapshot, "the snapshot has format ", head[1],
                ", this build reads format ", kFormat, "; install the same kimisys on both sides");
  const std::uint64_t digest_count = head[4];
  const std::uint64_t log_nbytes = head[6];
  const std::uint64_t data_nbytes = head[8];
  const bool sound = digest_count <= nbytes && log_nbytes <= nbytes && data_nbytes <= nbytes;
  const Parts parts = sound ? Parts::of(data_nbytes, digest_count, log_nbytes) : Parts{};
  KIMISYS_CHECK(parts.nbytes == nbytes && head_of(parts) == head, ErrorCode::kSnapshot,
                "the snapshot's header promises ", digest_count, " digests, a log of ", log_nbytes,
                " bytes and ", data_nbytes, " bytes of data, but the memory has ", nbytes,
                " bytes in all");
  return parts;
}

void Parts::write(std::span<std::byte> header) const {
  const Head head = head_of(*this);
  std::memcpy(header.data(), head.data(), sizeof(head));
  new (header.data() + kWordsOffset) Words{};
}

}  // namespace kimisys::broadcast
