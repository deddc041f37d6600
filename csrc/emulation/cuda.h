// CUDA's execution model on a CPU, as far as the kernels of csrc/cuda use it, so that they run in tests without a GPU.
//
// Blocks run one after another; the threads of a block are threads. A barrier is a barrier, so ThreadSanitizer sees a
// missing one as a race. Static shared memory is static, dynamic shared memory and global memory are malloc'ed to their
// exact size, so AddressSanitizer sees an access beyond any of them (kernels must lie in anonymous namespaces: it does
// not guard variables that several files share). Warps are 32 threads that may run at any pace: only what a warp
// primitive or a barrier orders is ordered. A barrier that part of a block cannot reach hangs, as on a GPU.
//
// Not emulated: several blocks at once, so that a race between blocks goes unseen; and the order of memory alone:
// __shfl_sync orders it here, which CUDA promises of __syncwarp only.
#pragma once

#include <math.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
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
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
using cudaStream_t = struct CUstream_st*;

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
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
template <class T>
T __ldg(const T* at) {
  return *at;
}

// Relaxed: as on a GPU, an atomic orders nothing but itself.
template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*at).fetch_add(value, std::memory_order_relaxed);
}
template <class T>
T atomicOr(T* at, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*at).fetch_or(value, std::memory_order_relaxed);
}
template <class T>
T atomicExch(T* at, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*at).exchange(value, std::memory_order_relaxed);
}
template <class T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  std::atomic_ref<T>(*at).compare_exchange_strong(expected, value, std::memory_order_relaxed);
  return expected;
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  std::atomic_ref<T> ref(*at);
  T before = ref.load(std::memory_order_relaxed);
  while (before < value && !ref.compare_exchange_weak(before, value, std::memory_order_relaxed)) {
  }
  return before;
}

// Between blocks, the only ones that need it, everything is in order here.
inline void __threadfence() {}

namespace condense::emulation {

// A phase that waiting threads watch: they give way a few times, which is cheaper than to sleep, and then sleep.
class Phase {
 public:
  uint32_t now() const { return phase_.load(std::memory_order_relaxed); }
  void next() {
    phase_.fetch_add(1, std::memory_order_release);
    std::lock_guard lock(mutex_);
    changed_.notify_all();
  }
  void wait_beyond(uint32_t phase) {
    for (int turn = 0; turn < kTurns; ++turn) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      std::this_thread::yield();
    }
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return phase_.load(std::memory_order_acquire) != phase; });
  }

 private:
  static constexpr int kTurns = 20;
  std::atomic<uint32_t> phase_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// Of a block. Threads that left the kernel are not waited for.
class Barrier {
 public:
  void reset(int threads) { expected_ = threads, arrived_ = 0; }
  void arrive_and_wait() {
    uint32_t phase;
    {
      std::lock_guard lock(mutex_);
      phase = phase_.now();
      if (++arrived_ == expected_) return release();
    }
    phase_.wait_beyond(phase);
  }
  void leave() {
    std::lock_guard lock(mutex_);
    if (--expected_ == arrived_ && expected_ > 0) release();
  }

 private:
  void release() {
    arrived_ = 0;
    phase_.next();
  }
  std::mutex mutex_;
  Phase phase_;
  int expected_ = 0, arrived_ = 0;
};

// Lanes meet those that a mask names. Several masks may be under way at once: a lane waits at one only.
class Warp {
 public:
  uint64_t slots[32] = {};

  void reset(unsigned lanes) {
    running_ = lanes;
    for (Group& group : groups_) group.arrived = 0;
  }

  // The lanes that came: those of the mask that have not left the kernel.
  unsigned meet(unsigned mask, unsigned lane) {
    Group* group = nullptr;
    uint32_t phase;
    {
      std::lock_guard lock(mutex_);
      if (!(mask >> lane & 1)) {
        std::fprintf(stderr, "emulation: lane %u calls a warp primitive with the mask %08x\n", lane, mask);
        std::abort();
      }
      for (Group& other : groups_) {
        if (other.arrived && other.mask == mask) group = &other;
      }
      for (int i = 0; !group; ++i) group = groups_[i].arrived ? nullptr : &groups_[i];
      phase = group->phase.now();
      group->mask = mask;
      group->arrived |= 1u << lane;
      if (group->arrived == (mask & running_)) {
        release(*group);
        return came_[lane];
      }
    }
    group->phase.wait_beyond(phase);
    return came_[lane];
  }

