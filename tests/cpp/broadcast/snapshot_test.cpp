#include "broadcast/snapshot.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <thread>

#include "base/error.h"
#include "expect.h"

namespace kimisys::broadcast {
namespace {

using test::expect_error;

void publish(Snapshot& snapshot, std::uint64_t version, std::byte fill) {
  snapshot.begin(version);
  std::memset(snapshot.data().data(), std::to_integer<int>(fill), snapshot.data().size());
  snapshot.commit(std::array<std::uint64_t, 2>{version, version + 1});
}

// A sealed memory file with these first words, as a hostile or foreign peer might send.
FileDescriptor forged(const std::vector<std::uint64_t>& words, off_t size,
                      int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) {
  FileDescriptor file(::memfd_create("forged", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  REQUIRE(::ftruncate(file.get(), size) == 0);
  const auto count = static_cast<ssize_t>(words.size() * sizeof(std::uint64_t));
  if (count > 0)
    REQUIRE(::pwrite(file.get(), words.data(), static_cast<std::size_t>(count), 0) == count);
  if (seals != 0) REQUIRE(::fcntl(file.get(), F_ADD_SEALS, seals) == 0);
  return file;
}

std::vector<std::uint64_t> header_words(const Snapshot& snapshot) {
  std::vector<std::uint64_t> words(9);
  REQUIRE(::pread(snapshot.descriptor(), words.data(), 72, 0) == 72);
  return words;
}

TEST_CASE("what is committed is what a reader sees") {
  Snapshot writer = Snapshot::create(1000, 2);
  const Snapshot reader = Snapshot::open(writer.descriptor());
  CHECK(reader.data().size() == 1000);
  CHECK(reader.digest_count() == 2);
  CHECK_FALSE(reader.writable());
  CHECK(reinterpret_cast<std::uintptr_t>(reader.data().data()) % 4096 == 0);
  expect_error(ErrorCode::kVersion, {"no version yet"}, [&] { reader.published(); });

  publish(writer, 7, std::byte{42});
  const Published published = reader.published();
  CHECK(published.version == 7);
  CHECK(published.digests == std::vector<std::uint64_t>{7, 8});
  CHECK(reader.data()[999] == std::byte{42});
  reader.confirm(published);

  publish(writer, 9, std::byte{43});
  expect_error(ErrorCode::kSnapshot, {"version 7 was overwritten"},
               [&] { reader.confirm(published); });
  CHECK(reader.published().version == 9);
}

TEST_CASE("a publish under way, or one that never ended, is unreadable until the next commit") {
  Snapshot writer = Snapshot::create(16, 2);
  publish(writer, 1, std::byte{1});
  writer.begin(2);
  expect_error(ErrorCode::kSnapshot, {"is being written", "died"}, [&] { writer.published(); });
  writer.data()[0] = std::byte{9};  // and the writer gives up here
  writer.begin(3);
  expect_error(ErrorCode::kSnapshot, {}, [&] { writer.published(); });
  writer.abort();  // nothing was written since begin(3), but the bytes are still torn
  expect_error(ErrorCode::kSnapshot, {}, [&] { writer.published(); });
  publish(writer, 3, std::byte{3});
  CHECK(writer.published().version == 3);
}

TEST_CASE("abort brings the last version back") {
  Snapshot writer = Snapshot::create(16, 2);
  writer.begin(1);
  writer.abort();
  expect_error(ErrorCode::kVersion, {}, [&] { writer.published(); });
  publish(writer, 1, std::byte{1});
  const Published before = writer.published();
  writer.begin(2);
  writer.abort();
  CHECK(writer.published().version == 1);
  expect_error(ErrorCode::kSnapshot, {}, [&] { writer.confirm(before); });
}

TEST_CASE("versions strictly increase, and a refused one changes nothing") {
  Snapshot writer = Snapshot::create(16, 2);
  publish(writer, 5, std::byte{5});
  for (const std::uint64_t version : {std::uint64_t{5}, std::uint64_t{4}, ~std::uint64_t{0}}) {
    expect_error(ErrorCode::kVersion, {"after version 5"}, [&] { writer.begin(version); });
    CHECK(writer.published().version == 5);
  }
}

TEST_CASE("misuse is refused") {
  Snapshot writer = Snapshot::create(16, 2);
  Snapshot reader = Snapshot::open(writer.descriptor());
  expect_error(ErrorCode::kSnapshot, {}, [&] { reader.begin(1); });
  expect_error(ErrorCode::kSnapshot, {}, [&] { writer.commit({}); });
  expect_error(ErrorCode::kSnapshot, {}, [&] { writer.abort(); });
  writer.begin(1);
  expect_error(ErrorCode::kSnapshot, {}, [&] { writer.commit({}); });
  expect_error(ErrorCode::kSnapshot, {}, [] { Snapshot::create(std::size_t{1} << 62U, 0); });
  expect_error(ErrorCode::kSnapshot, {}, [] { Snapshot::open(-1); });
}

TEST_CASE("signals during the allocation do not fail it") {
  struct sigaction before{};
  struct sigaction ignoring{};
  ignoring.sa_handler = [](int) {};  // without SA_RESTART, so that system calls are interrupted
  REQUIRE(::sigaction(SIGUSR1, &ignoring, &before) == 0);
  const pthread_t target = ::pthread_self();
  std::thread sender([target] {
    for (int i = 0; i < 100; ++i) {
      ::pthread_kill(target, SIGUSR1);
      std::this_thread::sleep_for(std::chrono::microseconds(500));
    }
  });
  std::size_t nbytes = 0;
  try {
    nbytes = Snapshot::create(std::size_t{128} << 20U, 0).data().size();
  } catch (const Error& error) {
    CHECK_MESSAGE(false, error.what());
  }
  sender.join();
  ::sigaction(SIGUSR1, &before, nullptr);
  CHECK(nbytes == std::size_t{128} << 20U);
}

TEST_CASE("nobody can change the size, nor write through the descriptor") {
  const Snapshot writer = Snapshot::create(8192, 0);
  CHECK(::ftruncate(writer.descriptor(), 0) == -1);
  CHECK(::ftruncate(writer.descriptor(), 1 << 20) == -1);
  CHECK(::pwrite(writer.descriptor(), "x", 1, 0) == -1);
  CHECK(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, writer.descriptor(), 0) ==
        MAP_FAILED);
  CHECK(::fcntl(writer.descriptor(), F_ADD_SEALS, F_SEAL_WRITE) == -1);
}

// What a reader made of a snapshot that a writer kept changing under it.
struct Tally {
  std::atomic<int> accepted = 0;
  std::atomic<int> torn = 0;  // accepted, although the words are not all of the published version
};

// Reads until `done`. Every word of the data and every digest carries the version. The test reads
// and writes the data atomically: it is there to be raced for, and the thread sanitizer shall look
// at the library alone.
void read_until(const std::atomic<bool>& done, const Snapshot& snapshot, Tally& tally) {
  auto* words = reinterpret_cast<std::uint64_t*>(snapshot.data().data());
  std::vector<std::uint64_t> seen(snapshot.data().size() / sizeof(std::uint64_t));
  while (!done) {
    try {
      const Published published = snapshot.published();
      for (std::size_t i = 0; i < seen.size(); ++i)
        seen[i] = std::atomic_ref(words[i]).load(std::memory_order_relaxed);
      snapshot.confirm(published);
      const auto of_version = [&](std::uint64_t word) { return word == published.version; };
      if (!std::ranges::all_of(seen, of_version) ||
          !std::ranges::all_of(published.digests, of_version))
        ++tally.torn;
      ++tally.accepted;
    } catch (const Error&) {
      std::this_thread::yield();  // refused, as it should be in the middle of a write
    }
  }
}

TEST_CASE("readers beside a busy writer accept whole versions only") {
  constexpr std::size_t kWords = 1024;
  constexpr int kWanted = 100;
  Snapshot writer = Snapshot::create(kWords * sizeof(std::uint64_t), 64);
  const Snapshot mapped = Snapshot::open(writer.descriptor());
  Tally same_map;  // the sanitizer knows addresses, and so sees races in the writer's own map alone
  Tally other_map;
  std::atomic<bool> done = false;
  std::thread one([&] { read_until(done, writer, same_map); });
  std::thread two([&] { read_until(done, mapped, other_map); });
  auto* words = reinterpret_cast<std::uint64_t*>(writer.data().data());
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(240);
  std::uint64_t version = 0;
  while ((version < 1000 || same_map.accepted < kWanted || other_map.accepted < kWanted) &&
         std::chrono::steady_clock::now() < deadline) {
    writer.begin(++version);
    for (std::size_t i = 0; i < kWords; ++i)
      std::atomic_ref(words[i]).store(version, std::memory_order_relaxed);
    writer.commit(std::vector<std::uint64_t>(64, version));
    std::this_thread::yield();
  }
  done = true;
  one.join();
  two.join();
  for (const Tally* tally : {&same_map, &other_map}) {
    CHECK(tally->accepted.load() >= kWanted);
    CHECK(tally->torn.load() == 0);
  }
}

TEST_CASE("an empty snapshot and many digests") {
  Snapshot writer = Snapshot::create(0, 2000);
  std::vector<std::uint64_t> digests(2000);
  std::iota(digests.begin(), digests.end(), 1);
  writer.begin(0);
  writer.commit(digests);
  const Snapshot reader = Snapshot::open(writer.descriptor());
  CHECK(reader.published().digests == digests);
  CHECK(reader.data().empty());
}

TEST_CASE("the mapping outlives the writer") {
  auto writer = std::make_unique<Snapshot>(Snapshot::create(4096, 2));
  publish(*writer, 1, std::byte{7});
  const Snapshot reader = Snapshot::open(writer->descriptor());
  writer.reset();
  CHECK(reader.published().version == 1);
  CHECK(reader.data()[4095] == std::byte{7});
}

TEST_CASE("hostile headers are refused") {
  const Snapshot good = Snapshot::create(4096, 3);
  const std::vector<std::uint64_t> words = header_words(good);
  Snapshot::open(forged(words, 8192).get());  // the forgery itself is sound
  const auto refused = [&](std::size_t word, std::uint64_t value, const char* why) {
    std::vector<std::uint64_t> changed = words;
    changed[word] = value;
    expect_error(ErrorCode::kSnapshot, {why}, [&] { Snapshot::open(forged(changed, 8192).get()); });
  };
  refused(0, words[0] ^ 1U, "mark of a kimisys snapshot");
  refused(1, 3, "format 3");
  const std::uint64_t all = ~std::uint64_t{0};
  refused(2, 8193, "promises");  // words 2 to 8: all bytes, then the parts
  for (const std::size_t offset : {3U, 5U, 7U}) {
    for (const std::uint64_t value : {std::uint64_t{0}, words[offset] + 8, all}) {
      refused(offset, value, "promises");
    }
  }
  for (const std::size_t size : {4U, 6U, 8U}) {
    // More than there is, and what wraps around when it is added or multiplied. (A few digests
    // less, or a short log, would lie in the same page.)
    for (const std::uint64_t value :
         {words[size] + 4096, std::uint64_t{1} << 61U, all - 4095, all}) {
      refused(size, value, "promises");
    }
  }
  refused(8, words[8] - 1, "promises");
  expect_error(ErrorCode::kSnapshot, {}, [&] { Snapshot::open(forged(words, 20).get()); });
  expect_error(ErrorCode::kSnapshot, {}, [&] { Snapshot::open(forged({}, 0).get()); });
}

TEST_CASE("ranges are read as they are, or refused") {
  Snapshot writer = Snapshot::create(1001, 2, 100);
  CHECK(writer.parts().log_nbytes == 104);
  publish(writer, 1, std::byte{7});
  for (std::size_t i = 0; i < 1001; ++i) writer.data()[i] = static_cast<std::byte>(i * 7);
  const Snapshot reader = Snapshot::open(writer.descriptor());
  const auto begin = static_cast<std::int64_t>(reader.parts().data_offset);
  std::vector<std::byte> into(64);
  for (std::int64_t offset = 0; offset < 20; ++offset) {
    for (std::int64_t nbytes = 0; nbytes < 30; ++nbytes) {
      std::ranges::fill(into, std::byte{1});
      const std::array<Snapshot::Range, 2> ranges = {
          {{begin + offset, 3, nbytes}, {begin + 1001 - nbytes, 34, nbytes}}};
      reader.read(ranges, into);
      for (std::int64_t i = 0; i < nbytes; ++i) {
        CHECK(into[static_cast<std::size_t>(3 + i)] == static_cast<std::byte>((offset + i) * 7));
        CHECK(into[static_cast<std::size_t>(34 + i)] ==
              static_cast<std::byte>((1001 - nbytes + i) * 7));
      }
      CHECK(into[2] == std::byte{1});
      CHECK(into[static_cast<std::size_t>(3 + nbytes)] == std::byte{1});
      CHECK(into[33] == std::byte{1});
      CHECK(into.back() == std::byte{1});
    }
  }
  const auto most = std::numeric_limits<std::int64_t>::max();
  for (const Snapshot::Range& range : std::vector<Snapshot::Range>{{-1, 0, 1},
                                                                   {0, -1, 1},
                                                                   {0, 0, -1},
                                                                   {0, 1, 64},
                                                                   {begin + 1000, 0, 2},
                                                                   {most, 0, 1},
                                                                   {1, most, 1},
                                                                   {1, 1, most}}) {
    expect_error(ErrorCode::kSnapshot, {"cannot read"}, [&] { reader.read({&range, 1}, into); });
  }
}

TEST_CASE("only sealed memory files are mapped") {
  const std::vector<std::uint64_t> words = header_words(Snapshot::create(4096, 3));
  expect_error(ErrorCode::kSnapshot, {}, [&] { Snapshot::open(forged(words, 8192, 0).get()); });
  expect_error(ErrorCode::kSnapshot, {},
               [&] { Snapshot::open(forged(words, 8192, F_SEAL_GROW | F_SEAL_SEAL).get()); });
  expect_error(ErrorCode::kSnapshot, {},
               [&] { Snapshot::open(forged(words, 8192, F_SEAL_SHRINK | F_SEAL_GROW).get()); });
  std::array<int, 2> ends{};
  REQUIRE(::pipe(ends.data()) == 0);
  const FileDescriptor one(ends[0]);
  const FileDescriptor two(ends[1]);
  expect_error(ErrorCode::kSnapshot, {}, [&] { Snapshot::open(one.get()); });
}

}  // namespace
}  // namespace kimisys::broadcast
