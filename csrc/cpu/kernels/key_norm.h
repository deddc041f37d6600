// key_norm: scores [B, G, N] = -||k_i||_2 of keys [B, G, N, D]. Reads each key once; nothing is reused.
//
// Specification: condense_core/ops/reference/key_norm.py.
#pragma once

#include "cpu/bounds.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace condense::cpu::CONDENSE_ISA {

template <class T>
CONDENSE_INLINE float square_sum(const T* x, int64_t d) {
  Vec a{}, b{};
  int64_t c = 0;
  for (; c + 2 * kWidth <= d; c += 2 * kWidth) {
    const Vec u = load(x + c), w = load(x + c + kWidth);
    a = fma(u, u, a);
    b = fma(w, w, b);
  }
  for (; c < d; c += kWidth) {
    const Vec u = c + kWidth <= d ? load(x + c) : load_part(x + c, d - c);
    a = fma(u, u, a);
  }
  return sum(a + b);
}

inline void key_norm(const View& k, int64_t sink, int64_t window, const View& bounds, const View& out, int threads) {
  constexpr const char* op = "key_norm";
  CONDENSE_CHECK_HEADS_OF_ROWS(k);
  const int64_t batch = k.size[0], kv_heads = k.size[1], num_tokens = k.size[2], head_dim = k.size[3];
  CONDENSE_CHECK_NOT_NEGATIVE(sink);
  CONDENSE_CHECK_NOT_NEGATIVE(window);
  CONDENSE_CHECK_BOUNDS(bounds, batch);
  CONDENSE_CHECK_PACKED(out, Dtype::f32, batch, kv_heads, num_tokens);
  constexpr int64_t kBlock = 256;
  const int64_t blocks = (num_tokens + kBlock - 1) / kBlock;
  by_dtype(k.dtype, [&]<class T>(T*) {
    parallel_for(batch * kv_heads * blocks, threads, [&](int64_t task, int) {
      const int64_t head = task / blocks, b = head / kv_heads, g = head % kv_heads;
      const Span real = real_tokens(bounds, b, num_tokens);
      const T* keys = k.as<const T>() + b * k.stride[0] + g * k.stride[1];
      float* scores = out.as<float>() + head * num_tokens;
      const int64_t first = task % blocks * kBlock, last = first + kBlock < num_tokens ? first + kBlock : num_tokens;
      for (int64_t i = first; i < last; ++i) {
        if (i < real.start || i >= real.stop) {
          scores[i] = -INFINITY;
        } else if (i - real.start < sink || real.stop - i <= window) {
          scores[i] = INFINITY;
        } else {
          scores[i] = -std::sqrt(square_sum(keys + i * k.stride[2], head_dim));
        }
      }
    });
  });
}

}  // namespace condense::cpu::CONDENSE_ISA
