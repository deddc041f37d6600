// window_scores: how much attention the last w queries of a sequence give to each earlier key, smoothed. q_win [B, H,
// w, D], k [B, G, N, D]; out [B, G, N] fp32.
//
// The logits of a layer, [H, w, N], never exist. While a KV head's packed keys and one query head's logits, [w, N], fit
// into kScratch for all threads, a query head is scored at once: one product, one pass of exponentials, and the sums
// over queries are all that is kept. Longer caches are scored in blocks of keys, twice: first for each query's maximum
// and sum, then for the probabilities. That costs a second product, and bounds the scratch whatever N is. A mean over
// heads and the smoothing commute, so one row per KV head is kept.
//
// Specification: condense_core/ops/reference/window_scores.py.
#pragma once

#include "cpu/bounds.h"
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace condense::cpu::CONDENSE_ISA {

constexpr int64_t kScratch = 4 << 20;

// What both ways of scoring share.
struct WindowTask {
  const View &q, &k, &bounds;
  float factor;
  int64_t kv_heads, num_tokens, head_dim, group, window, heads;

  // Sequences of no more than w tokens keep all of them: nothing is scored.
  Span scored(int64_t head) const {
    const Span real = real_tokens(bounds, head / kv_heads, num_tokens);
    return Span{real.start, real.stop - window > real.start ? real.stop : real.start};
  }
  template <class T>
  const T* keys(int64_t head, int64_t first) const {
    return k.as<const T>() + head / kv_heads * k.stride[0] + head % kv_heads * k.stride[1] + first * k.stride[2];
  }
};

// Row `row` of logits between begin and end: e^(factor * x - max) in place, and their sum; max over the same range.
CONDENSE_INLINE float exponentials(float* row, int64_t begin, int64_t end, float factor) {
  Vec highest = splat(-INFINITY);
  for (int64_t i = begin; i < end; i += kWidth) {
    const int64_t n = end - i;
    const Vec value = n >= kWidth ? load(row + i) : load_part(row + i, n, factor < 0 ? INFINITY : -INFINITY);
    highest = max(value * splat(factor), highest);
  }
  const float most = begin < end ? max(highest) : -INFINITY;
  Vec total{};
  for (int64_t i = begin; i < end; i += kWidth) {
    const int64_t n = end - i;
    store_up_to(row + i, exp(fma(load_up_to(row + i, n), splat(factor), splat(-most))), n);
    total += load_up_to(row + i, n);
  }
  return sum(total);
}

template <class T>
static inline void received_at_once(const WindowTask& task, float* received, int64_t together, int threads) {
  using F = Factor<T>;
  const int64_t depth = depth_of<F>(task.head_dim), n = task.num_tokens, columns = columns_of(n);
  const int64_t panel_bytes = round_up(columns * depth * sizeof(F), 64);
  const int64_t query_bytes = round_up(rows_of(task.window) * depth * sizeof(F), 64);
  const int64_t per_thread = query_bytes + rows_of(task.window) * columns * sizeof(float);
  constexpr int64_t kKeys = 256;
  const int64_t blocks = (n + kKeys - 1) / kKeys;
  Scratch scratch(together * panel_bytes + threads * per_thread + together * task.group * n * sizeof(float));
  float* parts = scratch.at<float>(together * panel_bytes + threads * per_thread);  // of each query head

  for (int64_t from = 0; from < task.heads; from += together) {
    const int64_t count = task.heads - from < together ? task.heads - from : together;
    parallel_for(count * blocks, threads, [&](int64_t one, int) {
      const int64_t first = one % blocks * kKeys, keys = n - first < kKeys ? n - first : kKeys;
      pack(task.keys<T>(from + one / blocks, first), task.k.stride[2], keys, task.head_dim,
           scratch.at<F>(one / blocks * panel_bytes) + first * depth);
    });
    parallel_for(count * task.group, threads, [&](int64_t one, int worker) {
      const int64_t head = from + one / task.group, b = head / task.kv_heads;
      const int64_t h = head % task.kv_heads * task.group + one % task.group;
      const Span real = task.scored(head);
      float* sums = parts + one * n;
      for (int64_t i = 0; i < n; ++i) sums[i] = 0.0f;
      if (real.start == real.stop) return;
      F* rows = scratch.at<F>(together * panel_bytes + worker * per_thread);
      float* logits = scratch.at<float>(together * panel_bytes + worker * per_thread + query_bytes);
      copy_rows(task.q.as<const T>() + b * task.q.stride[0] + h * task.q.stride[1], task.q.stride[2], task.window,
                task.head_dim, rows);
      const Tiles<F> tiles;
      multiply(rows, task.window, scratch.at<F>(one / task.group * panel_bytes), n, depth, logits, columns);
      const int64_t end = real.stop - task.window;
      for (int64_t t = 0; t < task.window; ++t) {
        float* row = logits + t * columns;
        const float total = exponentials(row, real.start, end + t + 1, task.factor);
        const Vec weight = splat(1.0f / (total * static_cast<float>(task.window * task.group)));
        for (int64_t i = real.start; i < end; i += kWidth) {
          store_up_to(sums + i, fma(load_up_to(row + i, end - i), weight, load_up_to(sums + i, end - i)), end - i);
        }
      }
    });
    for (int64_t one = 0; one < count * task.group; ++one) {
      float* to = received + (from + one / task.group) * n;
      for (int64_t i = 0; i < n; ++i) to[i] = (one % task.group ? to[i] : 0.0f) + parts[one * n + i];
    }
  }
}

template <class T>
static inline void received_in_blocks(const WindowTask& task, float* received, int threads) {
  const View &q = task.q, &k = task.k;
  const int64_t kv_heads = task.kv_heads, num_tokens = task.num_tokens, head_dim = task.head_dim, heads = task.heads;
  const int64_t group = task.group, window = task.window, queries = group * window;
  const float factor = task.factor;
  constexpr int64_t kKeys = 256;
  const int64_t blocks = (num_tokens + kKeys - 1) / kKeys;
  const int64_t at_once = queries < 256 ? queries : 256;  // queries against a block of keys
  using F = Factor<T>;
  const int64_t depth = depth_of<F>(head_dim);
  const int64_t panel_bytes = round_up(columns_of(kKeys) * depth * sizeof(F), 64);
  const int64_t query_bytes = round_up(rows_of(at_once) * depth * sizeof(F), 64);
  const int64_t logit_bytes = rows_of(at_once) * columns_of(kKeys) * sizeof(float);
  const int64_t per_thread = panel_bytes + query_bytes + logit_bytes;
  // Maximum and sum of every query over every block; then over all of them, as maximum and 1 / (sum * w * group).
  const int64_t parts = heads * blocks * queries;
  Scratch scratch(threads * per_thread + (2 * parts + 2 * heads * queries) * sizeof(float));
  float *tops = scratch.at<float>(threads * per_thread), *totals = tops + parts;
  float *top = totals + parts, *inverse = top + heads * queries;

  // Calls use(logits, first query, number of queries) with the products of a block, [queries, kKeys].
  const auto score_block = [&](int64_t head, int64_t first, int64_t count, int worker, auto&& use) {
    const int64_t b = head / kv_heads, g = head % kv_heads;
    F* panels = scratch.at<F>(worker * per_thread);
    F* rows = scratch.at<F>(worker * per_thread + panel_bytes);
    float* logits = scratch.at<float>(worker * per_thread + panel_bytes + query_bytes);
    pack(k.as<const T>() + b * k.stride[0] + g * k.stride[1] + first * k.stride[2], k.stride[2], count, head_dim,
         panels);
    for (int64_t from = 0; from < queries; from += at_once) {
      const int64_t m = queries - from < at_once ? queries - from : at_once;
      for (int64_t r = 0; r < m; ++r) {
        const int64_t h = g * group + (from + r) / window, t = (from + r) % window;
        const T* row = q.as<const T>() + b * q.stride[0] + h * q.stride[1] + t * q.stride[2];
        convert(row, head_dim, rows + r * depth);
        for (int64_t c = head_dim; c < depth; ++c) rows[r * depth + c] = F{};
      }
      std::memset(static_cast<void*>(rows + m * depth), 0, (rows_of(m) - m) * depth * sizeof(F));
      multiply(rows, m, panels, count, depth, logits, columns_of(kKeys));
      use(logits, from, m);
    }
  };
  parallel_for(heads * blocks, threads, [&](int64_t one, int worker) {
    const int64_t head = one / blocks, first = one % blocks * kKeys;
    const int64_t count = num_tokens - first < kKeys ? num_tokens - first : kKeys;
    const Span real = task.scored(head);
    float *task_tops = tops + one * queries, *task_totals = totals + one * queries;
    if (first >= real.stop || first + count <= real.start) {
      for (int64_t r = 0; r < queries; ++r) task_tops[r] = -INFINITY, task_totals[r] = 0.0f;
      return;
    }
    const Tiles<F> tiles;
    score_block(head, first, count, worker, [&](const float* logits, int64_t from, int64_t m) {
      for (int64_t r = 0; r < m; ++r) {
        const float* row = logits + r * columns_of(kKeys);
        const int64_t limit = real.stop - window + (from + r) % window + 1 - first;
        const int64_t begin = real.start > first ? real.start - first : 0, end = limit < count ? limit : count;
        Vec highest = splat(-INFINITY);
        for (int64_t i = begin; i < end; i += kWidth) {
          const int64_t n = end - i;
          const Vec value = n >= kWidth ? load(row + i) * splat(factor)
                                        : load_part(row + i, n, factor < 0 ? INFINITY : -INFINITY) * splat(factor);
          highest = max(value, highest);
        }
        const float most = begin < end ? max(highest) : -INFINITY;
        const float origin = most > -INFINITY ? most : 0.0f;  // logits of -inf alone sum to 0 here, not to NaN
        Vec total{};
        for (int64_t i = begin; i < end; i += kWidth) {
          const int64_t n = end - i;
          if (n >= kWidth) {
            total += exp(fma(load(row + i), splat(factor), splat(-origin)));
          } else {
            float lanes[kWidth];
            store(lanes, exp(fma(load_part(row + i, n), splat(factor), splat(-origin))));
            total += load_part(lanes, n);
          }
        }
        task_tops[from + r] = most;
        task_totals[from + r] = sum(total);
      }
    });
  });

  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t r = 0; r < queries; ++r) {
      float most = -INFINITY, total = 0.0f;
      for (int64_t block = 0; block < blocks; ++block) {
        const float value = tops[(head * blocks + block) * queries + r];
        most = value > most ? value : most;
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t part = (head * blocks + block) * queries + r;
        // A block without a visible key, or of logits of -inf, adds nothing; a NaN is in the sum, whatever the maximum.
        if (tops[part] > -INFINITY)
          total += totals[part] * std::exp(tops[part] - most);
        else if (totals[part] != 0.0f)
          total += totals[part];
      }
      top[head * queries + r] = most;
      inverse[head * queries + r] = 1.0f / (total * static_cast<float>(queries));
    }
  }

  parallel_for(heads * blocks, threads, [&](int64_t one, int worker) {
    const int64_t head = one / blocks, first = one % blocks * kKeys;
    const int64_t count = num_tokens - first < kKeys ? num_tokens - first : kKeys;
    const Span real = task.scored(head);
    float* sums = received + head * num_tokens + first;
    for (int64_t i = 0; i < count; ++i) sums[i] = 0.0f;
    const int64_t begin = real.start > first ? real.start - first : 0;
    const int64_t end = real.stop - window - first < count ? real.stop - window - first : count;
    if (real.start == real.stop || begin >= end) return;
    const Tiles<F> tiles;
    score_block(head, first, count, worker, [&](const float* logits, int64_t from, int64_t m) {
      const float *most = top + head * queries + from, *weight = inverse + head * queries + from;
      for (int64_t i = begin; i < end; i += kWidth) {
        const int64_t n = end - i;
        Vec total = load_up_to(sums + i, n);
        for (int64_t r = 0; r < m; ++r) {
          const Vec value = load_up_to(logits + r * columns_of(kKeys) + i, n);
          total = fma(exp(fma(value, splat(factor), splat(-most[r]))), splat(weight[r]), total);
        }
        store_up_to(sums + i, total, n);
      }
    });
  });
}

