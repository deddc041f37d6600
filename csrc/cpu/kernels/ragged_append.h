// ragged_append: the keys and values of t new tokens, [B, G, t, D], behind the valid rows of each head of a ragged
// cache [T, D]. Copies 2 * B*G*t*D elements and moves nothing else; rows without room are left out, lengths grow all
// the same.
#pragma once

#include "cpu/kernels/compact.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace condense::cpu::CONDENSE_ISA {

inline void ragged_append(const View& k, const View& v, const View& cu_seqlens, const View& lengths, const View& k_new,
                          const View& v_new, int threads) {
  require_float(k, 2, "ragged_append: k must be [T, D]");
  require_float(k_new, 4, "ragged_append: k_new must be [B, G, t, D]");
  const int64_t kv_heads = k_new.size[1], heads = k_new.size[0] * kv_heads, added = k_new.size[2], d = k_new.size[3];
  for (const View* x : {&k, &v}) {
    require(x->rank == 2 && x->dtype == k.dtype && x->size[0] == k.size[0] && x->size[1] == d,
            "ragged_append: k and v must be [T, D] of one dtype");
    require(x->size[0] == 0 || d == 1 || x->stride[1] == 1, "ragged_append: rows must be contiguous");
  }
  for (const View* x : {&k_new, &v_new}) {
    require(x->rank == 4 && x->dtype == k.dtype, "ragged_append: k_new and v_new must be [B, G, t, D] of k's dtype");
    for (int i = 0; i < 4; ++i) require(x->size[i] == k_new.size[i], "ragged_append: v_new must be of k_new's shape");
    require(added == 0 || d == 1 || x->stride[3] == 1, "ragged_append: rows must be contiguous");
  }
  require_integer(cu_seqlens, 1, "ragged_append: cu_seqlens must be integers [B*G+1]");
  require_integer(lengths, 1, "ragged_append: lengths must be integers [B*G]");
  require(cu_seqlens.size[0] == heads + 1 && lengths.size[0] == heads,
          "ragged_append: cu_seqlens must be [B*G+1], lengths [B*G]");
  // A decoding step adds a few KB, which one thread has copied before another has woken.
  if (heads * added * d < 1 << 15) threads = 1;
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
        copy_row(from(k_new), k.as<T>() + to * k.stride[0], d);
        copy_row(from(v_new), v.as<T>() + to * v.stride[0], d);
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
