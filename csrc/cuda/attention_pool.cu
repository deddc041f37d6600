// attention_pool forward for bf16 and fp16: as csrc/cpu/kernels/attention_pool.h, on a GPU. x [T, d], q [H, D] or [K,
// H, D] fp32, w [d] fp32, bias [H, ratio + 2 halo] fp32 -> out [K, d], lse [K, H] fp32. D / 8 a power of two, at
// most 32.
//
// A block takes a window. A thread owns chunks of 8 columns (16 bytes) and keeps its chunks of the window's tokens in
// registers, kTokens at a time: x is read from memory once, with all of these loads in flight before the first is used.
// A head's columns belong to D / 8 neighbouring lanes, so its logit is a shuffle away; only the mean square of a token
// needs the whole block, once for kTokens tokens. Wider windows go on with a running maximum.
//
// Reads 2 T d bytes and writes 2 K d: 17.9 MB at 1,750 x 4,096 and ratio 4, where a window is 32 KB of a block's
// registers.
#include "cuda/cuda.h"
#include "cuda/device.h"

namespace condense::cuda {

namespace {

constexpr int kThreads = CONDENSE_BLOCK(256);
constexpr int kPer = 8;  // columns of a chunk

struct Windows {
  const int64_t *cu_seqlens, *row_offsets;  // null: sequences of one length
  int64_t ratio, halo, length;
  int sequences;
  unsigned rows;  // of a sequence, if they have one length
};

struct Pool {
  const void* x;
  int64_t x_row;
  const float *q, *w, *bias;
  void* out;
  float* lse;
  int d, heads, lanes, bias_width;  // lanes: chunks of a head
  bool own_queries;
  float scale, eps;
};

__device__ inline void unpack(const uint4& chunk, const __nv_bfloat16*, float* to) {
  __nv_bfloat16 values[kPer];
  memcpy(values, &chunk, sizeof(chunk));
  for (int e = 0; e < kPer; ++e) to[e] = __bfloat162float(values[e]);
}
__device__ inline void unpack(const uint4& chunk, const __half*, float* to) {
  __half values[kPer];
  memcpy(values, &chunk, sizeof(chunk));
  for (int e = 0; e < kPer; ++e) to[e] = __half2float(values[e]);
}
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16(x); }
__device__ inline void narrow(float x, __half& to) { to = __float2half(x); }

template <class T, int kChunks, int kTokens>
__global__ void __launch_bounds__(kThreads, kChunks > 2 ? 1 : 2) pool_window(Pool pool, Windows windows) {
  __shared__ float squares[kTokens][kThreads / 32];
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  int64_t start, stop, j;
  if (windows.cu_seqlens == nullptr) {
    const unsigned sequence = blockIdx.x / windows.rows;
    start = sequence * windows.length, stop = start + windows.length, j = blockIdx.x - sequence * windows.rows;
  } else {
    int low = 0, high = windows.sequences;  // the last sequence that begins at or before the row, empty ones skipped
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (windows.row_offsets[middle] <= row)
        low = middle;
      else
        high = middle;
    }
    start = windows.cu_seqlens[low], stop = windows.cu_seqlens[low + 1], j = row - windows.row_offsets[low];
  }
  const int64_t begin = start + j * windows.ratio - windows.halo, end = start + (j + 1) * windows.ratio + windows.halo;
  const int64_t first = begin < start ? start : begin;
  // From here on tokens count from the first of the window.
  const int count = static_cast<int>((end < stop ? end : stop) - first), place = static_cast<int>(first - begin);
  const T* x = static_cast<const T*>(pool.x) + first * pool.x_row;

