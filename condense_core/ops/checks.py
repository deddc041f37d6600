"""Argument checks of the public ops: every error names the argument, what came and what was expected."""

import math
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What hidden states, queries and norm weights may be made of."""

_DTYPE_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)


def check_hidden_states(x: Tensor) -> None:
    """x must be a float tensor `[T, d]` with d >= 1; T may be 0."""
    check_float_tensor("x", x)
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"x has shape {list(x.shape)}, expected [T, d] with d >= 1")


def check_queries(q: Tensor, x: Tensor, heads: int | None, *, ranks: tuple[int, ...]) -> None:
    """q must be `[heads, d/heads]` (rank 2) or `[K, heads, d/heads]` (rank 3), on x's device, with `heads`.

    Args:
        q: the queries.
        x: the hidden states that they pool.
        heads: the number of heads that q must have, or None.
        ranks: which of the two ranks the op takes.
    """
    shapes = " or ".join({2: "[heads, d/heads]", 3: "[K, heads, d/heads]"}[rank] for rank in ranks)
    check_float_tensor("q", q)
    _check_same_device("q", q, x)
    if q.dim() not in ranks:
        raise ValueError(f"q has shape {list(q.shape)}, expected {shapes}")
    d = x.shape[1]
    if heads is not None:
        check_int("heads", heads, minimum=1)
        if q.shape[-2] != heads:
            raise ValueError(f"q has shape {list(q.shape)} but heads is {heads}, expected {shapes}")
    num_heads, head_dim = q.shape[-2:]
    if num_heads < 1 or d % num_heads:
        raise ValueError(f"q has {num_heads} heads (shape {list(q.shape)}), expected a divisor of d = {d}")
    if num_heads * head_dim != d:
        raise ValueError(
            f"q has shape {list(q.shape)}, expected {shapes} with d/heads = {d // num_heads} "
            f"(d = {d}, heads = {num_heads})"
        )


def check_num_queries(q: Tensor, expected: int, what: str) -> None:
    """Per-row queries `[K, heads, d/heads]` must number `expected`, which counts `what`."""
    if q.shape[0] != expected:
        raise ValueError(f"q has {q.shape[0]} rows (shape {list(q.shape)}), expected {expected}: {what}")


def check_offsets(name: str, offsets: Tensor, end: int | None = None) -> list[int]:
    """Offsets `[S+1]` of S packed sequences must be integers ascending from 0 (to `end`); returns them as a list.

    Reads the values on the host, so a tensor on a device waits for that device.
    """
    check_offset_tensor(name, offsets)
    values: list[int] = offsets.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} starts at {values[0]}, expected 0")
    for s, (start, stop) in enumerate(pairwise(values)):
        if stop < start:
            raise ValueError(f"{name} falls from {start} to {stop} at sequence {s}, expected it ascending")
    if end is not None and values[-1] != end:
        raise ValueError(f"{name} ends at {values[-1]}, expected {end}, the number of rows it divides")
    return values


def offsets_on_host(name: str, offsets: Tensor | None, end: int) -> Tensor | None:
    """Offsets as the backends of the poolings take them: int64 on the CPU, their values checked to reach `end`."""
    return None if offsets is None else torch.tensor(check_offsets(name, offsets, end))


def check_offset_tensor(name: str, offsets: Tensor) -> None:
    """Offsets must be an int32 or int64 tensor `[S+1]`; their values are not read."""
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{name} is a {type(offsets).__name__}, expected an integer tensor [S+1] or None")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {offsets.dtype}, expected torch.int32 or torch.int64")
    if offsets.dim() != 1 or len(offsets) < 1:
        raise ValueError(f"{name} has shape {list(offsets.shape)}, expected [S+1]")


def check_norm_weight(norm_weight: Tensor | None, x: Tensor) -> None:
    """norm_weight must be None or a float tensor `[d]` on x's device."""
    if norm_weight is None:
        return
    check_float_tensor("norm_weight", norm_weight)
    _check_same_device("norm_weight", norm_weight, x)
    if norm_weight.shape != x.shape[1:]:
        raise ValueError(f"norm_weight has shape {list(norm_weight.shape)}, expected [{x.shape[1]}]")


