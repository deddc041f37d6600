// value_projection_norm: out [B, G, N] = mean over the query heads h of a group of ||W_h v_i||_1, W_h the columns of
// w_o [d_model, H D] that read head h. v [B, G, N, D].
//
// All of its time is products, 2 H N D d_model operations, so the only question is what they wait for: the values of a
// task (up to 2,048 tokens) and a block of W stay in a core's caches, and a tile of W v, small enough for the first
// level, is summed up as soon as it is there. W v itself, N x d_model a head, never exists.
//
// Specification: condense_core/ops/reference/value_projection_norm.py.
#pragma once

#include "cpu/bounds.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace condense::cpu::CONDENSE_ISA {

static inline void value_projection_norm(const View& v, const View& w_o, const View& bounds, const View& out,
                                         int threads) {
  constexpr const char* op = "value_projection_norm";
  CONDENSE_CHECK_HEADS_OF_ROWS(v);
  const int64_t batch = v.size[0], kv_heads = v.size[1], num_tokens = v.size[2], head_dim = v.size[3];
  CONDENSE_CHECK_FLOAT(w_o, 2);
  CONDENSE_CHECK_SAME_DTYPE(w_o, v);
  CONDENSE_CHECK_ROWS(w_o);
  const int64_t heads = w_o.size[1] / head_dim;
  CONDENSE_CHECK(heads * head_dim == w_o.size[1], "w_o has ", w_o.size[1], " columns, expected a multiple of D, ",
                 head_dim);
  CONDENSE_CHECK_HEADS("w_o", heads, kv_heads);
  CONDENSE_CHECK_BOUNDS(bounds, batch);
  CONDENSE_CHECK_PACKED(out, Dtype::f32, batch, kv_heads, num_tokens);
  const int64_t group = heads / kv_heads, width = w_o.size[0];
  constexpr int64_t kTokens = 2048, kRows = 96, kColumns = 128;
  const int64_t blocks = (num_tokens + kTokens - 1) / kTokens;
  const int64_t at_once = num_tokens < kTokens ? num_tokens : kTokens;

  by_dtype(v.dtype, [&]<class T>(T*) {
    using F = Factor<T>;
    const int64_t depth = depth_of<F>(head_dim);
    const int64_t value_bytes = round_up(rows_of(at_once) * depth * sizeof(F), 64);
    const int64_t panel_bytes = round_up(columns_of(kColumns) * depth * sizeof(F), 64);
    const int64_t per_thread = value_bytes + panel_bytes + rows_of(kRows) * columns_of(kColumns) * sizeof(float);
    Scratch scratch(threads * per_thread + batch * heads * num_tokens * sizeof(float));
    float* norms = scratch.at<float>(threads * per_thread);  // [B, H, N]

    parallel_for(batch * heads * blocks, threads, [&](int64_t task, int worker) {
      const int64_t row = task / blocks, first = task % blocks * kTokens, b = row / heads, h = row % heads;
      const int64_t count = num_tokens - first < kTokens ? num_tokens - first : kTokens;
      F* values = scratch.at<F>(worker * per_thread);
      F* panels = scratch.at<F>(worker * per_thread + value_bytes);
      float* products = scratch.at<float>(worker * per_thread + value_bytes + panel_bytes);
      float* sums = norms + row * num_tokens + first;
      copy_rows(v.as<const T>() + b * v.stride[0] + h / group * v.stride[1] + first * v.stride[2], v.stride[2], count,
                head_dim, values);
      for (int64_t i = 0; i < count; ++i) sums[i] = 0.0f;
      const Tiles<F> tiles;
      for (int64_t m = 0; m < width; m += kColumns) {
        const int64_t n = width - m < kColumns ? width - m : kColumns;
        pack(w_o.as<const T>() + m * w_o.stride[0] + h * head_dim, w_o.stride[0], n, head_dim, panels);
        for (int64_t i = 0; i < count; i += kRows) {
          const int64_t rows = count - i < kRows ? count - i : kRows;
          multiply(values + i * depth, rows, panels, n, depth, products, columns_of(kColumns));
          for (int64_t r = 0; r < rows; ++r) {
            // Columns beyond n are products with zeros, which of an infinite value are NaN: they are left out.
            Vec total[2] = {};
            const float* product = products + r * columns_of(kColumns);
            int64_t c = 0;
            for (; c + kPanel <= n; c += kPanel) {
              total[0] += abs(load(product + c));
              total[1] += abs(load(product + c + kWidth));
            }
            for (; c < n; c += kWidth) total[0] += abs(load_up_to(product + c, n - c));
            sums[i + r] += sum(total[0] + total[1]);
          }
        }
      }
    });

    parallel_for(batch * kv_heads, threads, [&](int64_t head, int) {
      const int64_t b = head / kv_heads, g = head % kv_heads;
      const Span real = real_tokens(bounds, b, num_tokens);
      float* scores = out.as<float>() + head * num_tokens;
      for (int64_t i = 0; i < num_tokens; ++i) {
        float total = 0.0f;
        for (int64_t h = 0; h < group; ++h) total += norms[(b * heads + g * group + h) * num_tokens + i];
        scores[i] = i < real.start || i >= real.stop ? -INFINITY : total / static_cast<float>(group);
      }
    });
  });
}

}  // namespace condense::cpu::CONDENSE_ISA
