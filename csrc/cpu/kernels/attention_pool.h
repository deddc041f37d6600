// attention_pool: one row per window of tokens, out[j, h] = sum_i p[j, h, i] r_h[i], p = softmax_i(scale <q_h, r_h[i]>
// + bias[h, i]), r = x / rms(x) * w. x [T, d], q [H, D] or [K, H, D] fp32, w [d] fp32, bias [H, ratio + 2 halo] fp32;
// out [K, d] in x's dtype, lse [K, H] fp32.
//
// Reads x once, writes a row for every `ratio` of x: bound by memory. The norm is folded away: a token's inverse rms is
// a factor on its logits and on its weight, w goes into q and into the result. So one pass over a row gives its mean
// square and its logits, and a second one, while the window's rows are still in the cache, the weighted sum. Wide
// windows go in blocks with a running maximum, so that scratch does not grow with the ratio.
//
// In bf16 the time goes into widening and narrowing, so heads of whole pairs of vectors are handled paired (simd.h): x
// and the result as they lie in memory; q, w and carried sums arranged like them.
//
// Specification: condense_core/ops/reference/attention_pool.py.
#pragma once

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace condense::cpu::CONDENSE_ISA {

// Windows of a pack: row j of the output sees the tokens [first, last), the first of them at `place` of the window.
struct Windows {
  int64_t ratio, halo, num_tokens;
  const View& cu_seqlens;   // [S + 1] int64, or None: one sequence
  const View& row_offsets;  // [S + 1] int64, rows of each sequence; None with it

  struct Window {
    int64_t first, last, place, sequence;
  };

  // `sequence` is where to begin to look: that of an earlier row.
  Window at(int64_t row, int64_t sequence) const {
    int64_t start = 0, stop = num_tokens, j = row;
    if (cu_seqlens) {
      const int64_t *ends = cu_seqlens.as<const int64_t>(), *rows = row_offsets.as<const int64_t>();
      while (rows[sequence + 1] <= row) ++sequence;
      start = ends[sequence], stop = ends[sequence + 1], j = row - rows[sequence];
    }
    const int64_t begin = start + j * ratio - halo, end = start + (j + 1) * ratio + halo;
    const int64_t first = begin < start ? start : begin;
    return {first, end < stop ? end : stop, first - begin, sequence};
  }
};

// Sums of squares of kTokens rows, and their products with kVectors others, head by head: products of token i and
// vector v go to dots[(v * kTokens + i) * heads + h]. Several rows at once share the loads of the others.
template <int kTokens, int kVectors, bool kPaired = false, class T>
CONDENSE_INLINE void row_products(const T* x, int64_t stride, const float* const* others, int64_t heads,
                                  int64_t head_dim, float* dots, float* squares) {
  Vec square_sums[kTokens] = {};
  for (int64_t h = 0; h < heads; ++h) {
    Vec sums[kVectors][kTokens] = {};
    const int64_t begin = h * head_dim, whole = begin + head_dim / kWidth * kWidth, rest = begin + head_dim - whole;
    const auto add = [&](int64_t c, auto&& load_lanes) __attribute__((always_inline)) {
      Vec other[kVectors];
      for (int v = 0; v < kVectors; ++v) other[v] = load_lanes(others[v] + c);
      for (int i = 0; i < kTokens; ++i) {
        const Vec a = load_lanes(x + i * stride + c);
        square_sums[i] = fma(a, a, square_sums[i]);
        for (int v = 0; v < kVectors; ++v) sums[v][i] = fma(a, other[v], sums[v][i]);
      }
    };
    if constexpr (kPaired) {
      for (int64_t c = begin; c < whole; c += 2 * kWidth) {
        for (int i = 0; i < kTokens; ++i) {
          Vec even, odd;
          load_paired(x + i * stride + c, even, odd);
          square_sums[i] = fma(odd, odd, fma(even, even, square_sums[i]));
          for (int v = 0; v < kVectors; ++v) {
            sums[v][i] = fma(odd, load(others[v] + c + kWidth), fma(even, load(others[v] + c), sums[v][i]));
          }
        }
      }
    } else {
      for (int64_t c = begin; c < whole; c += kWidth) add(c, [](auto* p) { return load(p); });
      if (rest) add(whole, [&](auto* p) { return load_part(p, rest); });
    }
    for (int v = 0; v < kVectors; ++v) {
      float* to = dots + v * kTokens * heads + h;
      if constexpr (kTokens == 4) {
        float four[4];
        sum4(sums[v], four);
        for (int i = 0; i < 4; ++i) to[i * heads] = four[i];
      } else {
        for (int i = 0; i < kTokens; ++i) to[i * heads] = sum(sums[v][i]);
      }
    }
  }
  for (int i = 0; i < kTokens; ++i) squares[i] = sum(square_sums[i]);
}

// factor * q * w over the width; w None: ones.
CONDENSE_INLINE void scale_query(const float* q, const float* w, float factor, int64_t d, float* out) {
  for (int64_t c = 0; c < d; ++c) out[c] = factor * q[c] * (w ? w[c] : 1.0f);
}

// out = w * (carried * rescale + sum_i weights[i, h] x_i) over the tokens of a block; carried and w may be null.
template <class T, class Out>
CONDENSE_INLINE void weighted_sum(const T* x, int64_t stride, int64_t count, const float* weights, int64_t heads,
                                  int64_t head_dim, const float* carried, const float* rescale, const float* w,
                                  Out* out) {
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t end = (h + 1) * head_dim;
    int64_t c = h * head_dim;
    if (count == 4 && !carried && w) {  // the ratio that is used most, in whole windows
      Vec weight[4];
      for (int i = 0; i < 4; ++i) weight[i] = splat(weights[i * heads + h]);
      for (; c + kWidth <= end; c += kWidth) {
        Vec total = weight[0] * load(x + c);
        for (int i = 1; i < 4; ++i) total = fma(weight[i], load(x + i * stride + c), total);
        store(out + c, total * load(w + c));
      }
    }
    for (; c < end; c += kWidth) {
      Vec total = carried ? load_up_to(carried + c, end - c) * splat(rescale[h]) : Vec{};
      for (int64_t i = 0; i < count; ++i) {
        total = fma(splat(weights[i * heads + h]), load_up_to(x + i * stride + c, end - c), total);
      }
      if (w) total *= load_up_to(w + c, end - c);
      store_up_to(out + c, total, end - c);
    }
  }
}

