// Kernels with planted errors, to prove that the sanitizers find such in the emulation: planted NAME.
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

__global__ void beyond_global(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  int *in = new int[kThreads](), *out = new int[kThreads];
  const auto kernel = name == "clean"           ? neighbour<true>
                      : name == "race"          ? neighbour<false>
                      : name == "beyond_shared" ? beyond_shared
                                                : beyond_global;
  condense::cuda::launch(kernel, dim3(2), dim3(kThreads), 0, static_cast<const int*>(in), out);
  delete[] in;
  delete[] out;
}
