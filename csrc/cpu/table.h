// The CPU kernels, one table of functions for each instruction set, and the choice between them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "condense/tensor.h"

namespace condense::cpu {

// Arguments of the op's schema by their names there, then the outputs, then the number of threads. Shapes stand beside
// each kernel in cpu/kernels/; Python passes everything by these names (bindings.cpp).
struct Table {
  void (*attention_pool)(const View& x, const View& q, int64_t ratio, const View& cu_seqlens, const View& row_offsets,
                         int64_t halo, double scale, const View& norm_weight, const View& window_bias, double eps,
                         const View& out, const View& lse, int threads);
  void (*attention_pool_backward)(const View& grad, const View& x, const View& q, const View& lse, int64_t ratio,
                                  const View& cu_seqlens, const View& row_offsets, int64_t halo, double scale,
                                  const View& norm_weight, const View& window_bias, double eps, const View& dx,
                                  const View& dq, const View& dw, const View& dbias, int threads);
  void (*cross_pool)(const View& x, const View& q, const View& blocks, double scale, const View& norm_weight,
                     double eps, const View& out, const View& lse, int threads);
  void (*window_scores)(const View& q_win, const View& k, double scale, int64_t kernel_size, const View& bounds,
                        const View& out, int threads);
  void (*non_causal_chunks)(const View& q, const View& k, int64_t chunk_size, double scale, const View& bounds,
                            const View& out, int threads);
  void (*query_moments)(const View& q, const View& cos, const View& sin, int64_t sink, const View& bounds,
                        const View& mu, const View& cov, int threads);
  void (*expected_attention)(const View& k, const View& v, const View& mu, const View& cov, const View& mean_cos,
                             const View& mean_sin, double scale, double epsilon, int64_t sink, const View& bounds,
                             const View& out, int threads);
  void (*value_projection_norm)(const View& v, const View& w_o, const View& bounds, const View& out, int threads);
  void (*key_norm)(const View& k, int64_t sink, int64_t window, const View& bounds, const View& out, int threads);
  void (*key_similarity)(const View& k, int64_t sink, int64_t window, const View& bounds, const View& out, int threads);
  void (*lag_scores)(const View& k, const View& v, int64_t lag_size, int64_t sink, const View& bounds, const View& out,
                     int threads);
  void (*select)(const View& scores, int64_t budget, bool across_heads, const View& protect, const View& indices,
                 const View& counts, int threads);
  void (*compact)(const View& k, const View& v, const View& cu_seqlens, const View& indices, const View& cu_indices,
                  const View& cos, const View& sin, const View& first, const View& k_out, const View& v_out,
                  int threads);
  void (*compact_)(const View& k, const View& v, const View& cu_seqlens, const View& indices, const View& cu_indices,
                   const View& cos, const View& sin, const View& first, bool check_only, int threads);
  void (*ragged_append)(const View& k, const View& v, const View& cu_seqlens, const View& lengths, const View& k_new,
                        const View& v_new, int threads);
  void (*ragged_decode_attention)(const View& q, const View& k, const View& v, const View& cu_seqlens,
                                  const View& lengths, double scale, const View& out, int threads);
};

// Names of the instruction sets that this build has and this processor runs, the slowest first.
std::vector<std::string> instruction_sets();

// The one in use: the fastest, or the one that use_instruction_set or CONDENSE_CPU_ISA asked for.
const char* instruction_set();
void use_instruction_set(const std::string& name);
const Table& table();

}  // namespace condense::cpu
