// CUDA's execution model on a CPU, as far as the kernels of csrc/cuda use it, so that they run in tests without a GPU.
//
// Blocks run one after another; the threads of a block are threads. A barrier is a barrier, so ThreadSanitizer sees a
// missing one as a race; shared memory is static, global memory malloc'ed, so AddressSanitizer sees an access beyond
// either. Warps are 32 threads that may run at any pace: only what a warp primitive or a barrier orders is ordered. Not
// emulated: several blocks at once, and masks of warp primitives that leave out a lane.
#pragma once

#include <math.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __restrict__
#define __launch_bounds__(...)
#define CONDENSE_BLOCK(threads) ((threads) < 64 ? (threads) : 64)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// Rounding as the hardware's: to nearest, ties to even.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

template <class T>
T atomicAdd(T* at, T value) {
  return std::atomic_ref<T>(*at).fetch_add(value, std::memory_order_relaxed);
}

namespace condense::emulation {

// Threads that left the kernel count as arrived, as they do on a GPU.
class Barrier {
 public:
  void reset(int threads) { expected_ = threads, arrived_ = 0; }
  void arrive_and_wait() {
    std::unique_lock lock(mutex_);
    const uint64_t phase = phase_;
    if (++arrived_ == expected_) return release();
    changed_.wait(lock, [&] { return phase_ != phase; });
  }
  void leave() {
    std::lock_guard lock(mutex_);
    if (--expected_ == arrived_ && expected_ > 0) release();
  }

 private:
  void release() {
    arrived_ = 0;
    ++phase_;
    changed_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  int expected_ = 0, arrived_ = 0;
  uint64_t phase_ = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[32] = {};
  bool present[32] = {};
};

struct Launch {
  Barrier block, between;
  std::vector<Warp> warps;
};

inline thread_local Launch* current = nullptr;
inline thread_local Warp* warp = nullptr;
inline thread_local unsigned lane = 0;

}  // namespace condense::emulation

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { condense::emulation::current->block.arrive_and_wait(); }
inline void __syncwarp(unsigned = 0xffffffffu) { condense::emulation::warp->barrier.arrive_and_wait(); }

namespace condense::emulation {

// Every lane shows its value; read(slots, present) looks at all of them.
template <class T, class Read>
auto exchange(unsigned mask, T value, Read&& read) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xffffffffu) std::abort();
  std::memcpy(&warp->slots[lane], &value, sizeof(T));
  warp->barrier.arrive_and_wait();
  auto out = read([](unsigned from) {
    T theirs;
    std::memcpy(&theirs, &warp->slots[from % 32], sizeof(T));
    return theirs;
  });
  warp->barrier.arrive_and_wait();
  return out;
}

}  // namespace condense::emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return condense::emulation::exchange(mask, value, [&](auto at) { return at(from); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = condense::emulation::lane;
  return condense::emulation::exchange(mask, value, [&](auto at) { return at(lane < delta ? lane : lane - delta); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  const unsigned lane = condense::emulation::lane;
  return condense::emulation::exchange(mask, value, [&](auto at) { return at(lane ^ bits); });
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  return condense::emulation::exchange(mask, static_cast<unsigned>(vote), [&](auto at) {
    unsigned votes = 0;
    for (unsigned from = 0; from < 32; ++from) votes |= (condense::emulation::warp->present[from] && at(from)) << from;
    return votes;
  });
}
inline unsigned __match_any_sync(unsigned mask, unsigned value) {
  return condense::emulation::exchange(mask, value, [&](auto at) {
    unsigned equal = 0;
    for (unsigned from = 0; from < 32; ++from) {
      equal |= static_cast<unsigned>(condense::emulation::warp->present[from] && at(from) == value) << from;
    }
    return equal;
  });
}

namespace condense::cuda {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, uintptr_t, const Arguments&... arguments) {
  using namespace condense::emulation;
  const int threads = static_cast<int>(block.x);
  Launch state;
  state.warps = std::vector<Warp>((threads + 31) / 32);
  state.between.reset(threads);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      current = &state;
      warp = &state.warps[t / 32];
      lane = t % 32;
      blockDim = block;
      gridDim = grid;
      threadIdx = dim3(t, 0, 0);
      for (uint64_t b = 0; b < blocks; ++b) {
        if (t == 0) state.block.reset(threads);
        if (lane == 0) {
          warp->barrier.reset(std::min(32, threads - t));
          for (int i = 0; i < 32; ++i) warp->present[i] = t + i < threads;
        }
        state.between.arrive_and_wait();
        blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
        kernel(arguments...);
        warp->barrier.leave();
        state.block.leave();
        state.between.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
}

}  // namespace condense::cuda
