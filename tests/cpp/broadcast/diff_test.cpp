#include "broadcast/diff.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "base/error.h"
#include "base/thread_pool.h"
#include "broadcast/code.h"
#include "broadcast/digest.h"
#include "expect.h"
#include "reshard/sample.h"

namespace kimisys::broadcast {
namespace {

using reshard::Dims;
using reshard::Layout;
using reshard::Memories;
using reshard::Memory;
using test::expect_error;

using Bytes = std::vector<std::byte>;

Layout dense(DType dtype, const Dims& shape) {
  const reshard::Tensor tensor{"t", dtype, shape};
  return Layout({tensor}, {{0, "m", tensor.elements() * itemsize(dtype)}},
                {{"t",
                  {Dims(shape.size(), 0), shape},
                  0,
                  "m",
                  0,
                  reshard::test::dense_strides(shape, itemsize(dtype))}});
}

Memories memory_of(Bytes& bytes) {
  return {Memory{bytes.data(), static_cast<std::int64_t>(bytes.size()), true}};
}

// A live tensor and its snapshot, each in memory of its own size: a sanitizer sees what is touched
// beyond.
struct World {
  World(DType from, DType to, const Dims& shape)
      : live_layout(dense(from, shape)),
        layout(dense(to, shape)),
        diff(live_layout, layout, layout),
        live(static_cast<std::size_t>(live_layout.buffers()[0].nbytes)),
        snapshot(static_cast<std::size_t>(layout.buffers()[0].nbytes)) {
    for (std::byte& byte : live) byte = static_cast<std::byte>(random());
  }

  void copy(const DiffKernel& kernel) {
    digests.assign(1, 0);
    for (std::size_t c = 0; c < diff.blocks().chunk_count(); ++c) {
      diff.copy(c, diff.live_memory(memory_of(live)), snapshot.data(), digests, kernel);
    }
  }

  // All chunks; returns payload after payload and extends the digest.
  Bytes compare(const DiffKernel& kernel, std::size_t threads) {
    const auto memory = diff.live_memory(memory_of(live));
    std::vector<ChunkDelta> deltas(diff.blocks().chunk_count());
    parallel_for(deltas.size(), threads, [&](std::size_t c) {
      diff.compare(c, memory, snapshot.data(), deltas[c], kernel);
    });
    Bytes all;
    changed = 0;
    for (const ChunkDelta& delta : deltas) {
      all.insert(all.end(), delta.payload.begin(), delta.payload.end());
      for (const auto& [tensor, grown] : delta.increments) digests[tensor] += grown;
      changed += delta.changed;
    }
    return all;
  }

  // Other bits in about so many of the elements.
  void change(double density) {
    const auto width = static_cast<std::size_t>(live_layout.fragments()[0].byte_strides.back());
    std::bernoulli_distribution hit(density);
    for (std::size_t i = 0; i + width <= live.size(); i += width) {
      if (hit(random)) live[i + width - 1] ^= std::byte{1};
    }
  }

  std::mt19937 random{1};
  Layout live_layout;
  Layout layout;
  Diff diff;
  Bytes live;
  Bytes snapshot;
  std::vector<std::uint64_t> digests;
  std::int64_t changed = 0;
};

TEST_CASE("every kernel writes what the naive one writes, within the memory that it was given") {
  const std::pair<DType, DType> kinds[] = {
      {DType::kUInt8, DType::kUInt8},      {DType::kBFloat16, DType::kBFloat16},
      {DType::kFloat32, DType::kFloat32},  {DType::kInt64, DType::kInt64},
      {DType::kFloat32, DType::kBFloat16}, {DType::kBFloat16, DType::kFloat32}};
  for (const auto& [from, to] : kinds) {
    for (const Dims& shape : {Dims{1}, Dims{33}, Dims{1000}, Dims{3, 1025}, Dims{40, 2048}}) {
      World naive(from, to, shape);
      std::vector<World> others;
      std::vector<const DiffKernel*> kernels;
      for (const DiffKernel& kernel : diff_kernels()) {
        others.emplace_back(from, to, shape);
        kernels.push_back(&kernel);
        others.back().copy(kernel);
      }
      naive.copy(diff_kernel("naive"));
      for (const double density : {0.0, 0.003, 0.2, 1.0, 0.01}) {
        naive.change(density);
        const Bytes expected = naive.compare(diff_kernel("naive"), 1);
        CHECK(naive.digests == digest(naive.layout, memory_of(naive.snapshot), 1));
        for (std::size_t k = 0; k < others.size(); ++k) {
          CAPTURE(kernels[k]->name);
          others[k].change(density);
          CHECK(others[k].compare(*kernels[k], 2) == expected);
          CHECK(others[k].snapshot == naive.snapshot);
          CHECK(others[k].digests == naive.digests);
          CHECK(others[k].changed == naive.changed);
        }
      }
    }
  }
}

TEST_CASE("whole blocks are referred to where the caller wants that") {
  World world(DType::kBFloat16, DType::kBFloat16, {600, 1024});
  const DiffKernel& kernel = diff_kernel();
  world.copy(kernel);
  world.change(1.0);
  ChunkDelta delta;
  delta.whole_inline = false;
  world.diff.compare(0, world.diff.live_memory(memory_of(world.live)), world.snapshot.data(), delta,
                     kernel);
  CHECK(delta.payload.empty());
  CHECK(delta.referred_nbytes == 600 * 1024 * 2);
  CHECK(delta.whole_nbytes == 0);
  for (const std::uint32_t word : delta.descriptors) {
    CHECK(Descriptor::of(word) == Descriptor{Kind::kWhole, 0, 0});
  }
  CHECK(world.snapshot == world.live);
}

TEST_CASE("pairs that do not match and memory that does not fit are refused by name") {
  const Layout a = dense(DType::kBFloat16, {4, 4});
  expect_error(ErrorCode::kLayout, {"'t'", "[0:4, 0:5]", "snapshot_layout"}, [&] {
    const Layout wider = dense(DType::kBFloat16, {4, 5});
    Diff(a, wider, wider);
  });
  expect_error(ErrorCode::kLayout, {"cannot be published"}, [&] {
    const Layout whole = dense(DType::kInt32, {4, 4});
    Diff(a, whole, whole);
  });
  const Diff diff(a, a, a);
  Bytes small(8);
  expect_error(ErrorCode::kBufferMismatch, {"'m'", "8 bytes", "32"},
               [&] { diff.live_memory(memory_of(small)); });
  expect_error(ErrorCode::kLayout, {"'imaginary'", "generic, naive"},
               [] { diff_kernel("imaginary"); });
}

}  // namespace
}  // namespace kimisys::broadcast
