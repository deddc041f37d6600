// lag_scores (LagKV): ranks of tokens in their chunk by how far they spread beyond the range of the next chunk, [B, G,
// N], from keys and values [B, G, N, D].
//
// A chunk is read twice: for the range it gives to the chunk before it, and for its own spread. A thread takes a run of
// chunks of one head, so that the second reading comes from its cache. A row is normed into D floats of the thread's
// own scratch, from which mean and squares are taken one after the other: the sum of squares alone would lose the
// digits that tell tokens apart. Ranks come from a stable radix sort of the chunk, the same for chunks of any size.
//
// Specification: condense_core/ops/reference/lag_scores.py.
#pragma once

#include "cpu/bounds.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace condense::cpu::CONDENSE_ISA {

// Per channel: low, 1 / (high - low), and a mask of bits that is 0 where the channel has no range.
struct ChannelRange {
  float *low, *factor;
  uint32_t* mask;
};

CONDENSE_INLINE int64_t whole_vectors(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

// The range of each channel over `rows` rows. A NaN in a channel makes its range NaN.
template <class T>
inline void channel_ranges(const T* x, int64_t stride, int64_t rows, int64_t d, const ChannelRange& range) {
  // A few channels at a time, so that their minima and maxima stay in registers.
  constexpr int kTogether = 4;
  for (int64_t c = 0; c < d; c += kTogether * kWidth) {
    Vec low[kTogether], high[kTogether], nan[kTogether];
    for (int u = 0; u < kTogether; ++u) {
      low[u] = splat(INFINITY);
      high[u] = splat(-INFINITY);
      nan[u] = Vec{};
    }
    const auto take = [&](int u, Vec value) __attribute__((always_inline)) {
      low[u] = min(value, low[u]);
      high[u] = max(value, high[u]);
      nan[u] = value == value ? nan[u] : value;
    };
    if (c + kTogether * kWidth <= d) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int u = 0; u < kTogether; ++u) take(u, load(x + i * stride + c + u * kWidth));
      }
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        for (int u = 0; u < kTogether; ++u) {
          const int64_t left = d - c - u * kWidth;
          if (left > 0)
            take(u, left >= kWidth ? load(x + i * stride + c + u * kWidth)
                                   : load_part(x + i * stride + c + u * kWidth, left));
        }
      }
    }
    for (int u = 0; u < kTogether && c + u * kWidth < d; ++u) {
      const Vec extent = nan[u] == nan[u] ? high[u] - low[u] : nan[u];
      const auto flat = extent < splat(0x1p-126f);
      const VecU32 mask = ~bits_as<VecU32>(flat);
      store(range.low + c + u * kWidth, low[u]);
      store(range.factor + c + u * kWidth, splat(1.0f) / extent);
      std::memcpy(range.mask + c + u * kWidth, &mask, sizeof(mask));
    }
  }
}

// std over the channels of (x - low) / (high - low), unbiased. z: D floats of scratch, rounded up to vectors.
template <class T>
CONDENSE_INLINE float relative_spread(const T* x, int64_t d, const ChannelRange& range, float* z) {
  Vec sums{};
  const auto norm = [&](int64_t c, Vec value) __attribute__((always_inline)) {
    VecU32 mask;
    std::memcpy(&mask, range.mask + c, sizeof(mask));
    return bits_as<Vec>(bits_as<VecU32>((value - load(range.low + c)) * load(range.factor + c)) & mask);
  };
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) {
    const Vec value = norm(c, load(x + c));
    store(z + c, value);
    sums += value;
  }
  float total = sum(sums);
  if (c < d) {
    store(z + c, norm(c, load_part(x + c, d - c)));
    for (int64_t i = c; i < d; ++i) total += z[i];
  }
  const float mean = total / static_cast<float>(d);
  Vec squares{};
  for (c = 0; c + kWidth <= d; c += kWidth) {
    const Vec away = load(z + c) - splat(mean);
    squares = fma(away, away, squares);
  }
  float square = sum(squares);
  for (; c < d; ++c) square += (z[c] - mean) * (z[c] - mean);
  return std::sqrt(square / static_cast<float>(d > 1 ? d - 1 : 1));
}

// Adds the softmax of spread [n] to info [n]; NaN where a spread is not finite. spread has room for whole vectors.
inline void add_softmax(float* spread, int64_t n, float* info) {
  float highest = -INFINITY;
  for (int64_t i = 0; i < n; ++i) {
    if (std::isfinite(spread[i]) && spread[i] > highest) highest = spread[i];
  }
  Vec sums{};
  for (int64_t i = 0; i < n; i += kWidth) {
    Vec value = load(spread + i);
    for (int64_t j = n - i; j < kWidth; ++j) value[j] = -INFINITY;  // only in the last vector
    const Vec finite = abs(value) < splat(INFINITY) ? exp(value - splat(highest)) : splat(0.0f);
    sums += finite;
    store(spread + i, abs(value) < splat(INFINITY) ? finite : splat(NAN));
  }
  const float total = sum(sums);
  for (int64_t i = 0; i < n; ++i) info[i] += spread[i] / total;
}

