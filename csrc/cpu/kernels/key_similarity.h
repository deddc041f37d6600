// key_similarity (KeyDiff): scores [B, G, N] = -cos(k_i, mean_j k_j / ||k_j||) of keys [B, G, N, D].
//
// The mean of a head must be complete before its first score, so keys are read twice. Where heads are enough for all
// threads, one thread does both for a head, whose keys then come from its L2 the second time (1 MiB for 2,048 tokens of
// 128 fp32); otherwise the threads share the blocks of every head, first of all sums, then of all scores. Sums are kept
// for each block of tokens and added in order, so both ways give the same bits.
//
// Specification: condense_core/ops/reference/key_similarity.py.
#pragma once

#include "cpu/bounds.h"
#include "cpu/kernels/key_norm.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace condense::cpu::CONDENSE_ISA {

CONDENSE_INLINE float at_least(float x, float least) { return x < least ? least : x; }  // NaN stays

// sums [D rounded up to vectors] = sum over the rows of k_i / max(||k_i||, 1e-12), and norms of the rows.
template <class T>
inline void add_directions(const T* keys, int64_t stride, int64_t rows, int64_t d, float* sums, float* norms) {
  for (int64_t c = 0; c < d; c += kWidth) store(sums + c, Vec{});
  constexpr int64_t kTogether = 4;  // rows for one reading and writing of the sums
  for (int64_t first = 0; first < rows; first += kTogether) {
    const T* x[kTogether];
    Vec factor[kTogether];
    for (int64_t r = 0; r < kTogether; ++r) {
      const int64_t i = first + r < rows ? first + r : rows - 1;
      x[r] = keys + i * stride;
      factor[r] = Vec{};
      if (first + r >= rows) continue;
      norms[i] = std::sqrt(square_sum(x[r], d));
      factor[r] = splat(1.0f / at_least(norms[i], 1e-12f));
    }
    if (first + kTogether <= rows) {
      for (int64_t c = 0; c < d; c += kWidth) {
        Vec sum = load(sums + c);
        for (int64_t r = 0; r < kTogether; ++r) sum = fma(factor[r], load_up_to(x[r] + c, d - c), sum);
        store(sums + c, sum);
      }
    } else {
      for (int64_t r = 0; first + r < rows; ++r) {
        for (int64_t c = 0; c < d; c += kWidth) {
          store(sums + c, fma(factor[r], load_up_to(x[r] + c, d - c), load(sums + c)));
        }
      }
    }
  }
}

template <class T>
CONDENSE_INLINE float dot(const T* x, const float* y, int64_t d) {
  Vec a{}, b{};
  int64_t c = 0;
  for (; c + 2 * kWidth <= d; c += 2 * kWidth) {
    a = fma(load(x + c), load(y + c), a);
    b = fma(load(x + c + kWidth), load(y + c + kWidth), b);
  }
  for (; c < d; c += kWidth) a = fma(load_up_to(x + c, d - c), load(y + c), a);
  return sum(a + b);
}

inline void key_similarity(const View& k, int64_t sink, int64_t window, const View& bounds, const View& out,
                           int threads) {
  constexpr const char* op = "key_similarity";
  CONDENSE_CHECK_HEADS_OF_ROWS(k);
  const int64_t batch = k.size[0], kv_heads = k.size[1], num_tokens = k.size[2], head_dim = k.size[3];
  CONDENSE_CHECK_NOT_NEGATIVE(sink);
  CONDENSE_CHECK_NOT_NEGATIVE(window);
  CONDENSE_CHECK_BOUNDS(bounds, batch);
  CONDENSE_CHECK_PACKED(out, Dtype::f32, batch, kv_heads, num_tokens);
  if (num_tokens == 0) return;
  const int64_t heads = batch * kv_heads;
  constexpr int64_t kBlock = 512;
  const int64_t blocks = (num_tokens + kBlock - 1) / kBlock, width = (head_dim + kWidth - 1) / kWidth * kWidth;
  const Scratch scratch(heads * (blocks * width + width) * 4);
  float* const means = scratch.at<float>();   // [heads, width], of length 1
  float* const sums = means + heads * width;  // [heads, blocks, width]
  // The norms wait in the scores' own memory between the two readings.
  by_dtype(k.dtype, [&]<class T>(T*) {
    const auto keys_of = [&](int64_t head) {
      return k.as<const T>() + head / kv_heads * k.stride[0] + head % kv_heads * k.stride[1];
    };
    // The real tokens of a block, counted from the head's first token.
    const auto block_of = [&](Span real, int64_t block) {
      const int64_t first = block * kBlock, last = first + kBlock < num_tokens ? first + kBlock : num_tokens;
      const int64_t start = first > real.start ? first : real.start, stop = last < real.stop ? last : real.stop;
      return Span{start, stop > start ? stop : start};
    };
    const auto sum_block = [&](int64_t head, int64_t block) {
      const Span part = block_of(real_tokens(bounds, head / kv_heads, num_tokens), block);
      add_directions(keys_of(head) + part.start * k.stride[2], k.stride[2], part.stop - part.start, head_dim,
                     sums + (head * blocks + block) * width, out.as<float>() + head * num_tokens + part.start);
    };
    const auto finish_mean = [&](int64_t head) {
      const Span real = real_tokens(bounds, head / kv_heads, num_tokens);
      const int64_t length = real.stop - real.start;
      const float count = static_cast<float>(length > 0 ? length : 1);
      float* mean = means + head * width;
      for (int64_t c = 0; c < width; c += kWidth) {
        Vec total{};
        for (int64_t block = 0; block < blocks; ++block) total += load(sums + (head * blocks + block) * width + c);
        store(mean + c, total / splat(count));
      }
      const Vec norm = splat(at_least(std::sqrt(square_sum(mean, head_dim)), 1e-8f));
      for (int64_t c = 0; c < width; c += kWidth) store(mean + c, load(mean + c) / norm);
    };
    const auto score_block = [&](int64_t head, int64_t block) {
      const Span real = real_tokens(bounds, head / kv_heads, num_tokens);
      const T* keys = keys_of(head);
      const float* mean = means + head * width;
      float* scores = out.as<float>() + head * num_tokens;
      const int64_t first = block * kBlock, last = first + kBlock < num_tokens ? first + kBlock : num_tokens;
      for (int64_t i = first; i < last; ++i) {
        if (i < real.start || i >= real.stop) {
          scores[i] = -INFINITY;
        } else if (i - real.start < sink || real.stop - i <= window) {
          scores[i] = INFINITY;
        } else {
          scores[i] = -dot(keys + i * k.stride[2], mean, head_dim) / at_least(scores[i], 1e-8f);
        }
      }
    };
    if (heads >= threads) {
      parallel_for(heads, threads, [&](int64_t head, int) {
        for (int64_t block = 0; block < blocks; ++block) sum_block(head, block);
        finish_mean(head);
        for (int64_t block = 0; block < blocks; ++block) score_block(head, block);
      });
    } else {
      parallel_for(heads * blocks, threads, [&](int64_t task, int) { sum_block(task / blocks, task % blocks); });
      parallel_for(heads, threads, [&](int64_t head, int) { finish_mean(head); });
      parallel_for(heads * blocks, threads, [&](int64_t task, int) { score_block(task / blocks, task % blocks); });
    }
  });
}

}  // namespace condense::cpu::CONDENSE_ISA
