// What a .cu file includes: CUDA under nvcc; otherwise csrc/emulation/cuda.h, with which the same file runs on a CPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace condense::cuda {

// Of a launch with shared memory, of as many bytes as were asked for.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char condense_shared_memory[];
  return reinterpret_cast<T*>(condense_shared_memory);
}

static inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// The only place that launches. `stream` is a cudaStream_t as torch gives it, an integer.
template <class... Parameters, class... Arguments>
void launch_with_shared_memory(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes,
                               uintptr_t stream, const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {  // more than a kernel gets unasked
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, block, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError());
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, uintptr_t stream, const Arguments&... arguments) {
  launch_with_shared_memory(kernel, grid, block, 0, stream, arguments...);
}

}  // namespace condense::cuda

// Threads of a block; the emulation takes fewer.
#define CONDENSE_BLOCK(threads) (threads)

#else
#include "emulation/cuda.h"
#endif
