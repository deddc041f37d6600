// select: the tokens with the highest scores of each row, a row being a head or, across heads, a sequence. scores
// [B, G, N] fp32 -> indices int64, ascending, and counts [B, G] int64.
//
// One block of 1,024 threads for a row. Scores become 32-bit keys that order as they do (padding 0, NaN 1, protected
// tokens as +inf); three passes over the row find the key of the last token to keep, 11, 11 and 10 bits at a time, from
// histograms in shared memory; a fourth emits what lies above it and the first of its equals, in order of position,
// with a scan over the block. Keys are made anew in each pass: the row's 128 KiB at N = 32,768 stay in the L2 cache. No
// atomics but on counts, so the same bits every time; nothing waits for the host; no workspace.
//
// Scores cluster in a few exponents, so that neighbours often fall into one bin, where shared atomics would queue:
// lanes of a warp with equal digits are counted together (match_any) and added once.
//
// Reads 4 x 4 N bytes a row (the first time from memory) and writes 8 bytes a kept token: at N = 32,768 and 8 heads
// 1.0 MB from memory, 0.5 MB written. By instructions rather than bytes: 32 keys a thread and pass.
//
// Specification: condense_core/ops/reference/select.py.
#include "cuda/cuda.h"
#include "cuda/device.h"

namespace condense::cuda {

namespace {

constexpr int kThreads = CONDENSE_BLOCK(1024);
constexpr int kEach = 4;  // consecutive tokens of a thread in a tile
constexpr int kBins = 2048;

struct Rows {
  const float* scores;
  int64_t stride[3];
  int kv_heads, num_tokens, heads_per_row;
  const void* protect;
  int64_t protect_stride[3];
  int num_ranges;
  bool protect_per_sequence, protect_wide;

  __device__ int64_t bound(int64_t offset) const {
    return protect_wide ? static_cast<const int64_t*>(protect)[offset] : static_cast<const int32_t*>(protect)[offset];
  }

  // Of token `element` of row `row`: its heads follow each other.
  __device__ unsigned key(int row, int element) const {
    const int within = heads_per_row == 1 ? 0 : element / num_tokens, i = element - within * num_tokens;
    const int head = row * heads_per_row + within, b = head / kv_heads;
    const float score = scores[b * stride[0] + head % kv_heads * stride[1] + i * stride[2]];
    if (score == -INFINITY) return 0;
    const int64_t base = protect_per_sequence ? b * protect_stride[0] : 0;
#pragma unroll 1
    for (int r = 0; r < num_ranges; ++r) {
      const int64_t at = base + r * protect_stride[1];
      if (i >= bound(at) && i < bound(at + protect_stride[2])) return 0xff800000u;
    }
    if (score != score) return 1;
    const unsigned bits = score == 0.0f ? 0u : __float_as_uint(score);  // -0 is 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
};

// The sum of `value` over the threads before this one, and over all of them in `total`. Every thread must come.
__device__ int exclusive_sum(int value, int* warp_sums, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
  for (int delta = 1; delta < 32; delta *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, sum, delta);
    if (lane >= delta) sum += before;
  }
  __syncthreads();  // of the last use of warp_sums
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int base = 0;
  total = 0;
#pragma unroll 1
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) base += warp_sums[w];
    total += warp_sums[w];
  }
  return base + sum - value;
}

