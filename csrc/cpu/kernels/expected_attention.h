// expected_attention: out [B, G, N] = (mean_h softmax_i(logits[h]) + epsilon) * ||v_i||, logits[h, i] = scale k'_i mu_h
// + 0.5 scale^2 k'_i S_h k'_i, k' = R^T k the key turned against the mean rotation. k, v [B, G, N, D], mu [B, H, D] and
// S = cov [B, H, D, D] fp32, mean_cos and mean_sin [D] fp32.
//
// Nearly all of it is the quadratic form, 2 H N D^2 operations as a product and a row sum. Folded onto its upper
// triangle (S_ij + S_ji above the diagonal, zeros below) it is five eighths of that at D 128. Keys are read and turned
// once for all heads of their group; logits [H, N] are kept, products are not. With 16-bit keys the products are made
// of bf16 parts where the processor multiplies those faster (split.h).
//
// Specification: condense_core/ops/reference/expected_attention.py.
#pragma once

#include "cpu/bounds.h"
#include "cpu/gemm.h"
#include "cpu/kernels/key_norm.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/split.h"

namespace condense::cpu::CONDENSE_ISA {

static inline void expected_attention(const View& k, const View& v, const View& mu, const View& cov,
                                      const View& mean_cos, const View& mean_sin, double scale, double epsilon,
                                      int64_t sink, const View& bounds, const View& out, int threads) {
  constexpr const char* op = "expected_attention";
  CONDENSE_CHECK_HEADS_OF_ROWS(k);
  const int64_t batch = k.size[0], kv_heads = k.size[1], num_tokens = k.size[2], head_dim = k.size[3];
  if (v) {
    CONDENSE_CHECK_SHAPE(v, batch, kv_heads, num_tokens, head_dim);
    CONDENSE_CHECK_SAME_DTYPE(v, k);
    CONDENSE_CHECK_ROWS(v);
  }
  CONDENSE_CHECK_PACKED(mu, Dtype::f32, batch, kAny, head_dim);
  const int64_t heads = mu.size[1], group = heads / kv_heads, wide = columns_of(head_dim);
  CONDENSE_CHECK_HEADS("mu", heads, kv_heads);
  if (cov) CONDENSE_CHECK_PACKED(cov, Dtype::f32, batch, heads, head_dim, head_dim);
  CONDENSE_CHECK(bool(mean_cos) == bool(mean_sin), "mean_cos and mean_sin are expected together, or neither");
  if (mean_cos) {
    CONDENSE_CHECK_PACKED(mean_cos, Dtype::f32, head_dim);
    CONDENSE_CHECK_PACKED(mean_sin, Dtype::f32, head_dim);
    CONDENSE_CHECK(head_dim % 2 == 0, "k has ", head_dim, " channels, expected an even number to turn them in pairs");
  }
  CONDENSE_CHECK_NOT_NEGATIVE(sink);
  CONDENSE_CHECK_BOUNDS(bounds, batch);
  CONDENSE_CHECK_PACKED(out, Dtype::f32, batch, kv_heads, num_tokens);
  if (num_tokens == 0) return;
  if (sink > num_tokens) sink = num_tokens;
  const float* cos = mean_cos ? mean_cos.as<const float>() : nullptr;
  const float* sin = mean_cos ? mean_sin.as<const float>() : nullptr;
  constexpr int64_t kTokens = 64;
  const int64_t blocks = (num_tokens + kTokens - 1) / kTokens;
  // Several tasks a KV head where threads would be idle, each with all its query heads.
  const int64_t wanted = (2 * threads + batch * kv_heads - 1) / (batch * kv_heads);
  const int64_t parts = wanted < blocks ? wanted : blocks, part_blocks = (blocks + parts - 1) / parts;
  const bool split = cov && k.dtype != Dtype::f32;
  // Of a query head: mu, S, S in two parts. Of a thread: those of a group; keys turned, products and sums of a block,
  // keys in two parts.
  const int64_t square = cov ? wide * wide : 0, per_head = wide + square + (split ? square : 0);
  const int64_t key_words = split ? kTokens * wide : 0;
  const int64_t per_thread = group * per_head + kTokens * (wide + kPanel + kWidth) + key_words;
  Scratch scratch((threads * per_thread + batch * heads * num_tokens) * sizeof(float));
  float* logits = scratch.at<float>(threads * per_thread * sizeof(float));  // [B, H, N]
  const float linear = static_cast<float>(scale), quadratic = static_cast<float>(0.5 * scale * scale);

  // mu and S, folded, of query head h [B * H], both with their factor in the logits. False if S is not finite.
  const auto prepare = [&]<bool kParts>(int64_t h, float* to) {
    float *mean = to, *triangle = mean + wide;
    for (int64_t i = 0; i < wide; ++i) mean[i] = i < head_dim ? linear * mu.as<const float>()[h * head_dim + i] : 0.0f;
    Vec invalid{};
    if (!cov) return true;
    const float* s = cov.as<const float>() + h * head_dim * head_dim;
    std::memset(triangle, 0, square * sizeof(float));
    for (int64_t j = 0; j < wide; j += kPanel) {  // [d, kPanel], rows on and above the diagonal
      float* panel = triangle + j * wide;
      for (int64_t i = 0; i < head_dim && i < j + kPanel; ++i) {
        for (int64_t c = j > i ? j : i; c < head_dim && c < j + kPanel; ++c) {
          panel[i * kPanel + c - j] =
              quadratic * (c == i ? s[i * head_dim + i] : s[i * head_dim + c] + s[c * head_dim + i]);
        }
      }
    }
    auto* words = reinterpret_cast<uint32_t*>(triangle + square);
    for (int64_t at = 0; kParts && at < square; at += 2 * kPanel) {
      for (int64_t c = 0; c < kPanel; c += kWidth) {
        const Vec even = load(triangle + at + c), odd = load(triangle + at + kPanel + c);
        split_pairs(even, odd, kWidth, words + at / 2 + c, words + (square + at) / 2 + c, invalid);
      }
    }
    return all_zero(invalid);
  };

  by_dtype(k.dtype, [&]<class T>(T*) {
    const auto score_block = [&](int64_t head, int64_t first, const float* moments, bool finite, float* turned) {
      const int64_t b = head / kv_heads, g = head % kv_heads;
      const int64_t count = num_tokens - first < kTokens ? num_tokens - first : kTokens;
      float *products = turned + kTokens * wide, *sums = products + kTokens * kPanel;
      auto* words = reinterpret_cast<uint32_t*>(sums + kTokens * kWidth);
      const Halves keys{words, words + key_words / 2};
      Vec invalid{};
      for (int64_t i = 0; i < count; ++i) {
        const T* key = k.as<const T>() + b * k.stride[0] + g * k.stride[1] + (first + i) * k.stride[2];
        float* row = turned + i * wide;
        if (cos) {
          const int64_t half = head_dim / 2;  // R^T k = k cos - rotate_half(k sin)
          for (int64_t c = 0; c < half; c += kWidth) {
            const int64_t n = half - c;
            const Vec low = load_up_to(key + c, n), high = load_up_to(key + half + c, n);
            const Vec up = high * load_up_to(sin + half + c, n), down = low * load_up_to(sin + c, n);
            store_up_to(row + c, fma(low, load_up_to(cos + c, n), up), n);
            store_up_to(row + half + c, high * load_up_to(cos + half + c, n) - down, n);
          }
        } else {
          convert(key, head_dim, row);
        }
        for (int64_t c = head_dim; c < wide; ++c) row[c] = 0.0f;
        if constexpr (kSplits<T>) {
          const int64_t at = i * wide / 2;
          for (int64_t c = 0; cov && c < wide; c += kWidth) {
            split_neighbours(load(row + c), keys.high + at + c / 2, keys.low + at + c / 2, invalid);
          }
        }
      }
      finite = finite && all_zero(invalid);
      for (int64_t i = 0; i < group; ++i) {
        const float *mean = moments + i * per_head, *triangle = mean + wide;
        std::memset(sums, 0, count * kWidth * sizeof(float));
        for (int64_t j = 0; j < wide; j += kPanel) {
          const Vec mean_left = load(mean + j), mean_right = load(mean + j + kWidth);
          const auto add = [&](int64_t i, Vec left, Vec right) {
            const float *row = turned + i * wide + j, *so_far = sums + i * kWidth;
            store(sums + i * kWidth, fma(left, load(row), fma(right, load(row + kWidth), load(so_far))));
          };
          if (!cov) {
            for (int64_t i = 0; i < count; ++i) add(i, mean_left, mean_right);
            continue;
          }
          bool done = false;
          if constexpr (kSplits<T>) {
            if (finite) {
              const auto* panel = reinterpret_cast<const uint32_t*>(triangle + square) + j * wide / 2;
              const Halves right{const_cast<uint32_t*>(panel), const_cast<uint32_t*>(panel + square / 2)};
              multiply_split(keys, wide / 2, round_up(count, 32), right, kPanel, j + 32, products, kPanel, false);
              done = true;
            }
          }
          if (!done) {
            multiply_panel(turned, wide, 1, count, triangle + j * wide, kPanel,
                           j + kPanel < head_dim ? j + kPanel : head_dim, products, kPanel, false);
          }
          for (int64_t i = 0; i < count; ++i) {
            const float* product = products + i * kPanel;
            add(i, load(product) + mean_left, load(product + kWidth) + mean_right);
          }
        }
        float* row = logits + (head * group + i) * num_tokens + first;
        for (int64_t t = 0; t < count; ++t) row[t] = sum(load(sums + t * kWidth));
      }
    };

    parallel_for(batch * kv_heads * parts, threads, [&](int64_t task, int worker) {
      const Tiles<std::conditional_t<kSplits<T>, bf16, float>> tiles;
      float *moments = scratch.at<float>(worker * per_thread * sizeof(float)), *block = moments + group * per_head;
      const int64_t head = task / parts, begin = task % parts * part_blocks;
      bool finite = true;
      for (int64_t i = 0; i < group; ++i) {
        finite = prepare.template operator()<kSplits<T>>(head * group + i, moments + i * per_head) && finite;
      }
      for (int64_t at = begin; at < blocks && at < begin + part_blocks; ++at) {
        score_block(head, at * kTokens, moments, finite, block);
      }
    });

    parallel_for(batch * kv_heads, threads, [&](int64_t head, int) {
      const int64_t b = head / kv_heads, g = head % kv_heads;
      const Span real = real_tokens(bounds, b, num_tokens);
      const int64_t start = real.start + sink < real.stop ? real.start + sink : real.stop;
      float* scores = out.as<float>() + head * num_tokens;
      for (int64_t i = 0; i < num_tokens; ++i) {
        scores[i] = i < real.start || i >= real.stop ? -INFINITY : i < start ? INFINITY : 0.0f;
      }
      for (int64_t h = g * group; h < (g + 1) * group; ++h) {
        float* row = logits + (b * heads + h) * num_tokens;
        Vec highest = splat(-INFINITY), total{};
        for (int64_t i = start; i < real.stop; i += kWidth) {
          const int64_t n = real.stop - i;
          highest = max(n >= kWidth ? load(row + i) : load_part(row + i, n, -INFINITY), highest);
        }
        const Vec most = splat(max(highest));
        for (int64_t i = start; i < real.stop; i += kWidth) {
          const int64_t n = real.stop - i;
          store_up_to(row + i, exp(load_up_to(row + i, n) - most), n);
          total += load_up_to(row + i, n);
        }
        const Vec share = splat(1.0f / (sum(total) * static_cast<float>(group)));
        for (int64_t i = start; i < real.stop; i += kWidth) {
          const int64_t n = real.stop - i;
          store_up_to(scores + i, fma(load_up_to(row + i, n), share, load_up_to(scores + i, n)), n);
        }
      }
      for (int64_t i = start; v && i < real.stop; ++i) {
        const T* value = v.as<const T>() + b * v.stride[0] + g * v.stride[1] + i * v.stride[2];
        scores[i] = (scores[i] + static_cast<float>(epsilon)) * std::sqrt(square_sum(value, head_dim));
      }
    });
  });
}

}  // namespace condense::cpu::CONDENSE_ISA
