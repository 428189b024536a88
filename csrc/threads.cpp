// Threads come from the OpenMP runtime that torch has already loaded, found by symbol: the same worker threads then
// serve torch and this library, none spins against the other, and building needs no OpenMP. Where there is no such
// runtime (macOS, a plain C program) a small pool does the work.
//
// A forked child owns none of its parent's threads, and OpenMP's runtime would wait for them: a child uses the pool,
// which starts afresh.
#include "threads.h"

#include <algorithm>
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

constexpr int kSlices = 64;

// A thread's share of the tasks: neighbours, so that calls on the same buffers find them in the same core's cache.
struct alignas(64) Slice {
  std::atomic<int64_t> next;
  int64_t end;
};

struct Job {
  Job(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context)
      : slices(std::min(threads, kSlices)), body(body), context(context) {
    for (int s = 0; s < slices; ++s) {
      slice[s].next.store(tasks * s / slices, std::memory_order_relaxed);
      slice[s].end = tasks * (s + 1) / slices;
    }
  }
  int slices;
  void (*body)(void*, int64_t);
  void* context;
  Slice slice[kSlices];
};

// Does the tasks of slice `own`, then what is left of the others: a thread that comes late or never holds nothing up.
void work(Job* job, int own) {
  for (int s = 0; s < job->slices; ++s) {
    Slice& slice = job->slice[(own + s) % job->slices];
    for (;;) {
      const int64_t task = slice.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= slice.end) break;
      job->body(job->context, task);
    }
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
    work(job, 0);
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
      work(job, static_cast<int>(id) + 1);
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

using ThreadNumber = int (*)();

ThreadNumber thread_number() {
#if defined(_WIN32)
  return nullptr;
#else
  static const ThreadNumber entry = reinterpret_cast<ThreadNumber>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  return entry;
#endif
}

void openmp_work(void* job) { work(static_cast<Job*>(job), thread_number()()); }

bool use_openmp() {
  return !pool_preferred.load(std::memory_order_relaxed) && openmp() && thread_number() && process_id() == loader;
}

}  // namespace

const char* threading_name() { return use_openmp() ? "openmp" : "pool"; }

void prefer_pool(bool preferred) { pool_preferred = preferred; }

void parallel_for(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(context, task);
    return;
  }
  Job job(threads, tasks, body, context);
  if (use_openmp())
    openmp()(openmp_work, &job, static_cast<unsigned>(threads), 0);
  else if (!pool().run(threads, &job))
    work(&job, 0);
}

}  // namespace gac