static inline void window_scores(const View& q_win, const View& k, double scale, int64_t kernel_size,
                                 const View& bounds, const View& out, int threads) {
  constexpr const char* op = "window_scores";
  CONDENSE_CHECK_HEADS_OF_ROWS(k);
  const int64_t batch = k.size[0], kv_heads = k.size[1], num_tokens = k.size[2], head_dim = k.size[3];
  CONDENSE_CHECK_SHAPE(q_win, batch, kAny, kAny, head_dim);
  CONDENSE_CHECK_HEADS("q_win", q_win.size[1], kv_heads);
  CONDENSE_CHECK_SAME_DTYPE(q_win, k);
  CONDENSE_CHECK_ROWS(q_win);
  const int64_t window = q_win.size[2], heads = batch * kv_heads;
  CONDENSE_CHECK(window >= 1, "q_win has no queries, expected 1 or more");
  CONDENSE_CHECK(kernel_size >= 1 && kernel_size % 2 == 1, "kernel_size is ", kernel_size, ", expected an odd number");
  CONDENSE_CHECK_BOUNDS(bounds, batch);
  CONDENSE_CHECK_PACKED(out, Dtype::f32, batch, kv_heads, num_tokens);
  if (num_tokens == 0) return;
  const WindowTask task{q_win,    k,          bounds,   static_cast<float>(scale),
                        kv_heads, num_tokens, head_dim, q_win.size[1] / kv_heads,
                        window,   heads};
  Scratch scratch(heads * num_tokens * sizeof(float));
  float* received = scratch.at<float>();

  // Query heads of so many KV heads keep all threads at work.
  const int64_t together = (threads + task.group - 1) / task.group;
  const int64_t bytes = columns_of(num_tokens) * sizeof(float) * (together * task.head_dim + threads * rows_of(window));
  by_dtype(k.dtype, [&]<class T>(T*) {
    if (bytes < kScratch)
      received_at_once<T>(task, received, together, threads);
    else
      received_in_blocks<T>(task, received, threads);
  });

  parallel_for(heads, threads, [&](int64_t head, int) {
    const Span real = real_tokens(bounds, head / kv_heads, num_tokens);
    const int64_t forced = real.stop - window > real.start ? real.stop - window : real.start, reach = kernel_size / 2;
    const float* sums = received + head * num_tokens;
    float* scores = out.as<float>() + head * num_tokens;
    for (int64_t i = 0; i < num_tokens; ++i) {
      if (i < real.start || i >= real.stop) {
        scores[i] = -INFINITY;
      } else if (i >= forced) {
        scores[i] = INFINITY;
      } else {
        const int64_t from = i - reach > real.start ? i - reach : real.start;
        const int64_t to = i + reach < forced ? i + reach + 1 : forced;
        float total = 0.0f;
        for (int64_t j = from; j < to; ++j) total += sums[j];
        scores[i] = total / static_cast<float>(kernel_size);
      }
    }
  });
}

}  // namespace condense::cpu::CONDENSE_ISA