  float query[kChunks][kPer], sums[kChunks][kPer], top[kChunks], total[kChunks];
  for (int i = 0; i < kChunks; ++i) {
    const int column = (i * kThreads + thread) * kPer;
    top[i] = -INFINITY, total[i] = 0.0f;
    for (int e = 0; e < kPer; ++e) {
      const bool inside = column < pool.d;
      const float value = inside ? pool.q[(pool.own_queries ? row * pool.d : 0) + column + e] : 0.0f;
      query[i][e] = pool.scale * value * (inside && pool.w ? pool.w[column + e] : 1.0f);
      sums[i][e] = 0.0f;
    }
  }
  for (int base = 0; base < count; base += kTokens) {
    uint4 chunk[kTokens][kChunks];
    for (int t = 0; t < kTokens; ++t) {
      for (int i = 0; i < kChunks; ++i) {
        const int column = (i * kThreads + thread) * kPer;
        chunk[t][i] = uint4{0, 0, 0, 0};
        if (base + t < count && column < pool.d) {
          chunk[t][i] = *reinterpret_cast<const uint4*>(x + (base + t) * pool.x_row + column);
        }
      }
    }
    float dots[kTokens][kChunks];
    for (int t = 0; t < kTokens; ++t) {
      float square = 0.0f;
      for (int i = 0; i < kChunks; ++i) {
        float values[kPer];
        unpack(chunk[t][i], static_cast<const T*>(nullptr), values);
        float dot = 0.0f;
        for (int e = 0; e < kPer; ++e) {
          square += values[e] * values[e];
          dot += values[e] * query[i][e];
        }
        for (int distance = 1; distance < pool.lanes; distance *= 2) dot += __shfl_xor_sync(0xffffffffu, dot, distance);
        dots[t][i] = dot;
      }
      for (int distance = 1; distance < 32; distance *= 2) square += __shfl_xor_sync(0xffffffffu, square, distance);
      if (thread % 32 == 0) squares[t][thread / 32] = square;
    }
    __syncthreads();
    float inverse[kTokens];
    for (int t = 0; t < kTokens; ++t) {
      float square = 0.0f;
      for (int warp = 0; warp < kThreads / 32; ++warp) square += squares[t][warp];
      inverse[t] = 1.0f / sqrtf(square / static_cast<float>(pool.d) + pool.eps);
    }
    __syncthreads();  // read by all before the next tokens are written
    for (int i = 0; i < kChunks; ++i) {
      const int column = (i * kThreads + thread) * kPer;
      if (column >= pool.d) continue;
      const float* bias =
          pool.bias ? pool.bias + column / (pool.lanes * kPer) * pool.bias_width + place + base : nullptr;
      float most = top[i];
      for (int t = 0; t < kTokens; ++t) {
        if (base + t >= count) break;
        dots[t][i] = dots[t][i] * inverse[t] + (bias ? bias[t] : 0.0f);
        most = dots[t][i] > most ? dots[t][i] : most;
      }
      const float factor = top[i] == -INFINITY ? 0.0f : expf(top[i] - most);
      top[i] = most;
      if (most == -INFINITY) most = 0.0f;  // every place so far is shut out by the bias: weights of 0, not NaN
      total[i] *= factor;
      for (int e = 0; e < kPer; ++e) sums[i][e] *= factor;
      for (int t = 0; t < kTokens; ++t) {
        if (base + t >= count) break;
        const float p = expf(dots[t][i] - most), weight = p * inverse[t];
        float values[kPer];
        unpack(chunk[t][i], static_cast<const T*>(nullptr), values);
        total[i] += p;
        for (int e = 0; e < kPer; ++e) sums[i][e] += weight * values[e];
      }
    }
  }
  for (int i = 0; i < kChunks; ++i) {
    const int c = i * kThreads + thread, column = c * kPer;
    if (column >= pool.d) continue;
    T values[kPer];
    for (int e = 0; e < kPer; ++e) narrow(sums[i][e] / total[i] * (pool.w ? pool.w[column + e] : 1.0f), values[e]);
    memcpy(static_cast<T*>(pool.out) + row * pool.d + column, values, sizeof(values));
    if (c % pool.lanes == 0) pool.lse[row * pool.heads + c / pool.lanes] = top[i] + logf(total[i]);
  }
}

template <class T>
void run(const Pool& pool, const Windows& windows, int64_t rows, uintptr_t stream) {
  const dim3 grid(static_cast<unsigned>(rows)), block(kThreads);
  const int chunks = (pool.d + kThreads * kPer - 1) / (kThreads * kPer);
  require(chunks <= 4, "attention_pool: d is larger than the kernel takes");
  if (chunks <= 1) return launch(pool_window<T, 1, 4>, grid, block, stream, pool, windows);
  if (chunks <= 2) return launch(pool_window<T, 2, 4>, grid, block, stream, pool, windows);
  launch(pool_window<T, 4, 2>, grid, block, stream, pool, windows);
}

}  // namespace

void attention_pool(const View& x, const View& q, int64_t ratio, int64_t length, const View& cu_seqlens,
                    const View& row_offsets, int64_t halo, double scale, const View& norm_weight,
                    const View& window_bias, double eps, const View& out, const View& lse, uintptr_t stream) {
  require(x.rank == 2 && (x.dtype == Dtype::bf16 || x.dtype == Dtype::f16),
          "attention_pool: x must be [T, d], 16 bits");
  require(q.dtype == Dtype::f32 && out.dtype == x.dtype && x.stride[1] == 1, "attention_pool: q must be float32");
  const int64_t d = x.size[1], heads = q.size[q.rank - 2], lanes = d / heads / kPer;
  require(d / heads % kPer == 0 && (lanes & (lanes - 1)) == 0 && lanes <= 32, "attention_pool: D / 8 must be 1 to 32");
  require(reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride[0] % 8 == 0,
          "attention_pool: rows must be aligned");
  Pool pool{};
  pool.x = x.data, pool.x_row = x.stride[0], pool.q = q.as<const float>();
  pool.w = norm_weight ? norm_weight.as<const float>() : nullptr;
  pool.bias = window_bias ? window_bias.as<const float>() : nullptr;
  pool.bias_width = window_bias ? static_cast<int>(window_bias.size[1]) : 0;
  pool.out = out.data, pool.lse = lse.as<float>();
  pool.d = static_cast<int>(d), pool.heads = static_cast<int>(heads), pool.lanes = static_cast<int>(lanes);
  pool.own_queries = q.rank == 3, pool.scale = static_cast<float>(scale), pool.eps = static_cast<float>(eps);
  const int64_t rows = (length + ratio - 1) / ratio;
  require(cu_seqlens || (rows > 0 ? length * (out.size[0] / rows) == x.size[0] : out.size[0] == 0),
          "attention_pool: sequences of another length");
  Windows windows{nullptr, nullptr, ratio, halo, length, 1, static_cast<unsigned>(rows)};
  if (cu_seqlens) {
    windows.cu_seqlens = cu_seqlens.as<const int64_t>(), windows.row_offsets = row_offsets.as<const int64_t>();
    windows.sequences = static_cast<int>(cu_seqlens.size[0] - 1);
  }
  if (out.size[0] == 0) return;
  x.dtype == Dtype::bf16 ? run<__nv_bfloat16>(pool, windows, out.size[0], stream)
                         : run<__half>(pool, windows, out.size[0], stream);
}

}  // namespace condense::cuda
