// The staged changes, block by block: measured, then written.
#include <algorithm>
#include <bit>

#include "base/error.h"
#include "base/thread_pool.h"
#include "broadcast/scatter.h"
#include "broadcast/scatter_boxes.h"
#include "broadcast/scatter_elements.h"
#include "reshard/stream.h"

namespace kimisys::broadcast {
namespace {

using reshard::Dims;
using reshard::Memories;
using reshard::Memory;
using reshard::Region;
using reshard::Tensor;

// One changed block; its targets have the places from `first` on in the list of partial sums.
struct Task {
  const Targets* targets = nullptr;
  const Change* change = nullptr;
  std::size_t first = 0;

  const Block& block() const { return targets->block(change->place); }
  const Tensor& tensor() const { return targets->tensor(change->place); }
  std::int64_t itemsize() const { return kimisys::itemsize(tensor().dtype); }
  std::span<const Target> list() const { return targets->of(change->place); }
};

std::vector<Task> tasks_of(std::span<const Staged* const> staged) {
  std::vector<Task> tasks;
  std::size_t first = 0;
  for (const Staged* each : staged) {
    for (const Change& change : each->changes()) {
      tasks.push_back({each->targets().get(), &change, first});
      first += tasks.back().list().size();
    }
  }
  return tasks;
}

std::size_t targets_in(const std::vector<Task>& tasks) {
  return tasks.empty() ? 0 : tasks.back().first + tasks.back().list().size();
}

// Elements of the whole payload of a block are packed in row-major order.
Box box_of(const Task& task, const Target& target, std::byte* buffer, bool merged) {
  const Region& block = task.block().region;
  Dims strides(block.extent.size());
  std::int64_t stride = task.itemsize();
  std::int64_t offset = 0;
  for (std::size_t d = strides.size(); d-- > 0; stride *= block.extent[d]) {
    strides[d] = stride;
    offset += (target.box.offset[d] - block.offset[d]) * stride;
  }
  return make_box(task.tensor(), target, task.change->payload.data() + offset, strides, buffer,
                  merged);
}

// Positions and values of a block that is not whole; the scratch belongs to the thread.
Changes decoded(const Task& task) {
  thread_local std::vector<std::uint32_t> scratch;
  const Decoded found = decode(task.change->descriptor, task.change->payload,
                               task.block().region.elements(), task.itemsize(), scratch);
  return {found.positions, found.values};
}

const ElementKernel& kernel_named(std::string_view name) {
  const auto kernels = element_kernels();
  return *std::find_if(kernels.begin(), kernels.end(),
                       [&](const ElementKernel& kernel) { return kernel.name == name; });
}

std::size_t width_of(const Task& task) {
  return static_cast<std::size_t>(std::countr_zero(static_cast<std::uint64_t>(task.itemsize())));
}

void measure_block(const Task& task, const ElementKernel& kernel, const std::vector<Sum>& sums,
                   const std::vector<Memory>& memory, std::uint64_t* partial) {
  const bool whole = task.change->descriptor.kind == Kind::kWhole;
  const Changes changes = whole ? Changes{} : decoded(task);
  for (const Target& target : task.list()) {
    std::byte* buffer = memory[target.buffer].data;
    std::uint64_t& sum = *partial++;
    if (sums[target.sum].rounds.empty()) continue;
    if (whole) {
      sum = run_box(box_of(task, target, buffer, kernel.merged),
                    {.add_new = true, .subtract_old = true}, kernel.name);
    } else {
      const Walk walk = make_walk(task.tensor(), task.block(), target, kernel.merged);
      sum = kernel.measure[width_of(task)](walk, changes, buffer);
    }
  }
}

std::int64_t write_block(const Task& task, const ElementKernel& kernel,
                         const std::vector<Memory>& memory) {
  const bool whole = task.change->descriptor.kind == Kind::kWhole;
  const Changes changes = whole ? Changes{} : decoded(task);
  std::int64_t written = 0;
  for (const Target& target : task.list()) {
    std::byte* buffer = memory[target.buffer].data;
    if (buffer == nullptr) continue;
    if (whole) {
      run_box(box_of(task, target, buffer, kernel.merged), {.write = true}, kernel.name);
      written += target.box.elements();
    } else {
      const Walk walk = make_walk(task.tensor(), task.block(), target, kernel.merged);
      written += kernel.write[width_of(task)](walk, changes, buffer);
    }
  }
  reshard::finish_streaming();
  return written;
}

}  // namespace

Sums Scatter::measure(std::span<const Staged* const> staged, const Memories& destinations,
                      std::size_t threads) const {
  check_staged(staged);
  const std::vector<Memory> memory = checked(destinations, true);
  const ElementKernel& kernel = kernel_named(implementation_);
  const std::vector<Task> tasks = tasks_of(staged);
  std::vector<std::uint64_t> partial(targets_in(tasks), 0);
  parallel_for(tasks.size(), threads, [&](std::size_t i) {
    measure_block(tasks[i], kernel, sums_, memory, partial.data() + tasks[i].first);
  });
  for (const Staged* each : staged) each->sound_->store(true, std::memory_order_relaxed);
  std::vector<std::uint64_t> by_sum(sums_.size(), 0);
  for (const Task& task : tasks) {
    for (std::size_t t = 0; t < task.list().size(); ++t) {
      by_sum[task.list()[t].sum] += partial[task.first + t];
    }
  }
  return spread(by_sum);
}

std::int64_t Scatter::apply(std::span<const Staged* const> staged, const Memories& destinations,
                            std::size_t threads) const {
  check_staged(staged);
  const std::vector<Memory> memory = checked(destinations, false);
  const ElementKernel& kernel = kernel_named(implementation_);
  std::vector<Task> tasks = tasks_of(staged);
  const bool sound = std::all_of(staged.begin(), staged.end(), [](const Staged* each) {
    return each->sound_->load(std::memory_order_relaxed);
  });
  if (!sound) {
    parallel_for(tasks.size(), threads, [&](std::size_t i) {
      if (tasks[i].change->descriptor.kind != Kind::kWhole) decoded(tasks[i]);
    });
  }
  // Where only some buffers are given, most blocks may have nothing in them: those are not decoded.
  std::erase_if(tasks, [&](const Task& task) {
    return std::ranges::none_of(
        task.list(), [&](const Target& target) { return memory[target.buffer].data != nullptr; });
  });
  std::atomic<std::int64_t> written = 0;
  parallel_for(tasks.size(), threads,
               [&](std::size_t i) { written += write_block(tasks[i], kernel, memory); });
  return written;
}

std::vector<std::size_t> Scatter::touched(std::span<const Staged* const> staged) const {
  check_staged(staged);
  std::vector<bool> is_touched(written_.size(), false);
  const auto touch = [&](const Targets& targets, std::size_t place) {
    for (const Target& target : targets.of(place)) is_touched[target.buffer] = true;
  };
  for (const Staged* each : staged) {
    for (const Change& change : each->changes()) touch(*each->targets(), change.place);
    for (const std::uint32_t block : each->references()) {
      touch(*each->targets(), each->targets()->find(block));
    }
  }
  std::vector<std::size_t> buffers;
  for (std::size_t i = 0; i < is_touched.size(); ++i) {
    if (is_touched[i]) buffers.push_back(i);
  }
  return buffers;
}

}  // namespace kimisys::broadcast