def check_window_bias(window_bias: Tensor | None, x: Tensor, heads: int, width: int) -> None:
    """window_bias must be None or a float tensor `[heads, width]` on x's device, width = ratio + 2*halo."""
    if window_bias is None:
        return
    check_float_tensor("window_bias", window_bias)
    _check_same_device("window_bias", window_bias, x)
    if window_bias.shape != (heads, width):
        raise ValueError(
            f"window_bias has shape {list(window_bias.shape)}, expected [heads, ratio + 2*halo] = [{heads}, {width}]"
        )


def check_cache(name: str, tensor: Tensor, like: tuple[str, Tensor] | None = None) -> None:
    """A float tensor `[B, G, N, D]`, keys or values of a layer; N may be 0.

    Args:
        name: of the tensor, for the message.
        tensor: what is checked.
        like: name and tensor whose shape, dtype and device it must have.
    """
    check_float_tensor(name, tensor)
    if tensor.dim() != 4 or min(tensor.shape[0], tensor.shape[1], tensor.shape[3]) < 1:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [B, G, N, D] with B, G and D >= 1")
    if like is not None:
        check_alike(name, tensor, like)
        if tensor.shape != like[1].shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(like[1].shape)}, as {like[0]} has")


def check_cache_queries(name: str, q: Tensor, k: Tensor) -> None:
    """q must be a float tensor `[B, H, w, D]` on k's device and of its dtype, H a multiple of k's G heads, w >= 1."""
    check_float_tensor(name, q)
    _check_same_device(name, q, k, "k")
    if q.dtype != k.dtype:
        raise TypeError(f"{name} has dtype {q.dtype}, expected {k.dtype}, as k has")
    batch, kv_heads, _, head_dim = k.shape
    if q.dim() != 4 or q.shape[0] != batch or q.shape[3] != head_dim or q.shape[2] < 1:
        raise ValueError(
            f"{name} has shape {list(q.shape)}, expected [B, H, w, D] with B = {batch}, D = {head_dim}, w >= 1"
        )
    if q.shape[1] < 1 or q.shape[1] % kv_heads:
        raise ValueError(
            f"{name} has {q.shape[1]} heads (shape {list(q.shape)}), expected a multiple of k's {kv_heads}"
        )


def check_bounds(bounds: Tensor | None, k: Tensor) -> None:
    """bounds must be None or integers `[B, 2]` on k's device. Their values are clamped to [0, N], not read here."""
    if bounds is None:
        return
    if not isinstance(bounds, Tensor):
        raise TypeError(f"bounds is a {type(bounds).__name__}, expected an integer tensor [B, 2] or None")
    if bounds.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"bounds has dtype {bounds.dtype}, expected torch.int32 or torch.int64")
    _check_same_device("bounds", bounds, k, "k")
    if bounds.shape != (k.shape[0], 2):
        raise ValueError(f"bounds has shape {list(bounds.shape)}, expected [B, 2] = [{k.shape[0]}, 2]")


def check_rows(name: str, tensor: Tensor, like: tuple[str, Tensor] | None = None) -> None:
    """A float tensor `[T, D]`, the rows of all heads of a ragged cache; T may be 0.

    Args:
        name: of the tensor, for the message.
        tensor: what is checked.
        like: name and tensor whose shape, dtype and device it must have.
    """
    check_float_tensor(name, tensor)
    if tensor.dim() != 2 or tensor.shape[1] < 1:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [T, D] with D >= 1")
    if like is not None:
        check_alike(name, tensor, like)
        if tensor.shape != like[1].shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(like[1].shape)}, as {like[0]} has")


def check_alike(name: str, tensor: Tensor, like: tuple[str, Tensor]) -> None:
    """tensor must be on the device of another one and of its dtype."""
    other_name, other = like
    _check_same_device(name, tensor, other, other_name)
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {other.dtype}, as {other_name} has")


