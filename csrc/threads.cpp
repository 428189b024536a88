// Threads come from the OpenMP runtime that torch has already loaded, found by symbol: the same worker threads then
// serve torch and this library, none spins against the other, and building needs no OpenMP. Where there is no such
// runtime (macOS, a plain C program) a small pool does the work.
//
// A forked child owns none of its parent's threads, and OpenMP's runtime would wait for them: a child uses the pool,
// which starts afresh.
#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace gac {
namespace {

struct Job {
  std::atomic<int64_t> next{0};
  int64_t tasks;
  void (*body)(void*, int64_t);
  void* context;
};

void work(void* argument) {
  Job* job = static_cast<Job*>(argument);
  for (;;) {
    const int64_t task = job->next.fetch_add(1, std::memory_order_relaxed);
    if (task >= job->tasks) return;
    job->body(job->context, task);
  }
}

class Pool {
 public:
  // False when another thread's job is on it.
  bool run(int threads, Job* job) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1)
        workers_.emplace_back(&Pool::loop, this, workers_.size(), generation_);
      job_ = job;
      wanted_ = running_ = threads - 1;
      ++generation_;
    }
    start_.notify_all();
    work(job);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    return true;
  }

 private:
  void loop(size_t id, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (static_cast<int>(id) >= wanted_) continue;
      Job* job = job_;
      lock.unlock();
      work(job);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int wanted_ = 0, running_ = 0;
  uint64_t generation_ = 0;
};

#if defined(_WIN32)
long process_id() { return 0; }
#else
long process_id() { return static_cast<long>(getpid()); }
#endif

std::atomic<bool> pool_preferred{false};
const long loader = process_id();

// The pool of this process. Never destroyed: its threads sleep until the process ends.
Pool& pool() {
  static std::mutex guard;
  static Pool* instance = nullptr;
  static long owner = 0;
  std::lock_guard<std::mutex> lock(guard);
  if (!instance || owner != process_id()) {
    instance = new Pool;
    owner = process_id();
  }
  return *instance;
}

// void GOMP_parallel(void (*fn)(void*), void* data, unsigned threads, unsigned flags): libgomp's entry, which LLVM's
// runtime offers too.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

Parallel openmp() {
#if defined(_WIN32)
  return nullptr;
#else
  static const Parallel entry = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return entry;
#endif
}

bool use_openmp() { return !pool_preferred.load(std::memory_order_relaxed) && openmp() && process_id() == loader; }

}  // namespace

const char* threading_name() { return use_openmp() ? "openmp" : "pool"; }

void prefer_pool(bool preferred) { pool_preferred = preferred; }

void parallel_for(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(context, task);
    return;
  }
  Job job;
  job.tasks = tasks;
  job.body = body;
  job.context = context;
  if (use_openmp())
    openmp()(work, &job, static_cast<unsigned>(threads), 0);
  else if (!pool().run(threads, &job))
    work(&job);
}

}  // namespace gac