// One block on a multiprocessor: there are as many rows as heads, far fewer than multiprocessors.
__global__ void __launch_bounds__(kThreads, 1)
    select_rows(Rows rows, int length, int share, int64_t* indices, unsigned long long* counts) {
  __shared__ int histogram[kBins];
  __shared__ int warp_sums[kThreads / 32];
  __shared__ unsigned chosen_digit;
  __shared__ int still_wanted, wanted_in_all;
  const int row = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  indices += static_cast<int64_t>(row) * share;
  for (int g = thread; g < rows.heads_per_row; g += kThreads) counts[row * rows.heads_per_row + g] = 0;

  unsigned prefix = 0;  // digits of the last kept key, as far as they are known
  int wanted = 0;       // tokens to keep among those with this prefix
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bins = pass == 2 ? 1024 : kBins;
    for (int bin = thread; bin < kBins; bin += kThreads) histogram[bin] = 0;
    __syncthreads();
    for (int base = 0; base < length; base += kThreads) {
      const int element = base + thread;
      const unsigned key = element < length ? rows.key(row, element) : 0;
      const bool counted = key != 0 && (pass == 0 || key >> (pass == 1 ? 21 : 10) == prefix);
      const unsigned digit = counted ? key >> shift & (bins - 1) : kBins;
      const unsigned equal = __match_any_sync(0xffffffffu, digit);
      if (counted && __ffs(equal) - 1 == thread % 32) atomicAdd(&histogram[digit], __popc(equal));
    }
    __syncthreads();
    // From the top: each thread takes neighbouring bins, the scan tells how many tokens lie above them.
    const int per_thread = (bins + kThreads - 1) / kThreads;
    int own = 0;
    for (int j = 0; j < per_thread; ++j) {
      const int bin = bins - 1 - (thread * per_thread + j);
      if (bin >= 0) own += histogram[bin];
    }
    int total;
    int above = exclusive_sum(own, warp_sums, total);
    if (pass == 0) {
      wanted = share < total ? share : total;
      if (thread == 0) wanted_in_all = wanted;
    }
    if (wanted == 0) break;  // the same for all threads: nothing to keep
    for (int j = 0; j < per_thread; ++j) {
      const int bin = bins - 1 - (thread * per_thread + j);
      if (bin < 0) break;
      if (above < wanted && above + histogram[bin] >= wanted) chosen_digit = bin, still_wanted = wanted - above;
      above += histogram[bin];
    }
    __syncthreads();
    prefix = prefix << (pass == 2 ? 10 : 11) | chosen_digit;
    wanted = still_wanted;
    __syncthreads();
  }
  __syncthreads();
  const int kept_in_all = wanted_in_all;

  // Tokens above the last key, and the first `wanted` equal to it.
  int kept = 0, equals = 0;
  for (int base = 0; kept_in_all > 0 && base < length; base += kThreads * kEach) {
    const int first = base + thread * kEach;
    unsigned above_bits = 0, equal_bits = 0;
    for (int j = 0; j < kEach; ++j) {
      const unsigned key = first + j < length ? rows.key(row, first + j) : 0;
      above_bits |= static_cast<unsigned>(key > prefix) << j;
      equal_bits |= static_cast<unsigned>(key == prefix && key != 0) << j;
    }
    int tile_equals, tile_kept;
    int equal_rank = equals + exclusive_sum(__popc(equal_bits), warp_sums, tile_equals);
    unsigned keep = above_bits;
    for (int j = 0; j < kEach; ++j) {
      if (equal_bits >> j & 1 && equal_rank++ < wanted) keep |= 1u << j;
    }
    int place = kept + exclusive_sum(__popc(keep), warp_sums, tile_kept);
    int run = 0;  // kept tokens of one head
    for (int j = 0; j < kEach; ++j) {
      if (!(keep >> j & 1)) continue;
      const int element = first + j;
      indices[place++] = element % rows.num_tokens;
      ++run;
      const unsigned rest = j + 1 < kEach ? keep >> (j + 1) : 0;
      const int next = element + __ffs(rest);
      if (!rest || next / rows.num_tokens != element / rows.num_tokens) {
        atomicAdd(&counts[row * rows.heads_per_row + element / rows.num_tokens], static_cast<unsigned long long>(run));
        run = 0;
      }
    }
    kept += tile_kept;
    equals += tile_equals;
  }
  for (int place = kept_in_all + thread; place < share; place += kThreads) indices[place] = -1;
}

}  // namespace

void select(const View& scores, int64_t budget, bool across_heads, const View& protect, const View& indices,
            const View& counts, uintptr_t stream) {
  constexpr const char* op = "select";
  CONDENSE_CHECK_SHAPE(scores, kAny, kAny, kAny);
  CONDENSE_CHECK_DTYPE(scores, Dtype::f32);
  const int64_t batch = scores.size[0], kv_heads = scores.size[1], num_tokens = scores.size[2];
  CONDENSE_CHECK(kv_heads * num_tokens < (int64_t{1} << 30), "scores has ", kv_heads * num_tokens,
                 " entries for a sequence, expected fewer than 2^30");
  CONDENSE_CHECK_NOT_NEGATIVE(budget);
  if (protect) {
    CONDENSE_CHECK_INTEGER(protect, 3);
    CONDENSE_CHECK_SHAPE(protect, protect.size[0] == 1 ? 1 : batch, kAny, 2);
  }
  if (budget > num_tokens) budget = num_tokens;
  if (across_heads) {
    CONDENSE_CHECK_PACKED(indices, Dtype::i64, batch, kv_heads * budget);
  } else {
    CONDENSE_CHECK_PACKED(indices, Dtype::i64, batch, kv_heads, budget);
  }
  CONDENSE_CHECK_PACKED(counts, Dtype::i64, batch, kv_heads);
  if (batch * kv_heads == 0) return;
  Rows rows{};
  rows.scores = scores.as<const float>();
  for (int i = 0; i < 3; ++i) rows.stride[i] = scores.stride[i];
  rows.kv_heads = static_cast<int>(kv_heads);
  rows.num_tokens = static_cast<int>(num_tokens);
  rows.heads_per_row = across_heads ? rows.kv_heads : 1;
  if (protect) {
    rows.protect = protect.data;
    for (int i = 0; i < 3; ++i) rows.protect_stride[i] = protect.stride[i];
    rows.num_ranges = static_cast<int>(protect.size[1]);
    rows.protect_per_sequence = protect.size[0] > 1;
    rows.protect_wide = protect.dtype == Dtype::i64;
  }
  const int64_t length = num_tokens * rows.heads_per_row, share = budget * rows.heads_per_row;
  launch(select_rows, dim3(static_cast<unsigned>(batch * kv_heads / rows.heads_per_row)), dim3(kThreads), stream, rows,
         static_cast<int>(length), static_cast<int>(share), indices.as<int64_t>(), counts.as<unsigned long long>());
}

}  // namespace condense::cuda