// The same for paired bf16, with carried and w arranged; out is the result, or fp32 to be carried.
template <class Out>
CONDENSE_INLINE void weighted_sum_paired(const bf16* x, int64_t stride, int64_t count, const float* weights,
                                         int64_t heads, int64_t head_dim, const float* carried, const float* rescale,
                                         const float* w, Out* out) {
  for (int64_t h = 0; h < heads; ++h) {
    const auto columns = [&](int64_t c, int64_t rows, auto&& weight) __attribute__((always_inline)) {
      Vec even{}, odd{};
      if (carried) even = load(carried + c) * splat(rescale[h]), odd = load(carried + c + kWidth) * splat(rescale[h]);
      for (int64_t i = 0; i < rows; ++i) {
        Vec a, b;
        load_paired(x + i * stride + c, a, b);
        even = fma(weight(i), a, even), odd = fma(weight(i), b, odd);
      }
      if (w) even *= load(w + c), odd *= load(w + c + kWidth);
      if constexpr (std::is_same_v<Out, bf16>) {
        store_paired(out + c, even, odd);
      } else {
        store(out + c, even);
        store(out + c + kWidth, odd);
      }
    };
    const int64_t end = (h + 1) * head_dim;
    if (count == 4) {  // the ratio that is used most
      Vec weight[4];
      for (int i = 0; i < 4; ++i) weight[i] = splat(weights[i * heads + h]);
      for (int64_t c = end - head_dim; c < end; c += 2 * kWidth) columns(c, 4, [&](int64_t i) { return weight[i]; });
    } else {
      const auto one = [&](int64_t i) { return splat(weights[i * heads + h]); };
      for (int64_t c = end - head_dim; c < end; c += 2 * kWidth) columns(c, count, one);
    }
  }
}

// The shapes of pooling: x [T, d] has heads of head_dim columns, its results are `rows` rows.
static inline void check_pooled(const char* op, const View& x, int64_t heads, int64_t head_dim, const View& norm_weight,
                                int64_t rows, const View& lse) {
  const int64_t d = x.size[1];
  CONDENSE_CHECK(heads >= 1 && head_dim >= 1 && heads * head_dim == d, "q has ", heads, " heads of ", head_dim,
                 " columns, expected them to make up x's ", d);
  if (norm_weight) CONDENSE_CHECK_PACKED(norm_weight, Dtype::f32, d);
  CONDENSE_CHECK_PACKED(lse, Dtype::f32, rows, heads);
}

