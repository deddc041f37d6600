// The tensors of a call of compact or compact_, for all layers of a cache, and what must be true of them.
#pragma once

#include "cuda/cuda.h"

namespace condense::cuda {

// The tensors of a call; k_out and v_out of compact alone.
struct Call {
  const Views &k, &v, &cu_seqlens, &indices, &cu_indices;
  const View &cos, &sin, &first;
  const Views *k_out, *v_out;
};

// Every layer is checked. Integers and tables are read by one running offset, integers of one width in all layers.
static inline void check_layers(const char *op, const Call &call, int64_t heads, int64_t d) {
  const View &cos = call.cos, &sin = call.sin, &first = call.first;
  const Dtype dtype = call.k[0].dtype;
  for (size_t l = 0; l < call.k.size(); ++l) {
    const View &k = call.k[l], &v = call.v[l], &indices = call.indices[l];
    if (call.cu_seqlens.empty()) {
      CONDENSE_CHECK_SHAPE(k, call.k[0].size[0], call.k[0].size[1], kAny, d);
      CONDENSE_CHECK_SHAPE(v, k.size[0], k.size[1], k.size[2], d);
    } else {
      const View &cu_seqlens = call.cu_seqlens[l];
      CONDENSE_CHECK_SHAPE(k, kAny, d);
      CONDENSE_CHECK_SHAPE(v, k.size[0], d);
      CONDENSE_CHECK_INTEGER(cu_seqlens, 1);
      CONDENSE_CHECK_PACKED(cu_seqlens, call.cu_seqlens[0].dtype, heads + 1);
    }
    CONDENSE_CHECK_DTYPE(k, dtype);
    CONDENSE_CHECK_DTYPE(v, dtype);
    CONDENSE_CHECK_ROWS(k);
    CONDENSE_CHECK_ROWS(v);
    CONDENSE_CHECK_INTEGER(indices, call.cu_indices.empty() ? 3 : 1);
    CONDENSE_CHECK_DTYPE(indices, call.indices[0].dtype);
    CONDENSE_CHECK_CONTIGUOUS(indices);
    if (!call.cu_indices.empty()) {
      const View &cu_indices = call.cu_indices[l];
      CONDENSE_CHECK_INTEGER(cu_indices, 1);
      CONDENSE_CHECK_PACKED(cu_indices, call.cu_indices[0].dtype, heads + 1);
    } else {
      CONDENSE_CHECK(indices.size[0] * indices.size[1] == heads, "indices has ", indices.size[0] * indices.size[1],
                     " heads, expected ", heads);
    }
    if (call.k_out) {
      const View &k_out = (*call.k_out)[l], &v_out = (*call.v_out)[l];
      if (call.cu_indices.empty()) {
        CONDENSE_CHECK_PACKED(k_out, dtype, indices.size[0], indices.size[1], indices.size[2], d);
        CONDENSE_CHECK_PACKED(v_out, dtype, indices.size[0], indices.size[1], indices.size[2], d);
      } else {
        CONDENSE_CHECK_PACKED(k_out, dtype, indices.size[0], d);
        CONDENSE_CHECK_PACKED(v_out, dtype, indices.size[0], d);
      }
    } else {
      CONDENSE_CHECK_WRITABLE(k);
      CONDENSE_CHECK_WRITABLE(v);
    }
  }
  CONDENSE_CHECK(bool(cos) == bool(sin), "cos and sin are expected together, or neither");
  if (cos) {
    CONDENSE_CHECK(d % 2 == 0, "k has ", d, " channels, expected an even number to turn them in pairs");
    CONDENSE_CHECK_PACKED(cos, Dtype::f32, kSome, d / 2);
    CONDENSE_CHECK_PACKED(sin, Dtype::f32, cos.size[0], d / 2);
    CONDENSE_CHECK(cos.size[0] < int64_t{1} << 31, "cos has ", cos.size[0], " rows, expected fewer than 2^31");
  }
  if (first) {
    CONDENSE_CHECK_INTEGER(first, 1);
    CONDENSE_CHECK_PACKED(first, first.dtype, heads);
  }
}

}  // namespace condense::cuda
