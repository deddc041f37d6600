// The CUDA kernels as the bindings call them. Arguments of the op's schema by their names there, then the outputs, then
// torch's stream. All tensors are on the stream's device; nothing here allocates, waits, or reads a value back.
#pragma once

#include <cstdint>
#include <vector>

#include "condense/tensor.h"

namespace condense::cuda {

using Views = std::vector<View>;

void attention_pool(const View& x, const View& q, int64_t ratio, int64_t seqlen, const View& cu_seqlens,
                    const View& row_offsets, int64_t halo, double scale, const View& norm_weight,
                    const View& window_bias, double eps, const View& out, const View& lse, uintptr_t stream);
void select(const View& scores, int64_t budget, bool across_heads, const View& protect, const View& indices,
            const View& counts, uintptr_t stream);
void compact(const Views& k, const Views& v, const Views& cu_seqlens, const Views& indices, const Views& cu_indices,
             const View& cos, const View& sin, const View& first, const Views& k_out, const Views& v_out,
             uintptr_t stream);
void compact_(const Views& k, const Views& v, const Views& cu_seqlens, const Views& indices, const Views& cu_indices,
              const View& cos, const View& sin, const View& first, uintptr_t stream);
void ragged_append(const View& k, const View& v, const View& cu_seqlens, const View& lengths, const View& k_new,
                   const View& v_new, uintptr_t stream);

}  // namespace condense::cuda
