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

// The only place that launches. `stream` is a cudaStream_t as torch gives it, an integer.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, uintptr_t stream, const Arguments&... arguments) {
  kernel<<<grid, block, 0, reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

}  // namespace condense::cuda

// Threads of a block; the emulation takes fewer.
#define CONDENSE_BLOCK(threads) (threads)

#else
#include "emulation/cuda.h"
#endif
