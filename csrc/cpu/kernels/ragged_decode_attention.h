// ragged_decode_attention: one query per head, [B, H, D], over the rows [T, D] that its KV head kept.
//
// Every key and value is read once and serves the H/G query heads that share it: bound by memory. The rows of a head
// are cut into splits of 512, whatever the number of threads, so that a few long heads occupy all of them. A split
// first writes all of its logits, [H/G, 512] in the thread's own scratch, and then its softmax against its own maximum;
// the splits of a head are combined in their order, so that the same call gives the same bits.
//
// Specification: condense_core/ops/reference/ragged_decode_attention.py.
#pragma once

#include "cpu/kernels/compact.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace condense::cpu::CONDENSE_ISA {

constexpr int64_t kSplitRows = 512;

// logits [group, kSplitRows] = <q [group, width], row> over `rows` rows; q holds zeros behind D.
template <class T>
inline void decode_logits(const float* q, int64_t group, int64_t width, const T* k, int64_t stride, int64_t rows,
                          int64_t d, float* logits) {
  constexpr int kTogether = 4;  // query heads for one conversion of a key
  for (int64_t i = 0; i < rows; ++i) {
    const T* key = k + i * stride;
    int64_t h = 0;
    for (; h + kTogether <= group; h += kTogether) {
      Vec sums[kTogether] = {};
      int64_t c = 0;
      for (; c + kWidth <= d; c += kWidth) {
        const Vec x = load(key + c);
        for (int u = 0; u < kTogether; ++u) sums[u] = fma(x, load(q + (h + u) * width + c), sums[u]);
      }
      if (c < d) {
        const Vec x = load_part(key + c, d - c);
        for (int u = 0; u < kTogether; ++u) sums[u] = fma(x, load(q + (h + u) * width + c), sums[u]);
      }
      for (int u = 0; u < kTogether; ++u) logits[(h + u) * kSplitRows + i] = sum(sums[u]);
    }
    for (; h < group; ++h) {
      Vec a{};
      for (int64_t c = 0; c < d; c += kWidth) {
        a = fma(c + kWidth <= d ? load(key + c) : load_part(key + c, d - c), load(q + h * width + c), a);
      }
      logits[h * kSplitRows + i] = sum(a);
    }
  }
}

// logits [rows] become weights e^(logit - maximum); returns the maximum and, in `total`, their sum. Up to a
// multiple of 16 rows, weights of 0 follow.
CONDENSE_INLINE float split_weights(float* logits, int64_t rows, float& total) {
  for (int64_t i = rows; i % 16; ++i) logits[i] = -INFINITY;
  Vec highest = splat(-INFINITY), sums{};
  for (int64_t i = 0; i < rows; i += kWidth) highest = max(load(logits + i), highest);
  const float most = max(highest);
  const Vec shift = splat(most == -INFINITY ? 0.0f : most);  // where all are -inf, all weights are 0
  for (int64_t i = 0; i < (rows + 15) / 16 * 16; i += kWidth) {
    const Vec weight = exp(load(logits + i) - shift);
    sums += weight;
    store(logits + i, weight);
  }
  total = sum(sums);
  return most;
}

// out [group, width] += sum over rows of weights [group, kSplitRows] times row.
template <class T>
inline void decode_values(const float* weights, int64_t group, int64_t width, const T* v, int64_t stride, int64_t rows,
                          int64_t d, float* out) {
  constexpr int kTogether = 8;  // rows for one reading and writing of the sums
  for (int64_t first = 0; first < rows; first += kTogether) {
    const int count = static_cast<int>(rows - first < kTogether ? rows - first : kTogether);
    for (int64_t c = 0; c < d; c += kWidth) {
      const bool part = c + kWidth > d;
      Vec x[kTogether];
      if (count == kTogether && !part) {
        for (int r = 0; r < kTogether; ++r) x[r] = load(v + (first + r) * stride + c);
      } else {
        for (int r = 0; r < kTogether; ++r) {
          const T* value = v + (first + r) * stride + c;
          x[r] = r >= count ? Vec{} : part ? load_part(value, d - c) : load(value);
        }
      }
      for (int64_t h = 0; h < group; ++h) {
        const float* weight = weights + h * kSplitRows + first;
        Vec total = load(out + h * width + c);
        for (int r = 0; r < kTogether; ++r) total = fma(splat(weight[r]), x[r], total);
        store(out + h * width + c, total);
      }
    }
  }
}

