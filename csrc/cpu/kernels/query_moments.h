// query_moments: mean mu [B, H, D] and covariance cov [B, H, D, D], fp32, of the queries q [B, H, N, D] before their
// rotation, which is undone: p = q * cos - rotate_half(q) * sin, cos and sin [B or 1, N, D/2] already divided by
// cos^2 + sin^2.
//
// Reads q once. A block of tokens is unrotated into scratch that stays in the cache, and added to sum p and sum p p^T,
// both relative to the first token's p, so that the mean's square does not swamp the covariance. The second is
// symmetric: its products are made on and above the diagonal, in panels, and mirrored.
#pragma once

#include "cpu/bounds.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

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

static inline void query_moments(const View& q, const View& cos, const View& sin, int64_t sink, const View& bounds,
                                 const View& mu, const View& cov, int threads) {
  require_float(q, 4, "query_moments: q must be [B, H, N, D]");
  require(q.stride[3] == 1 || q.size[3] == 1, "query_moments: rows of q must be contiguous");
  require(!cos || (cos.rank == 3 && cos.dtype == Dtype::f32 && sin.rank == 3),
          "query_moments: cos must be [B, N, D/2]");
  const int64_t heads = q.size[1], num_tokens = q.size[2], d = q.size[3], wide = columns_of(d);
  constexpr int64_t kTokens = 128;
  const int64_t per_thread = (kTokens + d) * wide + 2 * wide;
  Scratch scratch(threads * per_thread * sizeof(float));

  by_dtype(q.dtype, [&]<class T>(T*) {
    parallel_for(q.size[0] * heads, threads, [&](int64_t task, int worker) {
      const int64_t b = task / heads, h = task % heads;
      float* block = scratch.at<float>(worker * per_thread * sizeof(float));
      float *products = block + kTokens * wide, *sums = products + d * wide, *shift = sums + wide;
      std::memset(block, 0, per_thread * sizeof(float));
      const T* queries = q.as<const T>() + b * q.stride[0] + h * q.stride[1];
      Span real = real_tokens(bounds, b, num_tokens);
      real.start = real.start + sink < real.stop ? real.start + sink : real.stop;
      const int64_t table = cos && cos.size[0] > 1 ? b : 0;
      const auto rotation = [&](const View& of, int64_t i) {
        return of ? of.as<const float>() + table * of.stride[0] + i * of.stride[1] : nullptr;
      };
      for (int64_t first = real.start; first < real.stop; first += kTokens) {
        const int64_t count = real.stop - first < kTokens ? real.stop - first : kTokens;
        for (int64_t i = 0; i < count; ++i) {
          float* p = block + i * wide;
          unrotate(queries + (first + i) * q.stride[2], rotation(cos, first + i), rotation(sin, first + i), d, p);
          if (first == real.start && i == 0) {
            // Only finite: an infinite query minus itself would make the mean NaN instead of infinite.
            for (int64_t c = 0; c < d; ++c) shift[c] = std::isfinite(p[c]) ? p[c] : 0.0f;
          }
          for (int64_t c = 0; c < wide; c += kWidth) {
            const Vec centred = load(p + c) - load(shift + c);
            store(p + c, centred);
            store(sums + c, load(sums + c) + centred);
          }
        }
        for (int64_t j = 0; j < wide; j += kPanel) {
          const int64_t rows = j + kPanel < d ? j + kPanel : d;  // on and above the diagonal
          multiply_panel(block, 1, wide, rows, block + j, wide, count, products + j, wide, true);
        }
      }
      const float share = real.stop > real.start ? 1.0f / static_cast<float>(real.stop - real.start) : 0.0f;
      float *mean = mu.as<float>() + task * d, *square = cov.as<float>() + task * d * d;
      for (int64_t i = 0; i < d; ++i) {
        sums[i] *= share;
        mean[i] = shift[i] + sums[i];
      }
      for (int64_t i = 0; i < d; ++i) {
        for (int64_t j = i; j < d; ++j) {
          // A channel with an infinite mean has no deviations: inf - inf, NaN.
          const float none = (sums[i] - sums[i]) + (sums[j] - sums[j]);
          square[i * d + j] = square[j * d + i] = products[i * wide + j] * share - sums[i] * sums[j] + none;
        }
      }
    });
  });
}

}  // namespace condense::cpu::CONDENSE_ISA