def check_integers(
    name: str, values: Tensor, like: tuple[str, Tensor], shape: str, *, rank: int = 1, length: int | None = None
) -> None:
    """values must be an int32 or int64 tensor on the device of another one. What it holds is not read.

    Args:
        name: of values, for the message.
        values: what is checked.
        like: name and tensor of that device.
        shape: what is expected, for the message.
        rank: number of dimensions.
        length: of the first dimension, or None for any.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} is a {type(values).__name__}, expected an integer tensor {shape}")
    if values.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {values.dtype}, expected torch.int32 or torch.int64")
    _check_same_device(name, values, like[1], like[0])
    if values.dim() != rank or (length is not None and len(values) != length):
        expected = shape if length is None else f"{shape} = [{length}]"
        raise ValueError(f"{name} has shape {list(values.shape)}, expected {expected}")


def check_scale(scale: float | None) -> None:
    """scale must be None or a finite number; the softmax turns anything else into NaN."""
    if scale is not None and not math.isfinite(_real("scale", scale)):
        raise ValueError(f"scale is {scale}, expected a finite number")


def check_eps(eps: float) -> None:
    """eps must be positive and finite: at 0 a row of zeros would have no norm."""
    if not 0 < _real("eps", eps) < math.inf:
        raise ValueError(f"eps is {eps}, expected a positive finite number")


def check_keys(k: Tensor, sink: int, window: int, bounds: Tensor | None) -> None:
    """The arguments of a score of keys that forces the first `sink` and the last `window` tokens."""
    check_cache("k", k)
    check_int("sink", sink, minimum=0)
    check_int("window", window, minimum=0)
    check_bounds(bounds, k)


def check_floats(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], like: tuple[str, Tensor]) -> None:
    """A tensor must have one of `dtypes` and be on the device of another one, given with its name."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected one of {expected}")
    other_name, other = like
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {other.device}, where {other_name} is")


def check_shape(name: str, tensor: Tensor, symbols: str, shape: tuple[int, ...]) -> None:
    """A tensor must have a shape, which the message gives in symbols too."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {symbols} = {list(shape)}")


def check_rotation(cos_name: str, cos: Tensor | None, sin_name: str, sin: Tensor | None, head_dim: int) -> None:
    """Both or neither; and a rotation pairs the halves, so D must have two."""
    if (cos is None) != (sin is None):
        missing, given = (cos_name, sin_name) if cos is None else (sin_name, cos_name)
        raise ValueError(f"{missing} is None, expected a tensor, as {given} is given")
    if cos is not None and head_dim % 2:
        raise ValueError(f"{cos_name} is given with D = {head_dim}, expected an even D")


def check_apart(written: dict[str, Tensor], read: dict[str, Tensor] | None = None) -> None:
    """Buffers that an op writes may share memory with nothing: no other one, none that it reads, not with themselves.

    Args:
        written: by name; a stride of 0 makes elements share memory.
        read: by name.
    """
    for name, x in written.items():
        if x.numel() and any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
            raise ValueError(f"{name} has strides {list(x.stride())}, expected a tensor whose elements are its own")
    spans = sorted((*_span(x), name) for name, x in written.items() if x.numel())
    overlaps = [(name, other) for (_, end, name), (start, _, other) in pairwise(spans) if start < end]
    for name, x in (read or {}).items():
        first, last = _span(x)
        overlaps += [(name, other) for start, end, other in spans if x.numel() and first < end and start < last]
    for name, other in overlaps[:1]:
        raise ValueError(f"{name} and {other} overlap in memory, expected buffers apart from each other")


def _span(x: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the one behind its last."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + reach * x.element_size()


def check_int(name: str, value: int, *, minimum: int) -> None:
    """value must be an int of at least `minimum`; a bool is not taken for an int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}), expected an int >= {minimum}")
    if value < minimum:
        raise ValueError(f"{name} is {value}, expected an int >= {minimum}")


def _real(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}), expected a number")
    return float(value)


def check_float_tensor(name: str, tensor: Tensor) -> None:
    """tensor must be dense, of one of `DTYPES`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected one of {_DTYPE_NAMES}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}, expected a dense (torch.strided) tensor")


def _check_same_device(name: str, tensor: Tensor, other: Tensor, other_name: str = "x") -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {other.device}, where {other_name} is")