// What attention_pool and its gradient check. The offsets are small, so their values are checked as well.
static inline void check_windows(const char* op, const View& x, const View& q, int64_t ratio, const View& cu_seqlens,
                                 const View& row_offsets, int64_t halo, const View& norm_weight,
                                 const View& window_bias, int64_t rows, const View& lse) {
  CONDENSE_CHECK_FLOAT(x, 2);
  CONDENSE_CHECK_ROWS(x);
  CONDENSE_CHECK_POSITIVE(ratio);
  CONDENSE_CHECK_NOT_NEGATIVE(halo);
  constexpr int64_t kMost = int64_t{1} << 40;  // so that sums of them stay in 64 bits
  CONDENSE_CHECK(ratio <= kMost && halo <= kMost, "ratio is ", ratio, " and halo ", halo, ", expected at most 2^40");
  if (q.rank == 3) {
    CONDENSE_CHECK_PACKED(q, Dtype::f32, rows, kSome, kSome);
  } else {
    CONDENSE_CHECK_PACKED(q, Dtype::f32, kSome, kSome);
  }
  const int64_t num_tokens = x.size[0], heads = q.size[q.rank - 2];
  check_pooled(op, x, heads, q.size[q.rank - 1], norm_weight, rows, lse);
  if (window_bias) CONDENSE_CHECK_PACKED(window_bias, Dtype::f32, heads, ratio + 2 * halo);
  CONDENSE_CHECK(bool(cu_seqlens) == bool(row_offsets), "cu_seqlens and row_offsets are expected together, or neither");
  if (!cu_seqlens) {
    CONDENSE_CHECK(rows == (num_tokens + ratio - 1) / ratio, "the result has ", rows, " rows for ", num_tokens,
                   " tokens at ratio ", ratio);
    return;
  }
  CONDENSE_CHECK_PACKED(cu_seqlens, Dtype::i64, kSome);
  CONDENSE_CHECK_PACKED(row_offsets, Dtype::i64, cu_seqlens.size[0]);
  const int64_t sequences = cu_seqlens.size[0] - 1;
  const int64_t *ends = cu_seqlens.as<const int64_t>(), *first_rows = row_offsets.as<const int64_t>();
  bool fit = ends[0] == 0 && first_rows[0] == 0 && ends[sequences] == num_tokens && first_rows[sequences] == rows;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t length = ends[s + 1] - ends[s];
    fit = fit && length >= 0 && first_rows[s + 1] - first_rows[s] == (length + ratio - 1) / ratio;
  }
  CONDENSE_CHECK(fit, "cu_seqlens and row_offsets do not cut ", num_tokens, " tokens into windows of ", ratio, " and ",
                 rows, " rows");
}

