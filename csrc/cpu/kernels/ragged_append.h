// ragged_append: the keys and values of t new tokens, [B, G, t, D], behind the valid rows of each head of a ragged
// cache [T, D]. Copies 2 * B*G*t*D elements and moves nothing else; rows without room are left out, lengths grow all
// the same.
//
// Specification: condense_core/ops/reference/ragged_append.py.
#pragma once

#include "cpu/kernels/compact.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace condense::cpu::CONDENSE_ISA {

inline void ragged_append(const View& k, const View& v, const View& cu_seqlens, const View& lengths, const View& k_new,
                          const View& v_new, int threads) {
  constexpr const char* op = "ragged_append";
  CONDENSE_CHECK_FLOAT(k_new, 4);
  const int64_t batch = k_new.size[0], kv_heads = k_new.size[1], added = k_new.size[2], head_dim = k_new.size[3];
  const int64_t heads = batch * kv_heads;
  CONDENSE_CHECK_SHAPE(v_new, batch, kv_heads, added, head_dim);
  CONDENSE_CHECK_SAME_DTYPE(v_new, k_new);
  CONDENSE_CHECK_ROWS(k_new);
  CONDENSE_CHECK_ROWS(v_new);
  CONDENSE_CHECK_SHAPE(k, kAny, head_dim);
  CONDENSE_CHECK_SHAPE(v, k.size[0], head_dim);
  CONDENSE_CHECK_SAME_DTYPE(k, k_new);
  CONDENSE_CHECK_SAME_DTYPE(v, k_new);
  CONDENSE_CHECK_ROWS(k);
  CONDENSE_CHECK_ROWS(v);
  CONDENSE_CHECK_WRITABLE(k);
  CONDENSE_CHECK_WRITABLE(v);
  CONDENSE_CHECK_INTEGER(cu_seqlens, 1);
  CONDENSE_CHECK_SHAPE(cu_seqlens, heads + 1);
  CONDENSE_CHECK_INTEGER(lengths, 1);
  CONDENSE_CHECK_SHAPE(lengths, heads);
  CONDENSE_CHECK_WRITABLE(lengths);
  // A decoding step adds a few KB, which one thread has copied before another has woken.
  if (heads * added * head_dim < 1 << 15) threads = 1;
  by_dtype(k.dtype, [&]<class T>(T*) {
    parallel_for(heads, threads, [&](int64_t n, int) {
      int64_t start, room;
      ragged_part(cu_seqlens, n, k.size[0], start, room);
      const int64_t length = integer_at(lengths, n * lengths.stride[0]), valid = clamped(length, 0, room);
      const int64_t count = clamped(room - valid, 0, added);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t to = start + valid + j;
        const auto from = [&](const View& x) {
          return x.as<const T>() + n / kv_heads * x.stride[0] + n % kv_heads * x.stride[1] + j * x.stride[2];
        };
        copy_row(from(k_new), k.as<T>() + to * k.stride[0], head_dim);
        copy_row(from(v_new), v.as<T>() + to * v.stride[0], head_dim);
      }
      if (lengths.dtype == Dtype::i32) {
        lengths.as<int32_t>()[n * lengths.stride[0]] += static_cast<int32_t>(added);
      } else {
        lengths.as<int64_t>()[n * lengths.stride[0]] += added;
      }
    });
  });
}

}  // namespace condense::cpu::CONDENSE_ISA