// ranks [n]: 0 for the lowest of info >= 0, NaN below all; of equal ones the earlier ranks higher. Scratch: 4 * n.
inline void rank(const float* info, int64_t n, uint32_t* scratch, float* scores) {
  uint32_t *keys = scratch, *places = scratch + n, *keys_to = scratch + 2 * n, *places_to = scratch + 3 * n;
  uint32_t counts[4][256] = {};
  for (int64_t i = 0; i < n; ++i) {
    const float value = info[n - 1 - i];  // the last first, so that the stable sort leaves the earlier higher
    keys[i] = value == value ? bits_as<uint32_t>(value) + 1 : 0;
    places[i] = static_cast<uint32_t>(n - 1 - i);
    for (int digit = 0; digit < 4; ++digit) ++counts[digit][keys[i] >> 8 * digit & 255];
  }
  for (int digit = 0; digit < 4; ++digit) {
    uint32_t next[256], total = 0;
    for (int value = 0; value < 256; ++value) {
      next[value] = total;
      total += counts[digit][value];
    }
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t to = next[keys[i] >> 8 * digit & 255]++;
      keys_to[to] = keys[i];
      places_to[to] = places[i];
    }
    uint32_t* swapped = keys;
    keys = keys_to, keys_to = swapped;
    swapped = places;
    places = places_to, places_to = swapped;
  }
  for (int64_t i = 0; i < n; ++i) scores[places[i]] = static_cast<float>(i) / static_cast<float>(n);
}

inline void lag_scores(const View& k, const View& v, int64_t lag_size, int64_t sink, const View& bounds,
                       const View& out, int threads) {
  constexpr const char* op = "lag_scores";
  CONDENSE_CHECK_HEADS_OF_ROWS(k);
  const int64_t batch = k.size[0], kv_heads = k.size[1], num_tokens = k.size[2], head_dim = k.size[3];
  CONDENSE_CHECK_SHAPE(v, batch, kv_heads, num_tokens, head_dim);
  CONDENSE_CHECK_SAME_DTYPE(v, k);
  CONDENSE_CHECK_ROWS(v);
  CONDENSE_CHECK_POSITIVE(lag_size);
  CONDENSE_CHECK_NOT_NEGATIVE(sink);
  CONDENSE_CHECK_BOUNDS(bounds, batch);
  CONDENSE_CHECK_PACKED(out, Dtype::f32, batch, kv_heads, num_tokens);
  if (num_tokens == 0) return;
  if (sink > num_tokens) sink = num_tokens;
  if (lag_size > num_tokens) lag_size = num_tokens;  // as short for every sequence
  const int64_t chunks = num_tokens / lag_size + 1;  // an upper bound, and one for what no chunk holds
  // Chunks one after another reuse what they read; but small ones alone would be little work for a thread.
  const int64_t run = lag_size >= 1024 ? 1 : 1024 / lag_size, runs = (chunks + run - 1) / run;
  const int64_t room = whole_vectors(lag_size), width = whole_vectors(head_dim);
  if (threads < 1) threads = 1;
  const int64_t floats = 4 * width + 2 * room + 4 * lag_size;
  const Scratch scratch(threads * whole_vectors(floats) * 4);
  by_dtype(k.dtype, [&]<class T>(T*) {
    parallel_for(batch * kv_heads * runs, threads, [&](int64_t task, int worker) {
      const int64_t head = task / runs, b = head / kv_heads, g = head % kv_heads;
      const Span real = real_tokens(bounds, b, num_tokens);
      float* const scores = out.as<float>() + head * num_tokens;
      const int64_t length = real.stop - real.start, rest = length - sink;
      const int64_t scored = rest < 2 * lag_size ? 0 : rest / lag_size - 1;  // chunks
      const int64_t begin = real.start + sink;
      if (task % runs == 0) {
        const int64_t end = begin + scored * lag_size;
        for (int64_t i = 0; i < num_tokens; ++i) {
          if (scored && i >= begin && i < end) continue;
          const bool padding = i < real.start || i >= real.stop;
          scores[i] = padding ? -INFINITY : INFINITY;
          if (!padding && rest < 2 * lag_size && i >= begin) {
            scores[i] = static_cast<float>(i - begin) / static_cast<float>(rest);
          }
        }
      }
      float* const own = scratch.at<float>() + worker * whole_vectors(floats);
      const ChannelRange range{own, own + width, reinterpret_cast<uint32_t*>(own + 2 * width)};
      float *const z = own + 3 * width, *const spread = z + width, *const info = spread + room;
      uint32_t* const sort_space = reinterpret_cast<uint32_t*>(info + room);
      const int64_t last = (task % runs + 1) * run < scored ? (task % runs + 1) * run : scored;
      for (int64_t chunk = task % runs * run; chunk < last; ++chunk) {
        const int64_t first = begin + chunk * lag_size;
        for (int64_t i = 0; i < lag_size; ++i) info[i] = 0.0f;
        for (const View* tensor : {&k, &v}) {
          const View& x = *tensor;
          const T* rows = x.as<const T>() + b * x.stride[0] + g * x.stride[1] + first * x.stride[2];
          channel_ranges(rows + lag_size * x.stride[2], x.stride[2], lag_size, head_dim, range);
          for (int64_t i = 0; i < lag_size; ++i)
            spread[i] = relative_spread(rows + i * x.stride[2], head_dim, range, z);
          add_softmax(spread, lag_size, info);
        }
        rank(info, lag_size, sort_space, scores + first);
      }
    });
  });
}

}  // namespace condense::cpu::CONDENSE_ISA
