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
//
// Specification: condense_core/ops/reference/attention_pool.py.
#include "cuda/cuda.h"
#include "cuda/device.h"
#include "cuda/rows.h"

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

template <class T>
__device__ inline void unpack(const uint4& chunk, const T*, float* to) {
  T values[kPer];
  memcpy(values, &chunk, sizeof(chunk));
  for (int e = 0; e < kPer; ++e) to[e] = widen(values[e]);
}

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
  if (chunks <= 1) return launch(pool_window<T, 1, 4>, grid, block, stream, pool, windows);
  if (chunks <= 2) return launch(pool_window<T, 2, 4>, grid, block, stream, pool, windows);
  launch(pool_window<T, 4, 2>, grid, block, stream, pool, windows);
}

}  // namespace

void attention_pool(const View& x, const View& q, int64_t ratio, int64_t seqlen, const View& cu_seqlens,
                    const View& row_offsets, int64_t halo, double scale, const View& norm_weight,
                    const View& window_bias, double eps, const View& out, const View& lse, uintptr_t stream) {
  constexpr const char* op = "attention_pool";
  CONDENSE_CHECK_SHAPE(x, kAny, kSome);
  check_dtype(op, "x", x, dtypes({Dtype::bf16, Dtype::f16}));
  CONDENSE_CHECK_ROWS(x);
  CONDENSE_CHECK_SHAPE(out, kAny, x.size[1]);
  const int64_t num_tokens = x.size[0], d = x.size[1], rows = out.size[0];
  CONDENSE_CHECK_PACKED(out, x.dtype, rows, d);
  if (q.rank == 3) {
    CONDENSE_CHECK_PACKED(q, Dtype::f32, rows, kSome, kSome);
  } else {
    CONDENSE_CHECK_PACKED(q, Dtype::f32, kSome, kSome);
  }
  const int64_t heads = q.size[q.rank - 2], head_dim = q.size[q.rank - 1], lanes = head_dim / kPer;
  CONDENSE_CHECK(heads * head_dim == d, "q has ", heads, " heads of ", head_dim,
                 " columns, expected them to make up x's ", d);
  CONDENSE_CHECK(head_dim % kPer == 0 && (lanes & (lanes - 1)) == 0 && lanes <= 32, "q has heads of ", head_dim,
                 " columns, expected 8, 16, 32, 64, 128 or 256");
  CONDENSE_CHECK(d <= 4 * kThreads * kPer, "x has ", d, " columns, expected at most ", int64_t{4 * kThreads * kPer});
  CONDENSE_CHECK(aligned(x) || empty(x), "x has rows at odd addresses, expected them at multiples of 16 bytes");
  CONDENSE_CHECK_PACKED(lse, Dtype::f32, rows, heads);
  constexpr int64_t kMost = int64_t{1} << 30;
  CONDENSE_CHECK(ratio >= 1 && ratio <= kMost, "ratio is ", ratio, ", expected 1 to 2^30");
  CONDENSE_CHECK(halo >= 0 && halo <= kMost / 2, "halo is ", halo, ", expected 0 to 2^29");
  CONDENSE_CHECK(rows < kMost, "out has ", rows, " rows, expected fewer than 2^30");
  if (norm_weight) CONDENSE_CHECK_PACKED(norm_weight, Dtype::f32, d);
  if (window_bias) CONDENSE_CHECK_PACKED(window_bias, Dtype::f32, heads, ratio + 2 * halo);
  CONDENSE_CHECK(bool(cu_seqlens) == bool(row_offsets), "cu_seqlens and row_offsets are expected together, or neither");
  const int64_t seq_rows = (seqlen + ratio - 1) / ratio;  // of a sequence, where all have one length
  if (cu_seqlens) {
    CONDENSE_CHECK_PACKED(cu_seqlens, Dtype::i64, kSome);
    CONDENSE_CHECK_PACKED(row_offsets, Dtype::i64, cu_seqlens.size[0]);
  } else {
    const int64_t sequences = seq_rows > 0 ? rows / seq_rows : 0;
    CONDENSE_CHECK(seqlen >= 0 && seqlen * sequences == num_tokens && seq_rows * sequences == rows, "seqlen is ",
                   seqlen, ", expected sequences of it to make up ", num_tokens, " tokens and ", rows, " rows");
  }
  Pool pool{};
  pool.x = x.data, pool.x_row = x.stride[0], pool.q = q.as<const float>();
  pool.w = norm_weight ? norm_weight.as<const float>() : nullptr;
  pool.bias = window_bias ? window_bias.as<const float>() : nullptr;
  pool.bias_width = window_bias ? static_cast<int>(window_bias.size[1]) : 0;
  pool.out = out.data, pool.lse = lse.as<float>();
  pool.d = static_cast<int>(d), pool.heads = static_cast<int>(heads), pool.lanes = static_cast<int>(lanes);
  pool.own_queries = q.rank == 3, pool.scale = static_cast<float>(scale), pool.eps = static_cast<float>(eps);
  Windows windows{nullptr, nullptr, ratio, halo, seqlen, 1, static_cast<unsigned>(seq_rows)};
  if (cu_seqlens) {
    windows.cu_seqlens = cu_seqlens.as<const int64_t>(), windows.row_offsets = row_offsets.as<const int64_t>();
    windows.sequences = static_cast<int>(cu_seqlens.size[0] - 1);
  }
  if (rows == 0) return;
  x.dtype == Dtype::bf16 ? run<__nv_bfloat16>(pool, windows, rows, stream) : run<__half>(pool, windows, rows, stream);
}

}  // namespace condense::cuda
