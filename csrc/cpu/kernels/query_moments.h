// query_moments: mean mu [B, H, D] and covariance cov [B, H, D, D], fp32, of the queries q [B, H, N, D] before their
// rotation, which is undone: p = (q * cos - rotate_half(q) * sin) / (cos^2 + sin^2), cos and sin [B or 1, N, D], of
// which the first half of a row counts. The divisor is 1 but for rounding and factors; tables divided by it are made
// once for all heads.
//
// Reads q once. A block of tokens is unrotated into scratch that stays in the cache, and added to sum p and sum p p^T,
// both relative to the mean of the first few, so that the mean's square does not swamp the covariance. The second is
// symmetric: its products are made on and above the diagonal, in panels, and mirrored; of 16-bit queries in bf16 parts
// where the processor multiplies those faster (split.h).
//
// Specification: condense_core/ops/reference/query_moments.py.
#pragma once

#include "cpu/bounds.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/split.h"

namespace condense::cpu::CONDENSE_ISA {

// One query unrotated; without cos a conversion.
template <class T>
CONDENSE_INLINE void unrotate(const T* q, const float* cos, const float* sin, int64_t d, float* p) {
  if (!cos) return convert(q, d, p);
  const int64_t half = d / 2;
  for (int64_t c = 0; c < half; c += kWidth) {
    const int64_t n = half - c;
    const Vec low = load_up_to(q + c, n), high = load_up_to(q + half + c, n);
    const Vec co = load_up_to(cos + c, n), si = load_up_to(sin + c, n);
    store_up_to(p + c, fma(high, si, low * co), n);
    store_up_to(p + half + c, high * co - low * si, n);
  }
}

// A block of `count` tokens of head rows `queries`, and the tables of its first token.
template <class T>
struct QueryBlock {
  const T* queries;
  int64_t query_row, d, count;
  const float *cos = nullptr, *sin = nullptr;
  int64_t table_row = 0;

