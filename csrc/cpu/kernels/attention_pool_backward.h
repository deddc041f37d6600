// attention_pool_backward: gradients of x, q, norm_weight and window_bias, from that of out [K, d]; shapes as in
// attention_pool.h. dx [T, d] in x's dtype; dq [H, D] or [K, H, D], dw [d], dbias [H, ratio + 2 halo] in fp32.
//
// With g the gradient of a row, and inv a token's inverse rms: dp = inv <g w, x>, ds = p (dp - sum_i p dp),
// dr = p g + scale ds q, dx = inv (w dr - inv x s), s = inv/d sum_c w dr x. All sums over a head's columns are among
// the products <scale q w, x> and <g w, x>, which one pass over a window's rows gives; a second pass, while they are in
// the cache, writes dx and adds A = sum ds inv x and o = sum p inv x, of which dq = scale w A and dw = scale q A + g o.
//
// Without a halo a token belongs to one window: two passes over x, the second from the cache. With one it belongs to
// several, so the weights p and ds of all windows are kept, and a second sweep over the tokens gathers dx from them.
//
// The gradients of q, w and the bias are sums over all rows. They are added up in kSlices ranges of rows, whatever the
// number of threads, and these in order: the same call gives the same bits.
//
// Specification: condense_core/ops/reference/attention_pool_backward.py.
#pragma once

#include "cpu/kernels/attention_pool.h"

