"""Windows of packed sequences: how many there are, and where their rows stand in the result of `attention_pool`."""

from torch import Tensor

from condense_core.ops import checks, reference


def num_windows(num_tokens: int, ratio: int) -> int:
    """Windows, and so soft tokens, that `num_tokens` tokens make at `ratio`: ceil(num_tokens / ratio).

    Raises:
        TypeError, ValueError: `num_tokens` is not an int >= 0, or `ratio` not an int >= 1.
    """
    checks.check_int("num_tokens", num_tokens, minimum=0)
    checks.check_int("ratio", ratio, minimum=1)
    return -(-num_tokens // ratio)


def window_offsets(cu_seqlens: Tensor, ratio: int) -> Tensor:
    """Where the rows of each sequence stand in the output of `attention_pool`.

    Args:
        cu_seqlens: `[S+1]` int32 or int64, offsets of the packed sequences in tokens, ascending from 0.
        ratio: tokens per window, >= 1.

    Returns:
        `[S+1]` offsets in rows, of cu_seqlens' dtype and device: the rows of sequence s are
        `out[offsets[s]:offsets[s + 1]]`, none for an empty one, and `offsets[-1]` is K.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    checks.check_int("ratio", ratio, minimum=1)
    num_tokens = checks.check_offsets("cu_seqlens", cu_seqlens)[-1]
    return reference.window_offsets(cu_seqlens, min(ratio, max(num_tokens, 1)))
