"""Moving the rows of a cache that are kept next to each other, on the CPU. The kernels are in csrc/cpu/kernels/."""

from torch import Tensor

from condense_core.ops import native


def compact(
    k: list[Tensor],
    v: list[Tensor],
    cu_seqlens: list[Tensor],
    indices: list[Tensor],
    cu_indices: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    first: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The rows at `indices`, in new tensors; see compact.h."""
    cos, sin = _tables(cos, sin)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for layer, index in enumerate(indices):
        source = [native.rows_contiguous(x[layer]) for x in (k, v)]
        out = [x.new_empty(*index.shape, x.shape[-1]) for x in source]
        offsets, starts = _layer(cu_seqlens, layer), _layer(cu_indices, layer)
        native.call("compact", *source, offsets, index, starts, cos, sin, first, *out)
        keys.append(out[0])
        values.append(out[1])
    return keys, values


def compact_(
    k: list[Tensor],
    v: list[Tensor],
    cu_seqlens: list[Tensor],
    indices: list[Tensor],
    cu_indices: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    first: Tensor | None,
) -> None:
    """The rows at `indices` to the front of their heads; see compact.h."""
    cos, sin = _tables(cos, sin)
    # The indices of all layers are checked before a row of the first moves; the kernel checks those of a single one.
    for check_only in (True, False) if len(k) > 1 else (False,):
        for layer, index in enumerate(indices):
            rows = [native.rows_contiguous(x[layer]) for x in (k, v)]
            offsets, starts = _layer(cu_seqlens, layer), _layer(cu_indices, layer)
            native.call("compact_", *rows, offsets, index, starts, cos, sin, first, check_only)
            if not check_only:
                for x, moved in zip((k[layer], v[layer]), rows, strict=True):
                    if moved is not x:
                        x.copy_(moved)


def _tables(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if cos is None or sin is None:
        return None, None
    return native.rows_contiguous(cos), native.rows_contiguous(sin)


def _layer(offsets: list[Tensor], layer: int) -> Tensor | None:
    return offsets[layer] if offsets else None


def ragged_append(k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: Tensor, k_new: Tensor, v_new: Tensor) -> None:
    """New rows behind the valid ones of each head; see ragged_append.h."""
    rows = [native.rows_contiguous(x) for x in (k, v)]
    native.call("ragged_append", *rows, cu_seqlens, lengths, *(native.rows_contiguous(x) for x in (k_new, v_new)))
    for x, written in zip((k, v), rows, strict=True):
        if written is not x:
            x.copy_(written)