  void leave(unsigned lane) {
    std::lock_guard lock(mutex_);
    running_ &= ~(1u << lane);
    for (Group& group : groups_) {
      if (group.arrived && group.arrived == (group.mask & running_)) release(group);
    }
  }

 private:
  struct Group {
    Phase phase;
    unsigned mask = 0, arrived = 0;
  };
  void release(Group& group) {
    for (int lane = 0; lane < 32; ++lane) {
      if (group.arrived >> lane & 1) came_[lane] = group.arrived;  // nobody else's: others may already meet elsewhere
    }
    group.arrived = 0;
    group.phase.next();
  }
  std::mutex mutex_;
  Group groups_[32];
  unsigned running_ = 0, came_[32] = {};
};

struct Launch {
  Barrier block, between;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
};

inline constinit thread_local Launch* current = nullptr;
inline constinit thread_local Warp* warp = nullptr;
inline constinit thread_local unsigned lane = 0;

}  // namespace condense::emulation

inline constinit thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { condense::emulation::current->block.arrive_and_wait(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  condense::emulation::warp->meet(mask, condense::emulation::lane);
}

namespace condense::emulation {

// Every lane of the mask shows its value; read(at, came) looks at those of the lanes that came.
template <class T, class Read>
auto exchange(unsigned mask, T value, Read&& read) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  warp->slots[lane] = 0;
  std::memcpy(&warp->slots[lane], &value, sizeof(T));
  const unsigned came = warp->meet(mask, lane);
  const auto at = [](unsigned from) {
    T theirs;
    std::memcpy(&theirs, &warp->slots[from], sizeof(T));
    return theirs;
  };
  const auto out = read(at, came);
  warp->meet(mask, lane);
  return out;
}

// What a shuffle brings; from a lane that takes no part CUDA promises nothing, here it is the own value.
template <class T>
T shuffle(unsigned mask, T value, unsigned from) {
  return exchange(mask, value,
                  [&](auto at, unsigned came) { return from < 32 && came >> from & 1 ? at(from) : value; });
}

template <class T, class Add>
T reduce(unsigned mask, T value, Add&& add) {
  return exchange(mask, value, [&](auto at, unsigned came) {
    T sum = at(__builtin_ctz(came));
    for (unsigned rest = came & (came - 1); rest; rest &= rest - 1) sum = add(sum, at(__builtin_ctz(rest)));
    return sum;
  });
}

}  // namespace condense::emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return condense::emulation::shuffle(mask, value, static_cast<unsigned>(from) % 32);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  return condense::emulation::shuffle(mask, value, condense::emulation::lane - delta);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return condense::emulation::shuffle(mask, value, condense::emulation::lane + delta);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return condense::emulation::shuffle(mask, value, condense::emulation::lane ^ static_cast<unsigned>(bits));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  return condense::emulation::exchange(mask, value, [&](auto at, unsigned came) {
    unsigned equal = 0;
    for (unsigned from = 0; from < 32; ++from)
      equal |= static_cast<unsigned>(came >> from & 1 && at(from) == value) << from;
    return equal;
  });
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const unsigned own = static_cast<unsigned>(vote) << condense::emulation::lane;
  return condense::emulation::reduce(mask, own, [](unsigned a, unsigned b) { return a | b; });
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, !vote) == 0; }
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return condense::emulation::reduce(mask, value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return condense::emulation::reduce(mask, value, [](T a, T b) { return a < b ? b : a; });
}

namespace condense::cuda {

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(condense::emulation::current->shared.get());
}

template <class... Parameters, class... Arguments>
void launch_with_shared_memory(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, uintptr_t,
                               const Arguments&... arguments) {
  using namespace condense::emulation;
  const int threads = static_cast<int>(block.x * block.y * block.z);
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
      threadIdx = dim3(t % block.x, t / block.x % block.y, t / block.x / block.y);
      for (uint64_t b = 0; b < blocks; ++b) {
        if (t == 0) {
          state.block.reset(threads);
          state.shared.reset(new unsigned char[shared_bytes]);
          std::memset(state.shared.get(), 0xcd, shared_bytes);  // as little to rely on as what another block left
        }
        if (lane == 0) warp->reset(threads - t >= 32 ? 0xffffffffu : (1u << (threads - t)) - 1);
        state.between.arrive_and_wait();
        blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
        kernel(arguments...);
        warp->leave(lane);
        state.block.leave();
        state.between.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, uintptr_t stream, const Arguments&... arguments) {
  launch_with_shared_memory(kernel, grid, block, 0, stream, arguments...);
}

}  // namespace condense::cuda
