// compact: the rows of keys and values at `indices`, next to each other, in new tensors or in place; keys turned back
// to their new positions on the way.
//
// Every row is read and written once, 2 * M * D elements for keys and for values each, and nothing else of size: bound
// by memory. A thread copies runs of about 64 KB of output. In place, a row never moves behind where it stands, so the
// rows of a head are moved in order, by one thread; keys and values of all heads are independent.
// All indices are checked, on the calling thread, before anything is written.
//
// Specification: condense_core/ops/reference/compact.py.
#pragma once

#include <cstdio>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace condense::cpu::CONDENSE_ISA {

CONDENSE_INLINE int64_t clamped(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Part n of a tensor whose parts stand in offsets[n] to offsets[n + 1], in order and clamped to its size.
CONDENSE_INLINE void ragged_part(const View& offsets, int64_t n, int64_t size, int64_t& start, int64_t& count) {
  start = clamped(integer_at(offsets, n * offsets.stride[0]), 0, size);
  count = clamped(integer_at(offsets, (n + 1) * offsets.stride[0]), start, size) - start;
}

// Rows of one head of a cache [B, G, N, D] or [T, D].
struct HeadRows {
  int64_t offset, count, stride;  // in elements
};

CONDENSE_INLINE HeadRows head_rows(const View& x, const View& cu_seqlens, int64_t n) {
  if (x.rank == 4) {
    return {n / x.size[1] * x.stride[0] + n % x.size[1] * x.stride[1], x.size[2], x.stride[2]};
  }
  int64_t start, count;
  ragged_part(cu_seqlens, n, x.size[0], start, count);
  return {start * x.stride[0], count, x.stride[0]};
}

// Indices of one head of [B, G, M] or [R], and the first row of the output that they fill.
struct HeadIndices {
  int64_t offset, count, stride, first_row;
};

CONDENSE_INLINE HeadIndices head_indices(const View& x, const View& cu_indices, int64_t n) {
  if (x.rank == 3) {
    return {n / x.size[1] * x.stride[0] + n % x.size[1] * x.stride[1], x.size[2], x.stride[2], n * x.size[2]};
  }
  int64_t start, count;
  ragged_part(cu_indices, n, x.size[0], start, count);
  return {start * x.stride[0], count, x.stride[0], start};
}

// What compact and compact_ share: tensors that fit each other, and how the keys turn.
struct Compaction {
  const View &k, &v, &cu_seqlens, &indices, &cu_indices, &cos, &sin, &first;
  int64_t num_heads, head_dim;

  int64_t first_of(int64_t n) const { return first ? integer_at(first, n * first.stride[0]) : 0; }
};

inline Compaction fitting(const char* op, const View& k, const View& v, const View& cu_seqlens, const View& indices,
                          const View& cu_indices, const View& cos, const View& sin, const View& first) {
  const bool ragged = bool(cu_seqlens), ragged_indices = bool(cu_indices);
  CONDENSE_CHECK_FLOAT(k, ragged ? 2 : 4);
  if (ragged) {
    CONDENSE_CHECK_SHAPE(v, k.size[0], k.size[1]);
    CONDENSE_CHECK_INTEGER(cu_seqlens, 1);
    CONDENSE_CHECK_SHAPE(cu_seqlens, kSome);
  } else {
    CONDENSE_CHECK_SHAPE(v, k.size[0], k.size[1], k.size[2], k.size[3]);
  }
  CONDENSE_CHECK_SAME_DTYPE(v, k);
  CONDENSE_CHECK_ROWS(k);
  CONDENSE_CHECK_ROWS(v);
  const int64_t heads = ragged ? cu_seqlens.size[0] - 1 : k.size[0] * k.size[1], d = k.size[k.rank - 1];
  CONDENSE_CHECK(d >= 1, "k has rows of no channels, expected 1 or more");
  CONDENSE_CHECK_INTEGER(indices, ragged_indices ? 1 : 3);
  if (ragged_indices) {
    CONDENSE_CHECK_INTEGER(cu_indices, 1);
    CONDENSE_CHECK_SHAPE(cu_indices, heads + 1);
  } else if (ragged) {
    CONDENSE_CHECK(indices.size[0] * indices.size[1] == heads, "indices has ", indices.size[0] * indices.size[1],
                   " heads, expected the ", heads, " of cu_seqlens");
  } else {
    CONDENSE_CHECK_SHAPE(indices, k.size[0], k.size[1], kAny);
  }
  CONDENSE_CHECK(bool(cos) == bool(sin), "cos and sin are expected together, or neither");
  if (cos) {
    CONDENSE_CHECK(d % 2 == 0, "k has ", d, " channels, expected an even number to turn them in pairs");
    CONDENSE_CHECK_SHAPE(cos, kAny, d / 2);
    CONDENSE_CHECK_SHAPE(sin, cos.size[0], d / 2);
    CONDENSE_CHECK_DTYPE(cos, Dtype::f32);
    CONDENSE_CHECK_DTYPE(sin, Dtype::f32);
    CONDENSE_CHECK_ROWS(cos);
    CONDENSE_CHECK_ROWS(sin);
  }
  if (first) {
    CONDENSE_CHECK_INTEGER(first, 1);
    CONDENSE_CHECK_SHAPE(first, heads);
  }
  return {k, v, cu_seqlens, indices, cu_indices, cos, sin, first, heads, d};
}

// a - b - c, of any values.
CONDENSE_INLINE int64_t difference(int64_t a, int64_t b, int64_t c) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b) - static_cast<uint64_t>(c));
}

