// cross_pool: queries over all tokens of their sequence, out[j, h] = sum_i softmax_i(scale <q[j, h], r_h[i]>) r_h[i],
// r = x / rms(x) * w. x [T, d], q [K, H, D] fp32; out [K, d] in x's dtype, lse [K, H] fp32. `blocks` [n, 4] int64
// shares the queries out: first query, how many (at most kQueries), first token, last token + 1.
//
// As in flash attention: a block of queries of one head meets blocks of tokens, with a running maximum; logits never
// leave the cache. The norm is a factor on a token's logits and weights, w goes into q and into the result.
//
// Specification: condense_core/ops/reference/cross_pool.py.
#pragma once

#include "cpu/gemm.h"
#include "cpu/kernels/attention_pool.h"
#include "cpu/kernels/key_norm.h"

namespace condense::cpu::CONDENSE_ISA {

static inline void cross_pool(const View& x, const View& q, const View& blocks, double scale, const View& norm_weight,
                              double eps, const View& out, const View& lse, int threads) {
  constexpr const char* op = "cross_pool";
  constexpr int64_t kQueries = 64, kTokens = 128;
  CONDENSE_CHECK_FLOAT(x, 2);
  CONDENSE_CHECK_ROWS(x);
  CONDENSE_CHECK_PACKED(q, Dtype::f32, kAny, kSome, kSome);
  const int64_t num_tokens = x.size[0], d = x.size[1], rows = q.size[0], heads = q.size[1], head_dim = q.size[2];
  check_pooled(op, x, heads, head_dim, norm_weight, rows, lse);
  CONDENSE_CHECK_PACKED(out, x.dtype, rows, d);
  CONDENSE_CHECK_PACKED(blocks, Dtype::i64, kAny, 4);
  for (int64_t i = 0; i < blocks.size[0]; ++i) {
    const int64_t* block = blocks.as<const int64_t>() + 4 * i;
    CONDENSE_CHECK(block[0] >= 0 && block[1] >= 0 && block[1] <= kQueries && block[0] <= rows - block[1],
                   "blocks holds ", block[1], " queries from ", block[0], " in row ", i, ", expected up to 64 of ",
                   rows);
    CONDENSE_CHECK(block[2] >= 0 && block[2] <= block[3] && block[3] <= num_tokens, "blocks holds the tokens ",
                   block[2], " to ", block[3], " in row ", i, ", expected an ascending range of ", num_tokens);
  }
  const int64_t wide = columns_of(head_dim);
  const float* w = norm_weight ? norm_weight.as<const float>() : nullptr;
  // Queries, the sum, tokens as they are and as panels, logits; maximum and sum of each query.
  const int64_t per_thread =
      kQueries * (head_dim + wide + columns_of(kTokens) + 2) + kTokens * wide + columns_of(kTokens) * head_dim;
  const int64_t rows_needed = (rows_of(kQueries) - kQueries) * columns_of(kTokens);
  Scratch scratch((threads * (per_thread + rows_needed) + num_tokens) * sizeof(float));
  float* inverse = scratch.at<float>(threads * (per_thread + rows_needed) * sizeof(float));

  by_dtype(x.dtype, [&]<class T>(T*) {
    parallel_for((num_tokens + 63) / 64, threads, [&](int64_t task, int) {
      for (int64_t i = task * 64; i < num_tokens && i < task * 64 + 64; ++i) {
        const float squares = square_sum(x.as<const T>() + i * x.stride[0], d);
        inverse[i] = 1.0f / std::sqrt(squares / d + static_cast<float>(eps));
      }
    });
    parallel_for(blocks.size[0] * heads, threads, [&](int64_t task, int worker) {
      const int64_t *block = blocks.as<const int64_t>() + task / heads * 4, h = task % heads, column = h * head_dim;
      const int64_t first_query = block[0], m = block[1];
      float* queries = scratch.at<float>(worker * (per_thread + rows_needed) * sizeof(float));
      float *sums = queries + kQueries * head_dim, *tokens = sums + kQueries * wide, *panels = tokens + kTokens * wide;
      float *top = panels + columns_of(kTokens) * head_dim, *total = top + kQueries, *logits = total + kQueries;
      for (int64_t r = 0; r < m; ++r) {
        const float* query = q.as<const float>() + (first_query + r) * d + column;
        scale_query(query, w ? w + column : nullptr, static_cast<float>(scale), head_dim, queries + r * head_dim);
        top[r] = -INFINITY, total[r] = 0.0f;
      }
      std::memset(sums, 0, kQueries * wide * sizeof(float));
      std::memset(tokens, 0, kTokens * wide * sizeof(float));
      for (int64_t first = block[2]; first < block[3]; first += kTokens) {
        const int64_t count = block[3] - first < kTokens ? block[3] - first : kTokens;
        for (int64_t i = 0; i < count; ++i) {
          convert(x.as<const T>() + (first + i) * x.stride[0] + column, head_dim, tokens + i * wide);
        }
        pack(tokens, wide, count, head_dim, panels);
        multiply(queries, m, panels, count, head_dim, logits, columns_of(kTokens));
        for (int64_t r = 0; r < m; ++r) {
          float* row = logits + r * columns_of(kTokens);
          Vec highest = splat(top[r]), added{};
          for (int64_t i = 0; i < count; i += kWidth) {
            const int64_t n = count - i;
            const Vec value = load(row + i) * load_up_to(inverse + first + i, n);
            store(row + i, value);
            highest = max(n >= kWidth ? value : load_part(row + i, n, -INFINITY), highest);
          }
          const float most = max(highest), factor = top[r] == -INFINITY ? 0.0f : std::exp(top[r] - most);
          for (int64_t i = 0; i < count; i += kWidth) {
            const int64_t n = count - i;
            store(row + i, exp(load(row + i) - splat(most)));
            added += load_up_to(row + i, n);
            store_up_to(row + i, load_up_to(row + i, n) * load_up_to(inverse + first + i, n), n);
          }
          total[r] = total[r] * factor + sum(added);
          top[r] = most;
          for (int64_t c = 0; c < wide; c += kWidth) {
            store(sums + r * wide + c, load(sums + r * wide + c) * splat(factor));
          }
        }
        for (int64_t c = 0; c < wide; c += kPanel) {
          multiply_panel(logits, columns_of(kTokens), 1, m, tokens + c, wide, count, sums + c, wide, true);
        }
      }
      for (int64_t r = 0; r < m; ++r) {
        T* target = out.as<T>() + (first_query + r) * d + column;
        const float share = block[2] < block[3] ? 1.0f / total[r] : 0.0f;
        for (int64_t c = 0; c < head_dim; c += kWidth) {
          const int64_t n = head_dim - c;
          Vec value = load(sums + r * wide + c) * splat(share);
          if (w) value *= load_up_to(w + column + c, n);
          store_up_to(target + c, value, n);
        }
        lse.as<float>()[(first_query + r) * heads + h] = top[r] + std::log(total[r]);
      }
    });
  });
}

}  // namespace condense::cpu::CONDENSE_ISA
