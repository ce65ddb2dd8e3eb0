#include "broadcast/record.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "base/error.h"
#include "broadcast/mix.h"
#include "broadcast/words.h"

namespace kimisys::broadcast {
namespace {

constexpr std::uint64_t kMagic = 0x4452434552534d4bU;  // "KMSRECRD" in memory
constexpr auto kBad = ErrorCode::kSnapshot;

struct Header {
  std::uint64_t magic;
  std::uint64_t checksum;
  std::uint64_t version;
  std::uint64_t base;
  std::uint64_t previous;
  std::uint64_t nbytes;
  std::uint64_t table_nbytes;
  std::uint64_t payload_nbytes;
  std::uint64_t blocks;
  std::uint64_t chunks;
  std::uint64_t steps;
  std::uint64_t changed;
  std::array<std::uint64_t, 4> zeros;
};
static_assert(sizeof(Header) == kRecordHeaderNbytes && std::endian::native == std::endian::little);

// Of whole words, each at its place: a sum of mixes, so that swapped words show.
std::uint64_t checksum(std::span<const std::byte> bytes) {
  std::uint64_t sum = mix(kMagic, bytes.size());
  for (std::size_t at = 0; at < bytes.size(); at += kWord) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + at, kWord);
    sum += mix((at + 1) * kGolden, fold(word));
  }
  return sum;
}

constexpr std::size_t kChecked = 2 * kWord;  // the checksum covers what follows it

Header load_header(std::span<const std::byte> bytes) {
  KIMISYS_CHECK(bytes.size() >= sizeof(Header), kBad, "a record of ", bytes.size(),
                " bytes is shorter than its header");
  Header header{};
  std::memcpy(&header, bytes.data(), sizeof(header));
  KIMISYS_CHECK(header.magic == kMagic, kBad,
                "the log does not have a record where one is announced; pull in full");
  return header;
}

// Counts first: each is bounded before it is multiplied.
void check_sizes(const Header& h, std::uint64_t log_nbytes) {
  const bool bounded = h.nbytes <= log_nbytes && h.table_nbytes <= h.nbytes &&
                       h.payload_nbytes <= h.nbytes && h.blocks <= h.nbytes &&
                       h.chunks <= h.nbytes && h.steps <= h.nbytes && log_nbytes < kNone / 64;
  KIMISYS_CHECK(bounded && h.table_nbytes % kWord == 0 && h.payload_nbytes % kWord == 0 &&
                    h.nbytes == sizeof(Header) + h.table_nbytes + h.payload_nbytes &&
                    Record::table_nbytes_of(h.chunks, h.steps, h.blocks) <= h.table_nbytes &&
                    h.chunks <= h.blocks,
                kBad, "a record in the log announces ", h.blocks, " blocks, ", h.chunks,
                " chunks and ", h.steps, " tensors in tables of ", h.table_nbytes,
                " bytes, a payload of ", h.payload_nbytes, " bytes and ", h.nbytes,
                " bytes in all, in a log of ", log_nbytes, "; pull in full");
}

// The next count values of the tables.
template <typename T>
std::vector<T> take(std::span<const std::byte>& tables, std::uint64_t count) {
  std::vector<T> values(count);
  if (count > 0) std::memcpy(values.data(), tables.data(), count * sizeof(T));
  tables = tables.subspan(count * sizeof(T));
  return values;
}

template <typename T>
void put(std::byte*& at, const std::vector<T>& values) {
  if (!values.empty()) std::memcpy(at, values.data(), values.size() * sizeof(T));
  at += values.size() * sizeof(T);
}

}  // namespace

std::size_t Record::table_nbytes_of(std::size_t chunks, std::size_t steps, std::size_t blocks) {
  return round_up(8 * chunks + 12 * steps + 4 * blocks, kWord);
}

