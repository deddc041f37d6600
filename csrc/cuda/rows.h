// What kernels share that move rows of a cache: integers of either width, elements of three dtypes, and whether rows
// may be moved in units of 16 bytes.
#pragma once

#include <cstdint>
#include <cstring>

#include "condense/tensor.h"
#include "cuda/device.h"

namespace condense::cuda {

struct alignas(8) Word {  // an integer as it was read: of 64 bits, or the low half alone
  int32_t low, high;
};

struct Integers {
  const void* data = nullptr;
  int64_t stride = 1;
  bool wide = true;
  __device__ int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i * stride] : static_cast<const int32_t*>(data)[i * stride];
  }
  // For several reads at once: nothing waits for a word before value() looks at it.
  __device__ Word word(int64_t i) const {
    Word word{};
    if (wide)
      word = static_cast<const Word*>(data)[i * stride];
    else
      word.low = static_cast<const int32_t*>(data)[i * stride];
    return word;
  }
  __device__ int64_t value(Word word) const {
    return wide ? static_cast<int64_t>(word.high) << 32 | static_cast<uint32_t>(word.low) : word.low;
  }
};

__device__ inline int64_t clamp(int64_t x, int64_t most) { return x < 0 ? 0 : x > most ? most : x; }

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16(x); }
__device__ inline void narrow(float x, __half& to) { to = __float2half(x); }

// Calls f with a null pointer of the element type of a float32, bfloat16 or float16 tensor.
template <class F>
void by_type(Dtype dtype, F&& f) {
  if (dtype == Dtype::f32) return f(static_cast<float*>(nullptr));
  if (dtype == Dtype::bf16) return f(static_cast<__nv_bfloat16*>(nullptr));
  f(static_cast<__half*>(nullptr));
}

// Of float32, bfloat16 and float16.
inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Whether every row begins at a multiple of 16 bytes.
inline bool aligned(const View& x) {
  const int64_t bytes = bytes_of(x.dtype);
  bool fits = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int i = 0; i + 1 < x.rank; ++i) fits = fits && x.stride[i] * bytes % 16 == 0;
  return fits;
}

}  // namespace condense::cuda
