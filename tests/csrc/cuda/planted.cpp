// Kernels with planted errors, to prove that the sanitizers find such in the emulation, and one that checks what the
// emulation computes: planted NAME.
#include <cstdio>
#include <string>

#include "cuda/device.h"

namespace {

constexpr int kThreads = 64;

// Every thread's neighbour, through shared memory; without the barrier it may not be there yet.
template <bool kBarrier>
__global__ void neighbour(const int* in, int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % kThreads];
}

__global__ void beyond_shared(const int* in, int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x + 1] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

// Shared memory of the launch's size, which is that of kThreads values.
template <int kShift>
__global__ void rotate(const int* in, int* out) {
  int* const values = condense::cuda::shared_memory<int>();
  values[threadIdx.x + kShift] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + kShift];
}

// The lanes of a warp do not march in step either.
template <bool kBarrier>
__global__ void neighbour_in_warp(const int* in, int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

// Writes 1 where a primitive gave something else than on a GPU.
__global__ void primitives(const int*, int* out) {
  const unsigned full = 0xffffffffu;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  bool wrong = __shfl_sync(full, lane, 37) != 5 || __shfl_up_sync(full, lane, 3u) != (lane < 3 ? lane : lane - 3);
  wrong |=
      __shfl_down_sync(full, lane, 3u) != (lane > 28 ? lane : lane + 3) || __shfl_xor_sync(full, lane, 9) != (lane ^ 9);
  wrong |= __ballot_sync(full, lane % 2) != 0xaaaaaaaau || __any_sync(full, lane > 31) || !__all_sync(full, lane < 32);
  wrong |= __match_any_sync(full, lane / 4) != 15u << lane / 4 * 4 || __reduce_add_sync(full, 1u << lane) != full;
  // Two halves on their own ways, a different number of times.
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  for (int i = 0; i < (lane < 16 ? 5 : 2); ++i)
    wrong |= __reduce_add_sync(half, 1) != 16 || __ballot_sync(half, true) != half;
  __syncwarp();
  wrong |= __clz(1) != 31 || __clz(0) != 32 || __ffs(8) != 4 || __uint_as_float(__float_as_uint(1.5f)) != 1.5f;

  __shared__ int sum, most, first;
  if (thread == 0) sum = most = 0, first = -1;
  __syncthreads();
  atomicAdd(&sum, thread);
  atomicMax(&most, thread);
  atomicCAS(&first, -1, thread);
  __syncthreads();
  wrong |= sum != kThreads * (kThreads - 1) / 2 || most != kThreads - 1 || first < 0 || first >= kThreads;
  out[thread] = wrong;
  // Who has left is waited for neither by the block nor by the warp.
  if (thread % 3 == 0) return;
  const int before = out[thread];
  __syncthreads();
  out[thread] = before | (__reduce_add_sync(full, 1) != 32 - 11);
}

__global__ void beyond_global(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  int *in = new int[kThreads](), *out = new int[kThreads];
  const auto kernel = name == "clean"            ? neighbour<true>
                      : name == "race"           ? neighbour<false>
                      : name == "clean_warp"     ? neighbour_in_warp<true>
                      : name == "race_warp"      ? neighbour_in_warp<false>
                      : name == "primitives"     ? primitives
                      : name == "beyond_shared"  ? beyond_shared
                      : name == "clean_dynamic"  ? rotate<0>
                      : name == "beyond_dynamic" ? rotate<1>
                                                 : beyond_global;
  condense::cuda::launch_with_shared_memory(kernel, dim3(2), dim3(kThreads), kThreads * sizeof(int), 0,
                                            static_cast<const int*>(in), out);
  int wrong = 0;
  for (int i = 0; i < kThreads; ++i) wrong |= out[i];
  if (wrong) std::fprintf(stderr, "a primitive computes something else than on a GPU\n");
  delete[] in;
  delete[] out;
  return wrong;
}
