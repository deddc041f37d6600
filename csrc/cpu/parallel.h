// Work shared between threads. The number of threads is the caller's, who asks torch for it.
#pragma once

#include <atomic>
#include <cstdint>

namespace condense::cpu {

// Calls `work(context)` on up to `threads` threads at once, the caller's among them, and waits. Fewer may come: within
// another parallel region only the caller does. `work` must not throw.
void run_on_threads(int threads, void (*work)(void*), void* context);

// The address of a libgomp's GOMP_parallel, or 0. Sharing torch's threads avoids a second pool, whose threads would
// compete for the cores with torch's, which spin for a while after each of its own regions.
void share_openmp(uintptr_t gomp_parallel);

// f(task, worker) for every task in [0, tasks), handed out one at a time. worker < threads is the number of the thread,
// for scratch of its own. f must not throw.
template <class F>
void parallel_for(int64_t tasks, int threads, F&& f) {
  if (tasks <= 0) return;
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task, 0);
    return;
  }
  struct Shared {
    F& f;
    int64_t tasks;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
  } shared{f, tasks};
  run_on_threads(
      threads,
      [](void* context) {
        auto& shared = *static_cast<Shared*>(context);
        const int worker = shared.workers.fetch_add(1, std::memory_order_relaxed);
        for (int64_t task; (task = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.tasks;) {
          shared.f(task, worker);
        }
      },
      &shared);
}

}  // namespace condense::cpu
