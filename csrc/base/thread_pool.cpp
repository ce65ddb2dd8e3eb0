#include "base/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <csignal>
#include <deque>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace kimisys {
namespace {

constexpr std::size_t kMaxWorkers = kMaxThreads - 1;

// One parallel_for call. It lives on the caller's stack: the caller leaves only when no ticket for
// it is queued and no worker is inside it.
struct Job {
  std::size_t count;
  const std::function<void(std::size_t)>& body;
  std::atomic<std::size_t> next = 0;
  std::size_t running = 0;             // workers inside, guarded by Pool::mutex_
  std::exception_ptr error = nullptr;  // guarded by Pool::mutex_
};

class Pool {
 public:
  void run(Job& job, std::size_t threads) {
    {
      const std::lock_guard lock(mutex_);
      grow(threads - 1);
      for (std::size_t i = 0; i < std::min(threads - 1, workers_); ++i) tickets_.push_back(&job);
    }
    wake_.notify_all();
    take_part(job);
    std::unique_lock lock(mutex_);
    std::erase(tickets_, &job);
    done_.wait(lock, [&] { return job.running == 0; });
    if (job.error) std::rethrow_exception(job.error);
  }

 private:
  // Workers are detached and the pool is never destroyed: at exit they sleep on a condition.
  void grow(std::size_t workers) {
    // Signals stay with the threads of the program, so that Ctrl-C interrupts the main thread's
    // wait.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; workers_ < std::min(workers, kMaxWorkers); ++workers_) {
        std::thread([this] { work(); }).detach();
      }
    } catch (const std::system_error&) {
      // Fewer threads than asked for: the caller does the rest of the work itself.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return !tickets_.empty(); });
      Job& job = *tickets_.front();
      tickets_.pop_front();
      ++job.running;
      lock.unlock();
      take_part(job);
      lock.lock();
      if (--job.running == 0) done_.notify_all();
    }
  }

  void take_part(Job& job) {
    try {
      for (std::size_t i = job.next++; i < job.count; i = job.next++) job.body(i);
    } catch (...) {
      job.next = job.count;
      const std::lock_guard lock(mutex_);
      if (!job.error) job.error = std::current_exception();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::deque<Job*> tickets_;
  std::size_t workers_ = 0;
};

std::atomic<Pool*> g_pool = nullptr;

Pool& shared_pool() {
  Pool* pool = g_pool.load();
  if (pool == nullptr) {
    // A forked child inherits the pool's memory but none of its threads: it starts a new pool.
    static const int registered =
        pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr, std::memory_order_relaxed); });
    static_cast<void>(registered);
    auto* fresh = new Pool();
    if (g_pool.compare_exchange_strong(pool, fresh)) {
      pool = fresh;
    } else {
      delete fresh;
    }
  }
  return *pool;
}

}  // namespace

std::size_t hardware_threads() {
  cpu_set_t allowed;  // not hardware_concurrency, which counts processors this process may not use
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return 1;
  return static_cast<std::size_t>(std::max(1, CPU_COUNT(&allowed)));
}

void parallel_for(std::size_t count, std::size_t threads,
                  const std::function<void(std::size_t)>& body) {
  if (threads == 0) threads = hardware_threads();
  threads = std::min({threads, count, kMaxThreads});
  if (threads <= 1) {
    for (std::size_t i = 0; i < count; ++i) body(i);
    return;
  }
  Job job{count, body};
  shared_pool().run(job, threads);
}

}  // namespace kimisys
