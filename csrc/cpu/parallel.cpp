#include "cpu/parallel.h"

#include <thread>
#include <vector>

namespace condense::cpu {

namespace {
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};
}  // namespace

void share_openmp(uintptr_t address) { gomp_parallel = reinterpret_cast<GompParallel>(address); }

void run_on_threads(int threads, void (*work)(void*), void* context) {
  if (GompParallel parallel = gomp_parallel) {
    parallel(work, context, static_cast<unsigned>(threads), 0);
    return;
  }
  // No pool of our own: it would not survive a fork, and this is the path of platforms where torch has no libgomp.
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(work, context);
  } catch (const std::system_error&) {
    // The machine gives no more threads: those that came, and this one, do all of it.
  }
  work(context);
  for (std::thread& other : others) other.join();
}

}  // namespace condense::cpu