// Throws at the first index that its head does not have, that its key may not turn by, or, in place, that falls.
template <class Index>
inline void check_indices(const Compaction& c, bool in_place, const Index* indices) {
  const long long limit = c.cos ? c.cos.size[0] : 0;
  char what[320];
  for (int64_t n = 0; n < c.num_heads; ++n) {
    const HeadIndices list = head_indices(c.indices, c.cu_indices, n);
    const Index* const own = indices + list.offset;
    const int64_t rows = head_rows(c.k, c.cu_seqlens, n).count, first = c.first_of(n);
    bool wrong = false;  // looked at without branches; what it was is found out if there is something
    for (int64_t j = 0; j < list.count; ++j) {
      const int64_t index = own[j * list.stride];
      wrong |= static_cast<uint64_t>(index) + 1 > static_cast<uint64_t>(rows);
    }
    if (in_place) {
      for (int64_t j = 1; j < list.count; ++j) {
        const int64_t index = own[j * list.stride], before = own[(j - 1) * list.stride];
        wrong |= (index >= 0) & (index <= before || before < 0);
      }
    }
    if (c.cos) {
      for (int64_t j = 0; j < list.count; ++j) {
        const int64_t index = own[j * list.stride];
        wrong |= (index >= 0) & (static_cast<uint64_t>(difference(index, first, j)) >= static_cast<uint64_t>(limit));
      }
    }
    if (!wrong) continue;
    for (int64_t j = 0; j < list.count; ++j) {
      const long long index = own[j * list.stride], place = j, head = n;
      const long long before = j > 0 ? own[(j - 1) * list.stride] : 0;
      const long long shift = difference(index, first, j);
      if (in_place && j > 0 && index >= 0 && (index <= before || before < 0)) {
        std::snprintf(what, sizeof(what),
                      "indices holds %lld at place %lld of head %lld after %lld, expected them ascending, -1 only at "
                      "the end: in place, a row would be overwritten before it is read",
                      index, place, head, before);
      } else if (index < -1 || index >= rows) {
        std::snprintf(what, sizeof(what),
                      "indices holds %lld at place %lld of head %lld, expected -1 or an index below the head's %lld "
                      "rows",
                      index, place, head, static_cast<long long>(rows));
      } else if (c.cos && index >= 0 && (shift < 0 || shift >= limit)) {
        std::snprintf(what, sizeof(what),
                      "rotate has %lld rows, but the key at place %lld of head %lld (index %lld, first %lld) moves by "
                      "%lld positions",
                      limit, place, head, index, static_cast<long long>(first), shift);
      } else {
        continue;
      }
      throw std::invalid_argument(what);
    }
  }
}

inline void check_indices(const Compaction& c, bool in_place) {
  if (c.indices.dtype == Dtype::i32) return check_indices(c, in_place, c.indices.as<const int32_t>());
  check_indices(c, in_place, c.indices.as<const int64_t>());
}

template <class T>
CONDENSE_INLINE void copy_row(const T* from, T* to, int64_t d) {
  const char* source = reinterpret_cast<const char*>(from);
  char* target = reinterpret_cast<char*>(to);
  const int64_t bytes = d * static_cast<int64_t>(sizeof(T));
  constexpr int64_t kStep = sizeof(Vec);
  int64_t i = 0;
  for (; i + kStep <= bytes; i += kStep) {
    Vec v;
    std::memcpy(&v, source + i, kStep);
    std::memcpy(target + i, &v, kStep);
  }
  if (i < bytes) std::memmove(target + i, source + i, bytes - i);
}

// The halves (x1, x2) of a key become (x1 c + x2 s, x2 c - x1 s); `to` may be `from`.
template <class T>
CONDENSE_INLINE void turn_row(const T* from, T* to, int64_t d, const float* cos, const float* sin) {
  const int64_t half = d / 2;
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const Vec low = load(from + i), high = load(from + half + i), c = load(cos + i), s = load(sin + i);
    store(to + i, fma(low, c, high * s));
    store(to + half + i, fma(high, c, -(low * s)));
  }
  if (i < half) {
    const int64_t left = half - i;
    const Vec low = load_part(from + i, left), high = load_part(from + half + i, left);
    const Vec c = load_part(cos + i, left), s = load_part(sin + i, left);
    store_part(to + i, fma(low, c, high * s), left);
    store_part(to + half + i, fma(high, c, -(low * s)), left);
  }
}

