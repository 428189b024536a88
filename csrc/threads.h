// Runs independent tasks on several threads.
#pragma once

#include <cstdint>

namespace gac {

// Calls body(context, task) for task in [0, tasks), each once, in any order, on at most `threads` threads (the caller is
// one of them); returns when all are done. One thread or one task: no synchronisation at all.
void parallel_for(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context);

template <class Body>
void parallel_for(int threads, int64_t tasks, Body& body) {
  parallel_for(
      threads, tasks, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, &body);
}

const char* threading_name();
void prefer_pool(bool pool);

}  // namespace gac