namespace condense::cpu::CONDENSE_ISA {

// What attention_pool_backward needs of a window, [count, heads] each: p and ds, and 1 / rms and s of each token; s
// stands at the first head of its token.
struct WindowGradient {
  float *p, *ds, *inverse, *s;
};

// Fills `to` for the tokens of a window; g and q are w times the row's gradient, and scale w times its query.
template <class T>
CONDENSE_INLINE void window_gradient(const T* tokens, int64_t stride, int64_t count, int64_t heads, int64_t head_dim,
                                     const float* q, const float* g, const float* lse, const float* bias,
                                     int64_t bias_width, float eps, float* dots, float* mean, WindowGradient to) {
  const float* others[2] = {q, g};
  const int64_t d = heads * head_dim;
  for (int64_t i = 0; i < count; ++i) {
    float squares;
    row_products<1, 2>(tokens + i * stride, stride, others, heads, head_dim, dots, &squares);
    const float inverse = 1.0f / std::sqrt(squares / d + eps);
    to.inverse[i] = inverse;
    float *p = to.p + i * heads, *ds = to.ds + i * heads;
    for (int64_t h = 0; h < heads; h += kWidth) {
      const int64_t n = heads - h;
      Vec logit = load_up_to(dots + h, n) * splat(inverse);
      if (bias) {
        float biases[kWidth] = {};
        for (int64_t lane = 0; lane < n && lane < kWidth; ++lane) biases[lane] = bias[(h + lane) * bias_width + i];
        logit += load(biases);
      }
      const Vec weight = exp(logit - load_up_to(lse + h, n)), dp = load_up_to(dots + heads + h, n) * splat(inverse);
      store_up_to(p + h, weight, n);
      store_up_to(ds + h, dp, n);  // dp until its mean is known
      const Vec before = i ? load_up_to(mean + h, n) : Vec{};
      store_up_to(mean + h, fma(weight, dp, before), n);
    }
    for (int64_t h = 0; h < heads; ++h) to.s[i * heads + h] = dots[h] * inverse;  // what s needs of the first product
  }
  for (int64_t i = 0; i < count; ++i) {
    float *p = to.p + i * heads, *ds = to.ds + i * heads, *s = to.s + i * heads;
    float total = 0.0f;
    for (int64_t h = 0; h < heads; ++h) {
      const float dp = ds[h];
      ds[h] = p[h] * (dp - mean[h]);
      total += p[h] * dp + ds[h] * s[h];
    }
    s[0] = total / d;  // of this window; sum_c w dr r / d
  }
}

static inline void attention_pool_backward(const View& grad, const View& x, const View& q, const View& lse,
                                           int64_t ratio, const View& cu_seqlens, const View& row_offsets, int64_t halo,
                                           double scale, const View& norm_weight, const View& window_bias, double eps,
                                           const View& dx, const View& dq, const View& dw, const View& dbias,
                                           int threads) {
  constexpr const char* op = "attention_pool_backward";
  CONDENSE_CHECK_FLOAT(x, 2);
  CONDENSE_CHECK_SHAPE(grad, kAny, x.size[1]);
  CONDENSE_CHECK_DTYPE(grad, Dtype::f32);
  CONDENSE_CHECK_ROWS(grad);
  check_windows(op, x, q, ratio, cu_seqlens, row_offsets, halo, norm_weight, window_bias, grad.size[0], lse);
  CONDENSE_CHECK_PACKED(dx, x.dtype, x.size[0], x.size[1]);
  if (q.rank == 3) {
    CONDENSE_CHECK_PACKED(dq, Dtype::f32, q.size[0], q.size[1], q.size[2]);
  } else {
    CONDENSE_CHECK_PACKED(dq, Dtype::f32, q.size[0], q.size[1]);
  }
  CONDENSE_CHECK(bool(dw) == bool(norm_weight), "dw and norm_weight are expected together, or neither");
  CONDENSE_CHECK(bool(dbias) == bool(window_bias), "dbias and window_bias are expected together, or neither");
  if (dw) CONDENSE_CHECK_PACKED(dw, Dtype::f32, x.size[1]);
  if (dbias) CONDENSE_CHECK_PACKED(dbias, Dtype::f32, window_bias.size[0], window_bias.size[1]);
  const int64_t d = x.size[1], heads = q.size[q.rank - 2], head_dim = d / heads, rows = grad.size[0];
  const int64_t num_tokens = x.size[0], longest = ratio + 2 * halo < num_tokens ? ratio + 2 * halo : num_tokens;
  const float* w = norm_weight ? norm_weight.as<const float>() : nullptr;
  const float* bias = window_bias ? window_bias.as<const float>() : nullptr;
  const int64_t bias_width = window_bias ? window_bias.size[1] : 0, bias_size = heads * bias_width;
  const bool own_query = q.rank == 3, gather = halo > 0;
  const float factor = static_cast<float>(scale);
  const Windows windows{ratio, halo, num_tokens, cu_seqlens, row_offsets};
  constexpr int64_t kSlices = 16;
  const int64_t slice_rows = (rows + kSlices - 1) / kSlices > 0 ? (rows + kSlices - 1) / kSlices : 1;

  // Per slice: A and sum g o, the bias's gradient. Per thread: q w, g w, dots, means, and a window's weights.
  const int64_t per_slice = 2 * d + bias_size;
  const int64_t weights = longest * (3 * heads + 1);
  const int64_t per_thread = 2 * d + 3 * heads + (gather ? 0 : weights);
  const int64_t kept = gather ? rows * weights : 0;
  Scratch scratch((kSlices * per_slice + threads * per_thread + kept) * sizeof(float));
  float* slices = scratch.at<float>();
  float* all_threads = slices + kSlices * per_slice;
  float* all_weights = all_threads + threads * per_thread;
  const auto gradient_of = [&](float* at) {
    return WindowGradient{at, at + longest * heads, at + 2 * longest * heads, at + longest * (2 * heads + 1)};
  };

  by_dtype(x.dtype, [&]<class T>(T*) {
    parallel_for(kSlices, threads, [&](int64_t slice, int worker) {
      float *sum_a = slices + slice * per_slice, *sum_go = sum_a + d, *sum_bias = sum_go + d;
      for (int64_t c = 0; c < per_slice; ++c) sum_a[c] = 0.0f;
      float *query = all_threads + worker * per_thread, *gradient = query + d, *dots = gradient + d;
      float* mean = dots + 2 * heads;
      int64_t sequence = 0;
      const int64_t last_row = (slice + 1) * slice_rows < rows ? (slice + 1) * slice_rows : rows;
      for (int64_t row = slice * slice_rows; row < last_row; ++row) {
        const Windows::Window window = windows.at(row, sequence);
        sequence = window.sequence;
        const int64_t count = window.last - window.first;
        const T* tokens = x.as<const T>() + window.first * x.stride[0];
        const float* g = grad.as<const float>() + row * grad.stride[0];
        if (own_query || row == slice * slice_rows) {
          scale_query(q.as<const float>() + (own_query ? row * d : 0), w, factor, d, query);
        }
        scale_query(g, w, 1.0f, d, gradient);
        const WindowGradient to = gradient_of(gather ? all_weights + row * weights : mean + heads);
        window_gradient(tokens, x.stride[0], count, heads, head_dim, query, gradient,
                        lse.as<const float>() + row * heads, bias ? bias + window.place : nullptr, bias_width,
                        static_cast<float>(eps), dots, mean, to);
        for (int64_t i = 0; bias && i < count; ++i) {
          for (int64_t h = 0; h < heads; ++h) sum_bias[h * bias_width + window.place + i] += to.ds[i * heads + h];
        }
        float* row_dq = own_query ? dq.as<float>() + row * d : nullptr;
        for (int64_t h = 0; h < heads; ++h) {
          for (int64_t c = h * head_dim, end = c + head_dim; c < end; c += kWidth) {
            const int64_t n = end - c;
            const Vec qw = load_up_to(query + c, n), gw = load_up_to(gradient + c, n);
            Vec a{}, o{};
            for (int64_t i = 0; i < count; ++i) {
              const Vec r = load_up_to(tokens + i * x.stride[0] + c, n) * splat(to.inverse[i]);
              const Vec p = splat(to.p[i * heads + h]), ds = splat(to.ds[i * heads + h]);
              a = fma(ds, r, a);
              o = fma(p, r, o);
              if (!gather) {
                const Vec whole = (fma(p, gw, ds * qw) - r * splat(to.s[i * heads])) * splat(to.inverse[i]);
                store_up_to(dx.as<T>() + (window.first + i) * d + c, whole, n);
              }
            }
            store_up_to(sum_go + c, fma(load_up_to(g + c, n), o, load_up_to(sum_go + c, n)), n);
            if (own_query) {
              // dw takes scale q A of this row now, as q changes with it; dq is this row's own.
              const Vec scaled = a * splat(factor), own = load_up_to(q.as<const float>() + row * d + c, n);
              store_up_to(sum_a + c, fma(scaled, own, load_up_to(sum_a + c, n)), n);
              store_up_to(row_dq + c, w ? scaled * load_up_to(w + c, n) : scaled, n);
            } else {
              store_up_to(sum_a + c, load_up_to(sum_a + c, n) + a, n);
            }
          }
        }
      }
    });

    if (gather) {
      constexpr int64_t kTokens = 32;
      parallel_for((num_tokens + kTokens - 1) / kTokens, threads, [&](int64_t task, int worker) {
        float* total = all_threads + worker * per_thread;  // of a token, over its windows
        int64_t sequence = 0;
        for (int64_t token = task * kTokens; token < num_tokens && token < (task + 1) * kTokens; ++token) {
          int64_t start = 0, stop = num_tokens, first_row = 0;
          if (cu_seqlens) {
            const int64_t* ends = cu_seqlens.as<const int64_t>();
            while (ends[sequence + 1] <= token) ++sequence;
            start = ends[sequence], stop = ends[sequence + 1], first_row = row_offsets.as<const int64_t>()[sequence];
          }
          const int64_t place = token - start, num_rows = (stop - start + ratio - 1) / ratio;
          int64_t j = place - halo - ratio + 1;  // the first window whose right halo reaches the token
          j = j <= 0 ? 0 : (j + ratio - 1) / ratio;
          int64_t beyond = (place + halo) / ratio + 1;
          beyond = beyond < num_rows ? beyond : num_rows;
          for (int64_t c = 0; c < d; ++c) total[c] = 0.0f;
          float inverse = 0.0f, s = 0.0f;
          for (; j < beyond; ++j) {
            const int64_t row = first_row + j;
            const int64_t begin = j * ratio - halo > 0 ? j * ratio - halo : 0, i = place - begin;
            const WindowGradient from = gradient_of(all_weights + row * weights);
            inverse = from.inverse[i];
            s += from.s[i * heads];
            const float *own = q.as<const float>() + (own_query ? row * d : 0),
                        *g = grad.as<const float>() + row * grad.stride[0];
            for (int64_t h = 0; h < heads; ++h) {
              const Vec p = splat(from.p[i * heads + h]), ds = splat(factor * from.ds[i * heads + h]);
              for (int64_t c = h * head_dim, end = c + head_dim; c < end; c += kWidth) {
                const Vec both = fma(p, load_up_to(g + c, end - c), ds * load_up_to(own + c, end - c));
                store_up_to(total + c, load_up_to(total + c, end - c) + both, end - c);
              }
            }
          }
          const T* tokens = x.as<const T>() + token * x.stride[0];
          for (int64_t c = 0; c < d; c += kWidth) {
            Vec dr = load_up_to(total + c, d - c);
            if (w) dr *= load_up_to(w + c, d - c);
            const Vec r = load_up_to(tokens + c, d - c) * splat(inverse);
            store_up_to(dx.as<T>() + token * d + c, (dr - r * splat(s)) * splat(inverse), d - c);
          }
        }
      });
    }
  });

  // The slices, in order.
  for (int64_t c = 0; c < d; ++c) {
    float a = 0.0f, go = 0.0f;
    for (int64_t slice = 0; slice < kSlices; ++slice) {
      a += slices[slice * per_slice + c];
      go += slices[slice * per_slice + d + c];
    }
    if (own_query) {
      if (dw) dw.as<float>()[c] = a + go;
    } else {
      if (dw) dw.as<float>()[c] = factor * q.as<const float>()[c] * a + go;
      dq.as<float>()[c] = factor * (w ? w[c] : 1.0f) * a;
    }
  }
  for (int64_t c = 0; c < bias_size; ++c) {
    float total = 0.0f;
    for (int64_t slice = 0; slice < kSlices; ++slice) total += slices[slice * per_slice + 2 * d + c];
    dbias.as<float>()[c] = total;
  }
}

}  // namespace condense::cpu::CONDENSE_ISA