  // Rows of a view of [B, N, H, D] lie in pages of their own, where no processor looks ahead.
  __attribute__((always_inline)) void prefetch(int64_t i) const {
    const char* row = reinterpret_cast<const char*>(queries + i * query_row);
    for (int64_t at = 0; at < d * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(row + at);
  }
  __attribute__((always_inline)) void row(int64_t i, float* p) const {
    unrotate(queries + i * query_row, cos ? cos + i * table_row : nullptr, sin + i * table_row, d, p);
  }
};

// About where the queries lie. Only finite: an infinite query minus itself would make the mean NaN instead of infinite.
template <class T>
static inline void centre(const QueryBlock<T>& block, float* row, float* shift) {
  const int64_t some = block.count < 16 ? block.count : 16;
  for (int64_t i = 0; i < some; ++i) {
    block.row(i, row);
    for (int64_t c = 0; c < block.d; ++c) shift[c] += row[c] / static_cast<float>(some);
  }
  for (int64_t c = 0; c < block.d; ++c) shift[c] = std::isfinite(shift[c]) ? shift[c] : 0.0f;
}

// p - shift in two parts, as pairs of tokens: B [depth / 2, wide], zeros behind `count`, and its transpose A. Adds up
// the sums. False, and sums as they were, if anything is not finite.
template <class T>
static inline bool split_block(const QueryBlock<T>& block, const float* shift, int64_t wide, int64_t depth, Halves a,
                               Halves b, float* rows, float* block_sums, float* sums) {
  Vec invalid{};
  std::memset(block_sums, 0, wide * sizeof(float));
  for (int64_t i = 0; i < depth; i += 2) {
    uint32_t *high = b.high + i / 2 * wide, *low = b.low + i / 2 * wide;
    if (i >= block.count) {
      std::memset(high, 0, wide * sizeof(uint32_t));
      std::memset(low, 0, wide * sizeof(uint32_t));
      continue;
    }
    const bool both = i + 1 < block.count;
    block.prefetch(i + 8);
    block.prefetch(i + 9);
    block.row(i, rows);
    if (both) block.row(i + 1, rows + wide);
    for (int64_t c = 0; c < wide; c += kWidth) {
      const Vec centre = load(shift + c);
      const Vec x0 = load(rows + c) - centre, x1 = both ? load(rows + wide + c) - centre : Vec{};
      store(block_sums + c, load(block_sums + c) + (x0 + x1));
      split_pairs(x0, x1, kWidth, high + c, low + c, invalid);
    }
  }
  if (!all_zero(invalid)) return false;
  for (int64_t c = 0; c < wide; c += kWidth) store(sums + c, load(sums + c) + load(block_sums + c));
  for (int64_t i = 0; i < depth / 2; i += 16) {
    for (int64_t c = 0; c < wide; c += 16) {
      transpose(b.high + i * wide + c, wide, a.high + c * (depth / 2) + i, depth / 2);
      transpose(b.low + i * wide + c, wide, a.low + c * (depth / 2) + i, depth / 2);
    }
  }
  return true;
}

// cos / (cos^2 + sin^2), and sin likewise, [B or 1, N, D/2] fp32 one after the other.
static inline void inverse_tables(const View& cos, const View& sin, int64_t half, float* to, int threads) {
  constexpr int64_t kRows = 256;
  const int64_t num_tokens = cos.size[1], blocks = (num_tokens + kRows - 1) / kRows;
  float* to_sin = to + cos.size[0] * num_tokens * half;
  by_dtype(cos.dtype, [&]<class T>(T*) {
    parallel_for(cos.size[0] * blocks, threads, [&](int64_t task, int) {
      const int64_t b = task / blocks, first = task % blocks * kRows;
      for (int64_t i = first; i < num_tokens && i < first + kRows; ++i) {
        const T* co = cos.as<const T>() + b * cos.stride[0] + i * cos.stride[1];
        const T* si = sin.as<const T>() + b * sin.stride[0] + i * sin.stride[1];
        const int64_t at = (b * num_tokens + i) * half;
        for (int64_t c = 0; c < half; c += kWidth) {
          const int64_t n = half - c;
          const Vec x = load_up_to(co + c, n), y = load_up_to(si + c, n), length = fma(x, x, y * y);
          store_up_to(to + at + c, x / length, n);
          store_up_to(to_sin + at + c, y / length, n);
        }
      }
    });
  });
}

static inline void query_moments(const View& q, const View& cos, const View& sin, int64_t sink, const View& bounds,
                                 const View& mu, const View& cov, int threads) {
  constexpr const char* op = "query_moments";
  CONDENSE_CHECK_HEADS_OF_ROWS(q);
  const int64_t batch = q.size[0], heads = q.size[1], num_tokens = q.size[2], head_dim = q.size[3],
                wide = columns_of(head_dim);
  CONDENSE_CHECK(bool(cos) == bool(sin), "cos and sin are expected together, or neither");
  if (cos) {
    CONDENSE_CHECK_FLOAT(cos, 3);
    CONDENSE_CHECK_SHAPE(cos, cos.size[0] == 1 ? 1 : batch, num_tokens, head_dim);
    CONDENSE_CHECK_SHAPE(sin, cos.size[0], num_tokens, head_dim);
    CONDENSE_CHECK_SAME_DTYPE(sin, cos);
    CONDENSE_CHECK_ROWS(cos);
    CONDENSE_CHECK_ROWS(sin);
    CONDENSE_CHECK(head_dim % 2 == 0, "q has ", head_dim, " channels, expected an even number to turn them in pairs");
  }
  CONDENSE_CHECK_NOT_NEGATIVE(sink);
  CONDENSE_CHECK_BOUNDS(bounds, batch);
  CONDENSE_CHECK_PACKED(mu, Dtype::f32, batch, heads, head_dim);
  CONDENSE_CHECK_PACKED(cov, Dtype::f32, batch, heads, head_dim, head_dim);
  if (sink > num_tokens) sink = num_tokens;
  constexpr int64_t kTokens = 128;
  const int64_t split = q.dtype == Dtype::f32 ? 0 : 4 * kTokens / 2 * wide;
  const int64_t per_thread = (kTokens + wide) * wide + 3 * wide + split;
  const int64_t table_size = cos ? cos.size[0] * num_tokens * (head_dim / 2) : 0;
  Scratch scratch((threads * per_thread + 2 * table_size) * sizeof(float));
  float* tables = scratch.at<float>(threads * per_thread * sizeof(float));
  if (cos) inverse_tables(cos, sin, head_dim / 2, tables, threads);

  by_dtype(q.dtype, [&]<class T>(T*) {
    parallel_for(batch * heads, threads, [&](int64_t task, int worker) {
      const Tiles<std::conditional_t<kSplits<T>, bf16, float>> tiles;
      const int64_t b = task / heads, h = task % heads;
      float* block = scratch.at<float>(worker * per_thread * sizeof(float));
      float *products = block + kTokens * wide, *sums = products + wide * wide, *shift = sums + wide;
      float* block_sums = shift + wide;
      std::memset(block, 0, per_thread * sizeof(float));
      Span real = real_tokens(bounds, b, num_tokens);
      real.start = real.start + sink < real.stop ? real.start + sink : real.stop;
      const int64_t table = cos && cos.size[0] > 1 ? b : 0;
      for (int64_t first = real.start; first < real.stop; first += kTokens) {
        const T* head = q.as<const T>() + b * q.stride[0] + h * q.stride[1];
        const int64_t count = real.stop - first < kTokens ? real.stop - first : kTokens;
        QueryBlock<T> queries{head + first * q.stride[2], q.stride[2], head_dim, count};
        if (cos) {
          queries.cos = tables + (table * num_tokens + first) * (head_dim / 2);
          queries.sin = queries.cos + table_size;
          queries.table_row = head_dim / 2;
        }
        if (first == real.start) {
          centre(queries, block, shift);
        }
        if constexpr (kSplits<T>) {
          auto* words = reinterpret_cast<uint32_t*>(block_sums + wide);
          const int64_t part = kTokens / 2 * wide, depth = round_up(count, 32);
          const Halves left{words, words + part}, right{words + 2 * part, words + 3 * part};
          if (split_block(queries, shift, wide, depth, left, right, block, block_sums, sums)) {
            for (int64_t j = 0; j < wide; j += 32) {  // rows on and above the diagonal
              const Halves panel{right.high + j, right.low + j};
              multiply_split(left, depth / 2, j + 32, panel, wide, depth, products + j, wide, true);
            }
            continue;
          }
        }
        for (int64_t i = 0; i < count; ++i) {
          float* p = block + i * wide;
          queries.prefetch(i + 8);
          queries.row(i, p);
          for (int64_t c = 0; c < wide; c += kWidth) {
            const Vec centred = load(p + c) - load(shift + c);
            store(p + c, centred);
            store(sums + c, load(sums + c) + centred);
          }
        }
        for (int64_t j = 0; j < wide; j += kPanel) {
          const int64_t rows = j + kPanel < head_dim ? j + kPanel : head_dim;  // on and above the diagonal
          multiply_panel(block, 1, wide, rows, block + j, wide, count, products + j, wide, true);
        }
      }
      const float share = real.stop > real.start ? 1.0f / static_cast<float>(real.stop - real.start) : 0.0f;
      float *mean = mu.as<float>() + task * head_dim, *square = cov.as<float>() + task * head_dim * head_dim;
      for (int64_t i = 0; i < head_dim; ++i) {
        sums[i] *= share;
        mean[i] = shift[i] + sums[i];
      }
      for (int64_t i = 0; i < head_dim; ++i) {
        for (int64_t j = i; j < head_dim; ++j) {
          // A channel with an infinite mean has no deviations: inf - inf, NaN.
          const float none = (sums[i] - sums[i]) + (sums[j] - sums[j]);
          square[i * head_dim + j] = square[j * head_dim + i] =
              products[i * wide + j] * share - sums[i] * sums[j] + none;
        }
      }
    });
  });
}

}  // namespace condense::cpu::CONDENSE_ISA
