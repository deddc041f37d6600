"""The real tokens of a padded batch, as kernels read them: on the device, so that nothing waits for the host."""

import triton
import triton.language as tl


@triton.jit
def load_bounds(bounds_ptr, b, num_tokens):
    """First real token of sequence `b` and the end of its real tokens, int64, with 0 <= start <= stop <= num_tokens.

    Args:
        bounds_ptr: (batch, 2) int32 or int64, contiguous; None: every token is real.
    """
    # Not num_tokens.to(...): a runtime argument of value 1 arrives as a compile-time constant, which has no such
    # method.
    total = tl.zeros([], tl.int64) + num_tokens
    if bounds_ptr is None:
        return tl.zeros([], tl.int64), total
    else:
        start = tl.load(bounds_ptr + 2 * b).to(tl.int64)
        stop = tl.load(bounds_ptr + 2 * b + 1).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), total)
        return start, tl.maximum(tl.minimum(stop, total), start)


@triton.jit
def force(scores, token, start, stop, sink, window):
    """+inf for the first `sink` and the last `window` tokens of `[start, stop)`, -inf outside of it."""
    forced = (token - start < sink) | (token >= stop - window)
    scores = tl.where(forced, float("inf"), scores)
    return tl.where((token >= start) & (token < stop), scores, float("-inf"))
