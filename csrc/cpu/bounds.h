// The real tokens of a sequence of a padded batch. Included per instruction set, like everything that kernels use.
#pragma once

#include "cpu/simd.h"

namespace condense::cpu::CONDENSE_ISA {

struct Span {
  int64_t start, stop;  // 0 <= start <= stop <= N
};

// Row b of bounds [B, 2], clamped to [0, num_tokens]; all tokens where bounds is None.
CONDENSE_INLINE Span real_tokens(const View& bounds, int64_t b, int64_t num_tokens) {
  if (!bounds) return {0, num_tokens};
  const int64_t offset = b * bounds.stride[0];
  int64_t start = integer_at(bounds, offset), stop = integer_at(bounds, offset + bounds.stride[1]);
  start = start < 0 ? 0 : start > num_tokens ? num_tokens : start;
  stop = stop < start ? start : stop > num_tokens ? num_tokens : stop;
  return {start, stop};
}

}  // namespace condense::cpu::CONDENSE_ISA
