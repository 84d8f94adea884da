// SPDX-License-Identifier: Apache-2.0
#include "common/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace pyfast {
namespace {

// Pieces per thread: enough that a late or slow thread costs little, few enough to claim cheaply.
constexpr std::int64_t kPiecesPerThread = 8;

class Pool {
 public:
  // False when another thread has the pool.
  bool try_run(std::int64_t count, std::int64_t piece, int helpers, RangeFunction body) {
    const std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    const Job job{count, piece, body};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      grow(helpers);
      next_.store(0, std::memory_order_relaxed);
      job_ = &job;
      seats_ = helpers;
      ++job_number_;
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    work(job);
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;  // from here on no helper can join
    done_.wait(lock, [this] { return active_ == 0; });
    return true;
  }

 private:
  struct Job {
    std::int64_t count, piece;
    RangeFunction body;
  };

  void work(const Job& job) {
    for (;;) {
      const std::int64_t begin = next_.fetch_add(job.piece, std::memory_order_relaxed);
      if (begin >= job.count) return;
      job.body(begin, std::min(begin + job.piece, job.count));
    }
  }

  // A machine that has no more threads to give is served by those there are.
  void grow(int helpers) {
    try {
      for (; size_ < helpers; ++size_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
    }
  }

  [[noreturn]] void serve() {
    std::uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return job_ != nullptr && job_number_ != seen && seats_ > 0; });
      seen = job_number_;
      --seats_;
      ++active_;
      const Job& job = *job_;
      lock.unlock();
      work(job);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_;  // held for the length of a job
  std::mutex mutex_;  // guards everything below but next_
  std::condition_variable wake_, done_;
  const Job* job_ = nullptr;
  std::uint64_t job_number_ = 0;
  int seats_ = 0;   // helpers that may still join this job
  int active_ = 0;  // helpers at work on it
  int size_ = 0;
  std::atomic<std::int64_t> next_{0};
};

// Leaked on purpose: its threads run until the process ends, and a forked child, which has none of
// them, starts over with a fresh pool.
std::atomic<Pool*> g_pool{nullptr};

Pool& pool() {
  Pool* current = g_pool.load(std::memory_order_acquire);
  if (current == nullptr) {
    static const int registered =
        pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr, std::memory_order_release); });
    static_cast<void>(registered);
    auto fresh = std::make_unique<Pool>();
    if (g_pool.compare_exchange_strong(current, fresh.get(), std::memory_order_acq_rel)) {
      current = fresh.release();
    }
  }
  return *current;
}

// The OpenMP pool that torch has brought into the process, found at run time and never linked. Its
// idle threads spin for a while after each product, so other threads would wait for a core: with it
// a 4096 x 4096 NF4 layer of 64 rows takes 4.4 ms on two cores, with a pool beside it 6.0 ms.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*in_parallel)();
};

// libgomp's threads do not survive fork(), and it would wait for them for ever.
std::atomic<bool> g_forked{false};

const OpenMp* torch_openmp() {
  static const OpenMp found = [] {
    OpenMp omp{};
    void* parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    void* inside = dlsym(RTLD_DEFAULT, "omp_in_parallel");
    if (parallel != nullptr && inside != nullptr) {
      omp.parallel = reinterpret_cast<decltype(omp.parallel)>(parallel);
      omp.in_parallel = reinterpret_cast<decltype(omp.in_parallel)>(inside);
      pthread_atfork(nullptr, nullptr, [] { g_forked.store(true, std::memory_order_relaxed); });
    }
    return omp;
  }();
  if (found.parallel == nullptr || g_forked.load(std::memory_order_relaxed)) return nullptr;
  return found.in_parallel() == 0 ? &found : nullptr;
}

// One job on an OpenMP team: each thread claims pieces until none is left.
struct TeamJob {
  std::int64_t count, piece;
  RangeFunction body;
  std::atomic<std::int64_t> next{0};

  static void run(void* self) {
    auto& job = *static_cast<TeamJob*>(self);
    for (;;) {
      const std::int64_t begin = job.next.fetch_add(job.piece, std::memory_order_relaxed);
      if (begin >= job.count) return;
      job.body(begin, std::min(begin + job.piece, job.count));
    }
  }
};

}  // namespace

void parallel_for(std::int64_t count, std::int64_t grain, int threads, RangeFunction body) {
  if (count <= 0) return;
  const std::int64_t most = (count + grain - 1) / grain;
  const auto workers = static_cast<int>(std::clamp<std::int64_t>(threads, 1, most));
  if (workers > 1) {
    const std::int64_t pieces = workers * kPiecesPerThread;
    const std::int64_t piece = std::max(grain, (count + pieces - 1) / pieces);
    if (const OpenMp* omp = torch_openmp()) {
      TeamJob job{count, piece, body};
      omp->parallel(TeamJob::run, &job, static_cast<unsigned>(workers), 0);
      return;
    }
    if (pool().try_run(count, piece, workers - 1, body)) return;
  }
  body(0, count);
}

}  // namespace pyfast
