// Every kernel, compiled for the instruction set that the including file names, and the table of them.
//
// All of it lies in the namespace CONDENSE_ISA: the linker keeps one copy of an inline function that several files
// share, and if that were the copy made for AVX-512, older processors would stop at it. A test looks for such symbols.
#pragma once

#include "cpu/kernels/attention_pool.h"
#include "cpu/kernels/attention_pool_backward.h"
#include "cpu/kernels/compact.h"
#include "cpu/kernels/cross_pool.h"
#include "cpu/kernels/expected_attention.h"
#include "cpu/kernels/key_norm.h"
#include "cpu/kernels/key_similarity.h"
#include "cpu/kernels/lag_scores.h"
#include "cpu/kernels/non_causal_chunks.h"
#include "cpu/kernels/query_moments.h"
#include "cpu/kernels/ragged_append.h"
#include "cpu/kernels/ragged_decode_attention.h"
#include "cpu/kernels/select.h"
#include "cpu/kernels/value_projection_norm.h"
#include "cpu/kernels/window_scores.h"
#include "cpu/table.h"

namespace condense::cpu::CONDENSE_ISA {

extern const Table kTable;
const Table kTable = {
    .attention_pool = attention_pool,
    .attention_pool_backward = attention_pool_backward,
    .cross_pool = cross_pool,
    .window_scores = window_scores,
    .non_causal_chunks = non_causal_chunks,
    .query_moments = query_moments,
    .expected_attention = expected_attention,
    .value_projection_norm = value_projection_norm,
    .key_norm = key_norm,
    .key_similarity = key_similarity,
    .lag_scores = lag_scores,
    .select = select,
    .compact = compact,
    .compact_ = compact_,
    .ragged_append = ragged_append,
    .ragged_decode_attention = ragged_decode_attention,
};

}  // namespace condense::cpu::CONDENSE_ISA
