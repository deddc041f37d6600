// expected_attention: out [B, G, N] = (mean_h softmax_i(logits[h]) + epsilon) * ||v_i||, logits[h, i] = scale k'_i mu_h
// + 0.5 scale^2 k'_i S_h k'_i, k' = R^T k the key turned against the mean rotation. k, v [B, G, N, D], mu [B, H, D] and
// S = cov [B, H, D, D] fp32, mean_cos and mean_sin [D] fp32.
//
// Nearly all of it is the quadratic form, 2 H N D^2 operations as a product and a row sum. Folded onto its upper
// triangle (S_ij + S_ji above the diagonal, zeros below) it is five eighths of that at D 128. Keys are read and turned
// once for all heads of their group; logits [H, N] are kept, products are not.
#pragma once

#include "cpu/bounds.h"
#include "cpu/gemm.h"
#include "cpu/kernels/key_norm.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace condense::cpu::CONDENSE_ISA {

static inline void expected_attention(const View& k, const View& v, const View& mu, const View& cov,
                                      const View& mean_cos, const View& mean_sin, double scale, double epsilon,
                                      int64_t sink, const View& bounds, const View& out, int threads) {
  require_float(k, 4, "expected_attention: k must be [B, G, N, D]");
  require(k.stride[3] == 1 || k.size[3] == 1, "expected_attention: rows of k must be contiguous");
  require(!v || (v.rank == 4 && v.dtype == k.dtype), "expected_attention: v must be as k");
  require(mu.rank == 3 && mu.dtype == Dtype::f32 && (!cov || cov.rank == 4),
          "expected_attention: mu must be [B, H, D]");
  const int64_t batch = k.size[0], kv_heads = k.size[1], num_tokens = k.size[2], d = k.size[3];
  const int64_t heads = mu.size[1], group = heads / kv_heads, wide = columns_of(d);
  const float* cos = mean_cos ? mean_cos.as<const float>() : nullptr;
  const float* sin = mean_cos ? mean_sin.as<const float>() : nullptr;
  constexpr int64_t kTokens = 96;
  const int64_t blocks = (num_tokens + kTokens - 1) / kTokens;
  const int64_t per_thread = kTokens * (wide + kPanel) + kTokens;
  const int64_t triangles = cov ? batch * heads * d * wide : 0;
  Scratch scratch((threads * per_thread + triangles + batch * heads * num_tokens) * sizeof(float));
  float* folded = scratch.at<float>(threads * per_thread * sizeof(float));
  float* logits = folded + triangles;  // [B, H, N]
  const float linear = static_cast<float>(scale), quadratic = static_cast<float>(0.5 * scale * scale);

  parallel_for(cov ? batch * heads : 0, threads, [&](int64_t row, int) {
    const float* s = cov.as<const float>() + row * d * d;
    float* to = folded + row * d * wide;
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j < wide; ++j) {
        to[i * wide + j] = j < i || j >= d ? 0.0f : j == i ? s[i * d + j] : s[i * d + j] + s[j * d + i];
      }
    }
  });

  by_dtype(k.dtype, [&]<class T>(T*) {
    parallel_for(batch * kv_heads * blocks, threads, [&](int64_t task, int worker) {
      const int64_t head = task / blocks, b = head / kv_heads, g = head % kv_heads, first = task % blocks * kTokens;
      const int64_t count = num_tokens - first < kTokens ? num_tokens - first : kTokens;
      float* turned = scratch.at<float>(worker * per_thread * sizeof(float));
      float *products = turned + kTokens * wide, *forms = products + kTokens * kPanel;
      for (int64_t i = 0; i < count; ++i) {
        const T* key = k.as<const T>() + b * k.stride[0] + g * k.stride[1] + (first + i) * k.stride[2];
        float* row = turned + i * wide;
        if (cos) {
          const int64_t half = d / 2;  // R^T k = k cos - rotate_half(k sin)
          for (int64_t c = 0; c < half; c += kWidth) {
            const int64_t n = half - c;
            const Vec low = load_up_to(key + c, n), high = load_up_to(key + half + c, n);
            const Vec up = high * load_up_to(sin + half + c, n), down = low * load_up_to(sin + c, n);
            store_up_to(row + c, fma(low, load_up_to(cos + c, n), up), n);
            store_up_to(row + half + c, high * load_up_to(cos + half + c, n) - down, n);
          }
        } else {
          convert(key, d, row);
        }
        for (int64_t c = d; c < wide; ++c) row[c] = 0.0f;
      }
      for (int64_t h = g * group; h < (g + 1) * group; ++h) {
        const float *mean = mu.as<const float>() + (b * heads + h) * d, *triangle = folded + (b * heads + h) * d * wide;
        float* row_logits = logits + (b * heads + h) * num_tokens + first;
        for (int64_t i = 0; i < count; ++i) {
          const float* row = turned + i * wide;
          Vec total{};
          for (int64_t c = 0; c < d; c += kWidth) total = fma(load(row + c), load_up_to(mean + c, d - c), total);
          row_logits[i] = linear * sum(total);
          forms[i] = 0.0f;
        }
        for (int64_t j = 0; cov && j < d; j += kPanel) {
          multiply_panel(turned, wide, 1, count, triangle + j, wide, j + kPanel < d ? j + kPanel : d, products, kPanel,
                         false);
          for (int64_t i = 0; i < count; ++i) {
            const float *product = products + i * kPanel, *row = turned + i * wide + j;
            const Vec left = load(product) * load(row);
            forms[i] += sum(fma(load(product + kWidth), load(row + kWidth), left));
          }
        }
        for (int64_t i = 0; i < count; ++i) row_logits[i] = std::fma(quadratic, forms[i], row_logits[i]);
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
        scores[i] = (scores[i] + static_cast<float>(epsilon)) * std::sqrt(square_sum(value, d));
      }
    });
  });
}

}  // namespace condense::cpu::CONDENSE_ISA