// The rows j in [start, stop) of the list of head n, from x to the row j of `to`, or zeros.
template <class T>
inline void move_rows(const Compaction& c, int64_t n, bool keys, int64_t start, int64_t stop, T* to,
                      int64_t to_stride) {
  const View& x = keys ? c.k : c.v;
  const HeadRows rows = head_rows(x, c.cu_seqlens, n);
  const HeadIndices list = head_indices(c.indices, c.cu_indices, n);
  const T* const from = x.as<const T>() + rows.offset;
  const bool turn = keys && c.cos;
  const int64_t first = turn ? c.first_of(n) : 0;
  constexpr int64_t kAhead = 4;  // rows asked for before they are copied: their gaps hide them from the processor
  for (int64_t j = start; j < stop; ++j) {
    const int64_t index = integer_at(c.indices, list.offset + j * list.stride);
    if (j + kAhead < stop) {
      const int64_t later = integer_at(c.indices, list.offset + (j + kAhead) * list.stride);
      const char* const row = reinterpret_cast<const char*>(from + (later < 0 ? 0 : later) * rows.stride);
      for (int64_t i = 0; i < c.head_dim * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(row + i);
    }
    T* const target = to + j * to_stride;
    if (index < 0) {
      if (from == to) continue;  // in place: what stands there stays
      std::memset(static_cast<void*>(target), 0, c.head_dim * sizeof(T));
      continue;
    }
    const T* const source = from + index * rows.stride;
    if (turn) {
      const int64_t shift = index - first - j;
      turn_row(source, target, c.head_dim, c.cos.as<const float>() + shift * c.cos.stride[0],
               c.sin.as<const float>() + shift * c.sin.stride[0]);
    } else if (source != target) {
      copy_row(source, target, c.head_dim);
    }
  }
}

inline void compact(const View& k, const View& v, const View& cu_seqlens, const View& indices, const View& cu_indices,
                    const View& cos, const View& sin, const View& first, const View& k_out, const View& v_out,
                    int threads) {
  constexpr const char* op = "compact";
  const Compaction c = fitting(op, k, v, cu_seqlens, indices, cu_indices, cos, sin, first);
  if (cu_indices) {
    CONDENSE_CHECK_PACKED(k_out, k.dtype, indices.size[0], c.head_dim);
    CONDENSE_CHECK_PACKED(v_out, k.dtype, indices.size[0], c.head_dim);
  } else {
    CONDENSE_CHECK_PACKED(k_out, k.dtype, indices.size[0], indices.size[1], indices.size[2], c.head_dim);
    CONDENSE_CHECK_PACKED(v_out, k.dtype, indices.size[0], indices.size[1], indices.size[2], c.head_dim);
  }
  check_indices(c, false);
  int64_t longest = 0, covered = 0;
  for (int64_t n = 0; n < c.num_heads; ++n) {
    const HeadIndices list = head_indices(indices, cu_indices, n);
    if (list.count > longest) longest = list.count;
    if (list.first_row + list.count > covered) covered = list.first_row + list.count;
  }
  by_dtype(k.dtype, [&]<class T>(T*) {
    const int64_t row_bytes = c.head_dim * static_cast<int64_t>(sizeof(T));
    if (cu_indices) {  // rows of no head: before the first and behind the last
      const int64_t before = c.num_heads > 0 ? head_indices(indices, cu_indices, 0).first_row : 0;
      for (const View* out : {&k_out, &v_out}) {
        std::memset(out->data, 0, before * row_bytes);
        std::memset(out->as<char>() + covered * row_bytes, 0, (indices.size[0] - covered) * row_bytes);
      }
    }
    const int64_t run = row_bytes < 65536 ? 65536 / row_bytes : 1, runs = (longest + run - 1) / run;
    parallel_for(2 * c.num_heads * runs, threads, [&](int64_t task, int) {
      const int64_t n = task / runs % c.num_heads, start = task % runs * run;
      const bool keys = task < c.num_heads * runs;
      const HeadIndices list = head_indices(indices, cu_indices, n);
      T* const out = (keys ? k_out : v_out).as<T>() + list.first_row * c.head_dim;
      move_rows(c, n, keys, start, start + run < list.count ? start + run : list.count, out, c.head_dim);
    });
  });
}

inline void compact_(const View& k, const View& v, const View& cu_seqlens, const View& indices, const View& cu_indices,
                     const View& cos, const View& sin, const View& first, bool check_only, int threads) {
  constexpr const char* op = "compact_";
  const Compaction c = fitting(op, k, v, cu_seqlens, indices, cu_indices, cos, sin, first);
  CONDENSE_CHECK_WRITABLE(k);
  CONDENSE_CHECK_WRITABLE(v);
  check_indices(c, true);
  if (check_only) return;
  by_dtype(k.dtype, [&]<class T>(T*) {
    parallel_for(2 * c.num_heads, threads, [&](int64_t task, int) {
      const int64_t n = task % c.num_heads;
      const View& x = task < c.num_heads ? k : v;
      const HeadRows rows = head_rows(x, cu_seqlens, n);
      const HeadIndices list = head_indices(indices, cu_indices, n);
      move_rows(c, n, task < c.num_heads, 0, list.count, x.as<T>() + rows.offset, rows.stride);
    });
  });
}

}  // namespace condense::cpu::CONDENSE_ISA