inline void ragged_decode_attention(const View& q, const View& k, const View& v, const View& cu_seqlens,
                                    const View& lengths, double scale, const View& out, int threads) {
  constexpr const char* op = "ragged_decode_attention";
  CONDENSE_CHECK_FLOAT(q, 3);
  CONDENSE_CHECK_SHAPE(q, kSome, kSome, kSome);
  const int64_t batch = q.size[0], num_heads = q.size[1], head_dim = q.size[2];
  CONDENSE_CHECK_ROWS(q);
  CONDENSE_CHECK_SHAPE(k, kAny, head_dim);
  CONDENSE_CHECK_SHAPE(v, k.size[0], head_dim);
  CONDENSE_CHECK_SAME_DTYPE(k, q);
  CONDENSE_CHECK_SAME_DTYPE(v, q);
  CONDENSE_CHECK_ROWS(k);
  CONDENSE_CHECK_ROWS(v);
  CONDENSE_CHECK_INTEGER(cu_seqlens, 1);
  const int64_t heads = cu_seqlens.size[0] - 1;
  CONDENSE_CHECK(heads >= batch && heads % batch == 0, "cu_seqlens has ", cu_seqlens.size[0],
                 " offsets, expected B*G + 1 with B ", batch);
  CONDENSE_CHECK_HEADS("q", num_heads, heads / batch);
  if (lengths) {
    CONDENSE_CHECK_INTEGER(lengths, 1);
    CONDENSE_CHECK_SHAPE(lengths, heads);
  }
  CONDENSE_CHECK_PACKED(out, q.dtype, batch, num_heads, head_dim);
  const int64_t kv_heads = heads / batch, group = num_heads / kv_heads,
                width = (head_dim + kWidth - 1) / kWidth * kWidth;
  if (threads < 1) threads = 1;
  const auto valid_rows = [&](int64_t n, int64_t& start, int64_t& count) {
    ragged_part(cu_seqlens, n, k.size[0], start, count);
    if (lengths) count = clamped(integer_at(lengths, n * lengths.stride[0]), 0, count);
  };
  int64_t num_splits = 0;
  for (int64_t n = 0; n < heads; ++n) {
    int64_t start, count;
    valid_rows(n, start, count);
    num_splits += (count + kSplitRows - 1) / kSplitRows;
  }
  // The split's head, its sums [group, width], maximum and total of each of the group; then the threads' logits and q.
  struct Split {
    int64_t head, start, rows;
  };
  const int64_t split_floats = group * (width + 2), own_floats = (group * (kSplitRows + width) + 15) / 16 * 16;
  const int64_t floats = num_splits * split_floats + 16 + threads * own_floats;
  const Scratch scratch(floats * 4 + (num_splits + heads + 1) * static_cast<int64_t>(sizeof(Split)));
  float* const parts = scratch.at<float>(0);
  float* const own = parts + (num_splits * split_floats + 15) / 16 * 16;
  Split* const splits = scratch.at<Split>((floats * 4 + 7) / 8 * 8);
  int64_t* const first_split = reinterpret_cast<int64_t*>(splits + num_splits);  // [heads + 1]
  num_splits = 0;
  for (int64_t n = 0; n < heads; ++n) {
    int64_t start, count;
    valid_rows(n, start, count);
    first_split[n] = num_splits;
    for (int64_t row = 0; row < count; row += kSplitRows) {
      splits[num_splits++] = {n, start + row, count - row < kSplitRows ? count - row : kSplitRows};
    }
  }
  first_split[heads] = num_splits;
  by_dtype(q.dtype, [&]<class T>(T*) {
    parallel_for(num_splits, threads, [&](int64_t s, int worker) {
      const Split split = splits[s];
      float *const logits = own + worker * own_floats, *const queries = logits + group * kSplitRows;
      const int64_t b = split.head / kv_heads, h = split.head % kv_heads * group;
      for (int64_t u = 0; u < group; ++u) {
        const T* query = q.as<const T>() + b * q.stride[0] + (h + u) * q.stride[1];
        for (int64_t c = 0; c < head_dim; c += kWidth) {
          const Vec x = c + kWidth <= head_dim ? load(query + c) : load_part(query + c, head_dim - c);
          store(queries + u * width + c, splat(static_cast<float>(scale)) * x);
        }
      }
      decode_logits(queries, group, width, k.as<const T>() + split.start * k.stride[0], k.stride[0], split.rows,
                    head_dim, logits);
      float* const sums = parts + s * split_floats;
      for (int64_t u = 0; u < group; ++u) {
        float* const row = sums + group * width + 2 * u;
        row[0] = split_weights(logits + u * kSplitRows, split.rows, row[1]);
      }
      for (int64_t c = 0; c < group * width; c += kWidth) store(sums + c, Vec{});
      decode_values(logits, group, width, v.as<const T>() + split.start * v.stride[0], v.stride[0], split.rows,
                    head_dim, sums);
    });
    parallel_for(heads, threads, [&](int64_t n, int) {
      const int64_t begin = first_split[n], end = first_split[n + 1];
      for (int64_t u = 0; u < group; ++u) {
        const auto state = [&](int64_t s) { return parts + s * split_floats + group * width + 2 * u; };
        float most = -INFINITY, total = 0.0f;
        for (int64_t s = begin; s < end; ++s) most = state(s)[0] > most ? state(s)[0] : most;
        for (int64_t s = begin; s < end; ++s) {  // the maximum of a split becomes the factor on its sums
          float* const own_state = state(s);
          own_state[0] = own_state[0] == most ? 1.0f : exp(splat(own_state[0] - most))[0];
          total += own_state[0] * own_state[1];
        }
        T* const row = out.as<T>() + (n * group + u) * head_dim;
        for (int64_t c = 0; c < head_dim; c += kWidth) {
          Vec sum{};
          for (int64_t s = begin; s < end; ++s) {
            sum = fma(splat(state(s)[0]), load(parts + s * split_floats + u * width + c), sum);
          }
          if (begin < end) sum = sum / splat(total);
          if (c + kWidth <= head_dim) {
            store(row + c, sum);
          } else {
            store_part(row + c, sum, head_dim - c);
          }
        }
      }
    });
  });
}

}  // namespace condense::cpu::CONDENSE_ISA