std::vector<std::byte> Record::write() const {
  std::vector<std::byte> bytes(payload_offset());
  std::vector<std::uint64_t> sums;
  std::vector<std::uint32_t> tensors;
  for (const auto& [tensor, sum] : increments) {
    tensors.push_back(static_cast<std::uint32_t>(tensor));
    sums.push_back(sum);
  }
  std::byte* at = bytes.data() + sizeof(Header);
  put(at, chunk_offsets);
  put(at, sums);
  put(at, tensors);
  put(at, descriptors);
  Header header{kMagic,
                0,
                version,
                base,
                previous,
                nbytes(),
                table_nbytes,
                payload_nbytes,
                descriptors.size(),
                chunk_offsets.size(),
                increments.size(),
                changed,
                {}};
  std::memcpy(bytes.data(), &header, sizeof(header));
  header.checksum = checksum(std::span(bytes).subspan(kChecked));
  std::memcpy(bytes.data(), &header, sizeof(header));
  return bytes;
}

std::size_t Record::parse_header(std::span<const std::byte> bytes, std::uint64_t log_nbytes) {
  const Header header = load_header(bytes);
  check_sizes(header, log_nbytes);
  return sizeof(Header) + header.table_nbytes;
}

Record Record::parse(std::span<const std::byte> bytes) {
  const Header header = load_header(bytes);
  check_sizes(header, header.nbytes);
  KIMISYS_CHECK(bytes.size() == sizeof(Header) + header.table_nbytes, kBad, "a record's header of ",
                sizeof(Header), " bytes and tables of ", header.table_nbytes,
                " bytes were read as ", bytes.size());
  KIMISYS_CHECK(header.checksum == checksum(bytes.subspan(kChecked)), kBad,
                "the checksum of the record of version ", header.version,
                " does not fit its tables: it was damaged on its way or in the log; pull in full");
  Record record;
  record.version = header.version;
  record.base = header.base;
  record.previous = header.previous;
  record.changed = header.changed;
  record.table_nbytes = header.table_nbytes;
  record.payload_nbytes = header.payload_nbytes;
  std::span<const std::byte> tables = bytes.subspan(sizeof(Header));
  record.chunk_offsets = take<std::uint64_t>(tables, header.chunks);
  const auto sums = take<std::uint64_t>(tables, header.steps);
  const auto tensors = take<std::uint32_t>(tables, header.steps);
  record.descriptors = take<std::uint32_t>(tables, header.blocks);
  for (std::size_t i = 0; i < sums.size(); ++i) record.increments.emplace_back(tensors[i], sums[i]);
  const auto zero = [](std::byte byte) { return byte == std::byte{0}; };
  const bool ascending =
      std::ranges::adjacent_find(tensors, std::ranges::greater_equal{}) == tensors.end();
  KIMISYS_CHECK(
      header.version > header.base && header.version != kNone && ascending &&
          std::ranges::all_of(record.chunk_offsets,
                              [&](std::uint64_t at) { return at <= header.payload_nbytes; }) &&
          std::ranges::all_of(header.zeros, [](std::uint64_t word) { return word == 0; }) &&
          std::ranges::all_of(tables, zero),
      kBad, "the record of version ", header.version, " on ", header.base,
      " is not as this build writes them; install the same kimisys on both sides");
  return record;
}

std::vector<std::uint64_t> Record::block_offsets(std::span<const std::size_t> chunk_begins) const {
  KIMISYS_CHECK(!chunk_begins.empty() && chunk_begins.size() - 1 == chunk_offsets.size() &&
                    chunk_begins.back() == descriptors.size(),
                kBad, "the record of version ", version, " has ", descriptors.size(), " blocks in ",
                chunk_offsets.size(),
                " chunks, the snapshot's layout another "
                "number; install the same kimisys on both sides");
  std::vector<std::uint64_t> offsets(descriptors.size());
  for (std::size_t chunk = 0; chunk < chunk_offsets.size(); ++chunk) {
    std::uint64_t at = chunk_offsets[chunk];
    for (std::size_t block = chunk_begins[chunk]; block < chunk_begins[chunk + 1]; ++block) {
      offsets[block] = at;
      at += payload_nbytes_of(descriptors[block]);
      KIMISYS_CHECK(at <= payload_nbytes, kBad, "block ", block, " of the record of version ",
                    version, " ends at byte ", at, " of a payload of ", payload_nbytes,
                    "; pull in full");
    }
  }
  return offsets;
}

}  // namespace kimisys::broadcast
