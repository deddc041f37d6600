// non_causal_chunks: out [B, G, N] fp32, the attention that each key gets from all queries of its chunk, mean over the
// group. q [B, H, N, D], k [B, G, N, D].
//
// A task is a chunk of a KV head: its keys are packed once for the group's queries, whose logits, 64 rows at a time,
// are normalised and added to the keys' sums while they are in the cache.
//
// Specification: condense_core/ops/reference/non_causal_chunks.py.
#pragma once

#include "cpu/bounds.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace condense::cpu::CONDENSE_ISA {

static inline void non_causal_chunks(const View& q, const View& k, int64_t chunk_size, double scale, const View& bounds,
                                     const View& out, int threads) {
  constexpr const char* op = "non_causal_chunks";
  CONDENSE_CHECK_HEADS_OF_ROWS(k);
  const int64_t batch = k.size[0], kv_heads = k.size[1], num_tokens = k.size[2], head_dim = k.size[3];
  CONDENSE_CHECK_SHAPE(q, batch, kAny, num_tokens, head_dim);
  CONDENSE_CHECK_HEADS("q", q.size[1], kv_heads);
  CONDENSE_CHECK_SAME_DTYPE(q, k);
  CONDENSE_CHECK_ROWS(q);
  CONDENSE_CHECK_POSITIVE(chunk_size);
  CONDENSE_CHECK_BOUNDS(bounds, batch);
  CONDENSE_CHECK_PACKED(out, Dtype::f32, batch, kv_heads, num_tokens);
  if (num_tokens == 0) return;
  if (chunk_size > num_tokens) chunk_size = num_tokens;  // scratch grows with it
  const int64_t heads = batch * kv_heads, group = q.size[1] / kv_heads;
  const int64_t chunks = (num_tokens + chunk_size - 1) / chunk_size;
  constexpr int64_t kQueries = 64;
  const int64_t columns = columns_of(chunk_size);
  const float factor = static_cast<float>(scale);

  by_dtype(k.dtype, [&]<class T>(T*) {
    using F = Factor<T>;
    const int64_t depth = depth_of<F>(head_dim);
    const int64_t panel_bytes = round_up(columns * depth * sizeof(F), 64);
    const int64_t query_bytes = round_up(kQueries * depth * sizeof(F), 64);
    const int64_t per_thread = panel_bytes + query_bytes + kQueries * columns * static_cast<int64_t>(sizeof(float));
    Scratch scratch(threads * per_thread);

    parallel_for(heads, threads, [&](int64_t head, int) {  // padding; chunks fill in the rest
      float* scores = out.as<float>() + head * num_tokens;
      const Span real = real_tokens(bounds, head / kv_heads, num_tokens);
      for (int64_t i = 0; i < num_tokens; ++i) scores[i] = i < real.start || i >= real.stop ? -INFINITY : 0.0f;
    });
    parallel_for(heads * chunks, threads, [&](int64_t task, int worker) {
      const int64_t head = task / chunks, b = head / kv_heads, g = head % kv_heads;
      const Span real = real_tokens(bounds, b, num_tokens);
      const int64_t first = real.start + task % chunks * chunk_size;
      if (first >= real.stop) return;
      const int64_t count = real.stop - first < chunk_size ? real.stop - first : chunk_size;
      F* panels = scratch.at<F>(worker * per_thread);
      F* rows = scratch.at<F>(worker * per_thread + panel_bytes);
      float* logits = scratch.at<float>(worker * per_thread + panel_bytes + query_bytes);
      float* scores = out.as<float>() + head * num_tokens + first;
      pack(k.as<const T>() + b * k.stride[0] + g * k.stride[1] + first * k.stride[2], k.stride[2], count, head_dim,
           panels);
      const Tiles<F> tiles;
      for (int64_t h = g * group; h < (g + 1) * group; ++h) {
        const T* queries = q.as<const T>() + b * q.stride[0] + h * q.stride[1] + first * q.stride[2];
        for (int64_t from = 0; from < count; from += kQueries) {
          const int64_t m = count - from < kQueries ? count - from : kQueries;
          copy_rows(queries + from * q.stride[2], q.stride[2], m, head_dim, rows);
          multiply(rows, m, panels, count, depth, logits, columns);
          float weight[kQueries];
          for (int64_t r = 0; r < m; ++r) {
            float* row = logits + r * columns;
            Vec highest = splat(-INFINITY), total{};
            for (int64_t j = 0; j < count; j += kWidth) {
              const int64_t n = count - j;
              const Vec value = load(row + j) * splat(factor);
              store(row + j, value);
              highest = max(n >= kWidth ? value : load_part(row + j, n, -INFINITY), highest);
            }
            const Vec most = splat(max(highest));
            for (int64_t j = 0; j < count; j += kWidth) {
              const int64_t n = count - j;
              store(row + j, exp(load(row + j) - most));
              total += load_up_to(row + j, n);
            }
            weight[r] = 1.0f / (sum(total) * static_cast<float>(group));
          }
          for (int64_t j = 0; j < count; j += kWidth) {
            Vec sums = load_up_to(scores + j, count - j);
            for (int64_t r = 0; r < m; ++r) sums = fma(load(logits + r * columns + j), splat(weight[r]), sums);
            store_up_to(scores + j, sums, count - j);
          }
        }
      }
    });
  });
}

}  // namespace condense::cpu::CONDENSE_ISA