static inline void attention_pool(const View& x, const View& q, int64_t ratio, const View& cu_seqlens,
                                  const View& row_offsets, int64_t halo, double scale, const View& norm_weight,
                                  const View& window_bias, double eps, const View& out, const View& lse, int threads) {
  constexpr const char* op = "attention_pool";
  CONDENSE_CHECK_FLOAT(out, 2);
  check_windows(op, x, q, ratio, cu_seqlens, row_offsets, halo, norm_weight, window_bias, out.size[0], lse);
  CONDENSE_CHECK_PACKED(out, x.dtype, out.size[0], x.size[1]);
  const int64_t d = x.size[1], heads = q.size[q.rank - 2], head_dim = d / heads, rows = out.size[0];
  const float* w = norm_weight ? norm_weight.as<const float>() : nullptr;
  const float* bias = window_bias ? window_bias.as<const float>() : nullptr;
  const int64_t bias_width = window_bias ? window_bias.size[1] : 0;
  const Windows windows{ratio, halo, x.size[0], cu_seqlens, row_offsets};
  constexpr int64_t kBlock = 16, kRows = 8;  // tokens at once; windows of a task
  // Per thread: a query, a sum, and per head the weights of a block, maximum, sum and rescaling.
  const int64_t per_thread = (3 * d + heads * (kBlock + 3) + 15) / 16 * 16;
  Scratch scratch((threads * per_thread + 3 * d) * sizeof(float));
  const bool paired = x.dtype == Dtype::bf16 && head_dim % (2 * kWidth) == 0;
  float *shared_query = scratch.at<float>(threads * per_thread * sizeof(float)), *spare = shared_query + d;
  const auto prepare_query = [&](const float* from, float* room, float* query) {
    scale_query(from, w, static_cast<float>(scale), d, paired ? room : query);
    if (paired) arrange_paired(room, d, query);
  };
  if (q.rank == 2) prepare_query(q.as<const float>(), spare, shared_query);
  float* arranged_w = spare + d;
  if (paired && w) arrange_paired(w, d, arranged_w);

  by_dtype(x.dtype, [&]<class T>(T*) {
    parallel_for((rows + kRows - 1) / kRows, threads, [&](int64_t task, int worker) {
      float* own_query = scratch.at<float>(worker * per_thread * sizeof(float));
      float *sums = own_query + d, *room = sums + d, *weights = room + d;
      float *top = weights + kBlock * heads, *total = top + heads, *rescale = total + heads;
      int64_t sequence = 0;
      for (int64_t row = task * kRows; row < rows && row < (task + 1) * kRows; ++row) {
        const Windows::Window window = windows.at(row, sequence);
        sequence = window.sequence;
        const float* query = shared_query;
        if (q.rank == 3) {
          prepare_query(q.as<const float>() + row * d, room, own_query);
          query = own_query;
        }
        for (int64_t h = 0; h < heads; ++h) top[h] = -INFINITY, total[h] = 0.0f;
        T* target = out.as<T>() + row * d;
        for (int64_t first = window.first; first < window.last; first += kBlock) {
          const int64_t count = window.last - first < kBlock ? window.last - first : kBlock;
          const T* tokens = x.as<const T>() + first * x.stride[0];
          float inverse[kBlock];
          const auto products = [&]<int kTokens>(int64_t i) __attribute__((always_inline)) {
            const T* some = tokens + i * x.stride[0];
            float *dots = weights + i * heads, *squares = inverse + i;
            if constexpr (std::is_same_v<T, bf16>) {
              if (paired) {
                return row_products<kTokens, 1, true>(some, x.stride[0], &query, heads, head_dim, dots, squares);
              }
            }
            row_products<kTokens, 1>(some, x.stride[0], &query, heads, head_dim, dots, squares);
          };
          int64_t i = 0;
          for (; i + 4 <= count; i += 4) products.template operator()<4>(i);
          for (; i < count; ++i) products.template operator()<1>(i);
          for (i = 0; i < count; ++i) {
            inverse[i] = 1.0f / std::sqrt(inverse[i] / d + static_cast<float>(eps));
            const float* biases = bias ? bias + window.place + (first - window.first) + i : nullptr;
            for (int64_t h = 0; h < heads; ++h) {
              weights[i * heads + h] = inverse[i] * weights[i * heads + h] + (biases ? biases[h * bias_width] : 0.0f);
            }
          }
          for (int64_t h = 0; h < heads; h += kWidth) {
            const int64_t n = heads - h;
            Vec highest = load_up_to(top + h, n), before = highest;
            for (int64_t i = 0; i < count; ++i) {
              const Vec logit = load_up_to(weights + i * heads + h, n);
              highest = logit == logit ? max(logit, highest) : logit;  // NaN stays
            }
            // Before the first block the maximum is -inf: nothing is carried over then. All -inf gives NaN, as it
            // should.
            const Vec factor = before == splat(-INFINITY) ? Vec{} : exp(before - highest);
            Vec added = load_up_to(total + h, n) * factor;
            for (int64_t i = 0; i < count; ++i) {
              const Vec e = exp(load_up_to(weights + i * heads + h, n) - highest);
              added += e;
              store_up_to(weights + i * heads + h, e * splat(inverse[i]), n);
            }
            store_up_to(top + h, highest, n);
            store_up_to(total + h, added, n);
            store_up_to(rescale + h, factor, n);
          }
          const bool last = first + count == window.last;
          const float* carried = first != window.first ? sums : nullptr;
          const auto add_up = [&](const float* norm, auto* to) __attribute__((always_inline)) {
            if constexpr (std::is_same_v<T, bf16>) {
              if (paired) {
                return weighted_sum_paired(tokens, x.stride[0], count, weights, heads, head_dim, carried, rescale,
                                           norm ? arranged_w : nullptr, to);
              }
            }
            weighted_sum(tokens, x.stride[0], count, weights, heads, head_dim, carried, rescale, norm, to);
          };
          if (last) {
            for (int64_t i = 0; i < count; ++i) {
              for (int64_t h = 0; h < heads; ++h) weights[i * heads + h] /= total[h];
            }
            for (int64_t h = 0; h < heads; ++h) rescale[h] /= total[h];
            add_up(w, target);
          } else {
            add_up(nullptr, sums);
          }
        }
        float* row_lse = lse.as<float>() + row * heads;
        for (int64_t h = 0; h < heads; h += kWidth) {
          store_up_to(row_lse + h, load_up_to(top + h, heads - h) + log(load_up_to(total + h, heads - h)), heads - h);
        }
      }
    });
  });
}

}  // namespace condense::cpu::CONDENSE_ISA
