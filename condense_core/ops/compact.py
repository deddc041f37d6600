"""`compact` and `compact_`: the rows of a cache that are kept move next to each other.

Specification: condense_core/ops/reference/compact.py. Kernels: csrc/cpu/kernels/compact.h, csrc/cuda/compact.cu.

Values of indices and offsets stay on the device: nothing here waits for it. On the CPU, where reading them is free, an
index out of range is an error; on a GPU it reads a row of zeros, never memory outside the cache.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import CompactArgs
from condense_core.ops.library import define

Tensors = TypeVar("Tensors", Tensor, Sequence[Tensor])
"""One tensor, or a sequence with one for each layer."""


def compact(
    k: Tensors,
    v: Tensors,
    indices: Tensors,
    *,
    cu_seqlens: Tensors | None = None,
    cu_indices: Tensors | None = None,
    rotate: tuple[Tensor, Tensor] | None = None,
    first: Tensor | None = None,
) -> tuple[Any, Any]:
    """Copy the rows that are kept next to each other: `out[j] = x[indices[j]]` in every head, for keys and values.

    All arguments may be sequences with a tensor for each layer, which are then compacted together, on a GPU in one
    launch. Not differentiable.

    Args:
        k: keys, `[B, G, N, D]` float32, bfloat16 or float16; or rows `[T, D]` of all heads, head n = b*G + g in
            `cu_seqlens[n]` to `cu_seqlens[n + 1]`. Layers share dtype, device, D and B*G.
        v: values, of k's shape, dtype and device.
        indices: int32 or int64 on k's device: `[B, G, M]`, or `[R]`, head n in `cu_indices[n]` to `cu_indices[n + 1]`,
            as `select` gives them. An index counts from the first row of its head. -1 makes a row of zeros.
        cu_seqlens: `[B*G+1]` int32 or int64 if k is `[T, D]`, else None; clamped to [0, T].
        cu_indices: `[B*G+1]` int32 or int64 if indices is `[R]`, else None; clamped to [0, R]. Rows of the result that
            belong to no head are zeros.
        rotate: None, or cos and sin, `[P, D/2]` float32, row p the rotary embedding of position p (no factor on it).
            The kept keys then move to the positions 0, 1, 2, ... of their head: the key at place j turns back by
            `indices[j] - first - j` positions, which must be below P.
        first: `[B*G]` int32 or int64: the index of the row at position 0 of each head, the number of padding rows on
            its left; None for zeros. Only with rotate.

    Returns:
        Keys and values in the layout of the indices, contiguous: `[B, G, M, D]` or `[R, D]`, or a list of these.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. On the CPU also an index or a move
        out of range.
    """
    arguments = _checked(k, v, indices, cu_seqlens, cu_indices, rotate, first)
    keys, values = _compact(*arguments)
    return (keys[0], values[0]) if isinstance(k, Tensor) else (keys, values)


def compact_(
    k: Tensors,
    v: Tensors,
    indices: Tensors,
    *,
    cu_seqlens: Tensors | None = None,
    cu_indices: Tensors | None = None,
    rotate: tuple[Tensor, Tensor] | None = None,
    first: Tensor | None = None,
) -> None:
    """`compact` in place: in every head row j becomes row `indices[j]`; rows behind the last index stay as they are.

    Needs no second cache: ascending indices never overtake the rows they read. Arguments as in `compact`, but the
    indices of a head must ascend strictly, with -1 only behind them (as `select` gives them), and no two buffers may
    share memory. On a GPU the order is not checked, as that would need a read-back.

    Raises:
        TypeError, ValueError: an argument is not as described, buffers overlap, or, on the CPU, indices do not ascend;
        the message names it. Nothing has been written then.
    """
    _compact_(*_checked(k, v, indices, cu_seqlens, cu_indices, rotate, first))


def _checked(
    k: Tensors,
    v: Tensors,
    indices: Tensors,
    cu_seqlens: Tensors | None,
    cu_indices: Tensors | None,
    rotate: tuple[Tensor, Tensor] | None,
    first: Tensor | None,
) -> tuple[Any, ...]:
    """The arguments of the registered op, once they are as `compact` describes them."""
    layers: dict[str, list[Tensor]] = {name: _layers(name, x) for name, x in (("k", k), ("v", v), ("indices", indices))}
    for name, offsets in (("cu_seqlens", cu_seqlens), ("cu_indices", cu_indices)):
        layers[name] = [] if offsets is None else _layers(name, offsets)
    num_layers = len(layers["k"])
    for name, tensors in layers.items():
        if len(tensors) != num_layers and (tensors or not name.startswith("cu")):
            raise ValueError(f"{name} has {len(tensors)} layers, expected {num_layers}, as k has")
    heads = [_check_layer(layer, layers) for layer in range(num_layers)]
    if len(set(heads)) > 1:
        raise ValueError(f"k has {heads} heads (B*G) in its layers, expected the same in all")
    cos, sin = (None, None) if rotate is None else _check_rotation(rotate, layers["k"][0])
    if first is not None:
        if rotate is None:
            raise ValueError("first is given without rotate, expected None")
        checks.check_integers("first", first, ("k", layers["k"][0]), "[B*G]", length=heads[0])
    return (*(layers[name] for name in ("k", "v", "cu_seqlens", "indices", "cu_indices")), cos, sin, first)


def _layers(name: str, value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, Sequence) or not value:
        raise TypeError(f"{name} is {value!r}, expected a torch.Tensor or a sequence of them, one for each layer")
    return list(value)


def _check_layer(layer: int, layers: dict[str, list[Tensor]]) -> int:
    """One layer's tensors must fit each other and the first layer's; returns its number of heads, B*G."""
    k, v, indices = (layers[name][layer] for name in ("k", "v", "indices"))
    ragged = bool(layers["cu_seqlens"])
    (checks.check_rows if ragged else checks.check_cache)("k", k)
    (checks.check_rows if ragged else checks.check_cache)("v", v, like=("k", k))
    if layer:
        checks.check_alike(f"k[{layer}]", k, ("k[0]", layers["k"][0]))
        if k.shape[-1] != layers["k"][0].shape[-1]:
            raise ValueError(f"k[{layer}] has D = {k.shape[-1]}, expected {layers['k'][0].shape[-1]}, as k[0] has")
    if ragged:
        cu_seqlens = layers["cu_seqlens"][layer]
        checks.check_integers("cu_seqlens", cu_seqlens, ("k", k), "[B*G+1]")
        heads = len(cu_seqlens) - 1
        if heads < 1:
            raise ValueError(f"cu_seqlens has {len(cu_seqlens)} entries, expected B*G + 1 with B*G >= 1")
    else:
        heads = k.shape[0] * k.shape[1]
    if layers["cu_indices"]:
        checks.check_integers("indices", indices, ("k", k), "[R]")
        checks.check_integers("cu_indices", layers["cu_indices"][layer], ("k", k), "[B*G+1]", length=heads + 1)
        return heads
    checks.check_integers("indices", indices, ("k", k), "[B, G, M]", rank=3)
    lead = list(indices.shape[:2])
    if (ragged and lead[0] * lead[1] != heads) or (not ragged and lead != list(k.shape[:2])):
        expected = f"B*G = {heads}" if ragged else f"[B, G] = {list(k.shape[:2])}"
        raise ValueError(f"indices has shape {list(indices.shape)}, expected [B, G, M] with {expected}")
    return heads


def _check_rotation(rotate: tuple[Tensor, Tensor], k: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(rotate, tuple | list) or len(rotate) != 2:
        raise TypeError(f"rotate is {type(rotate).__name__}, expected None or a pair (cos, sin) of tensors [P, D/2]")
    head_dim = k.shape[-1]
    if head_dim % 2:
        raise ValueError(f"rotate is given with D = {head_dim}, expected an even D")
    for name, table in zip(("rotate[0]", "rotate[1]"), rotate, strict=True):
        if not isinstance(table, Tensor) or table.dtype != torch.float32 or table.device != k.device:
            came = f"{table.dtype} on {table.device}" if isinstance(table, Tensor) else type(table).__name__
            raise TypeError(f"{name} is {came}, expected a float32 tensor [P, D/2] on {k.device}, where k is")
        if table.dim() != 2 or table.shape[0] < 1 or table.shape[1] != head_dim // 2:
            raise ValueError(f"{name} has shape {list(table.shape)}, expected [P, D/2] with D = {head_dim}")
    cos, sin = rotate
    if cos.shape != sin.shape:
        raise ValueError(f"rotate[1] has shape {list(sin.shape)}, expected {list(cos.shape)}, as rotate[0] has")
    return cos, sin


def _check_buffers(args: CompactArgs) -> CompactArgs:
    checks.check_apart(
        {f"{name}[{layer}]": x for name, xs in (("k", args.k), ("v", args.v)) for layer, x in enumerate(xs)}
    )
    return args


def _fake(args: CompactArgs) -> tuple[list[Tensor], list[Tensor]]:
    def kept(x: Tensor, index: Tensor) -> Tensor:
        return x.new_empty(*index.shape, x.shape[-1])

    return list(map(kept, args.k, args.indices)), list(map(kept, args.v, args.indices))


def _fake_in_place(args: CompactArgs) -> None:
    pass


_compact = define("compact", CompactArgs, "(Tensor[] k, Tensor[] v)", fake=_fake)
_compact_ = define("compact_", CompactArgs, "()", fake=_fake_in_place, check=_check_buffers, mutates=("k", "v"))
