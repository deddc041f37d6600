"""`attention_pool` on a GPU, in CUDA. Triton has a kernel for the same; which is faster, only a GPU can tell."""

import torch
from torch import Tensor

from condense_core.ops import native
from condense_core.ops.arguments import AttentionPoolArgs
from condense_core.ops.cuda import launch
from condense_core.ops.reference import window_offsets


def attention_pool(args: AttentionPoolArgs) -> tuple[Tensor, Tensor]:
    """Rows `[K, d]` and log-sum-exp `[K, H]`; the kernel is csrc/cuda/attention_pool.cu."""
    x, q = args.x, args.q
    rows, seqlen, (cu_seqlens, row_offsets) = _packing(x, args.cu_seqlens, args.ratio)
    out, lse = x.new_empty(rows, x.shape[1]), x.new_empty(rows, q.shape[-2], dtype=torch.float32)
    launch(
        "attention_pool",
        x.device,
        x=x,
        q=native.contiguous_floats(q),
        ratio=args.ratio,
        seqlen=seqlen,
        cu_seqlens=cu_seqlens,
        row_offsets=row_offsets,
        halo=args.halo,
        scale=args.scale,
        norm_weight=native.contiguous_floats(args.norm_weight),
        window_bias=native.contiguous_floats(args.window_bias),
        eps=args.eps,
        out=out,
        lse=lse,
    )
    return out, lse


def unsupported(args: AttentionPoolArgs) -> str | None:
    """Why the kernel cannot take a call, or None."""
    x, q = args.x, args.q
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"x is {x.dtype}, the CUDA kernel takes bfloat16 and float16"
    lanes, rest = divmod(q.shape[-1], 8)
    if rest or lanes & (lanes - 1) or not 1 <= lanes <= 32:
        return f"heads have {q.shape[-1]} columns, the CUDA kernel takes 8, 16, 32, 64, 128 and 256"
    if x.shape[1] > 8192 or x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        return f"rows are {x.shape[1]} wide, {x.stride(0)} apart: the CUDA kernel takes aligned ones of up to 8,192"
    return None


def _packing(x: Tensor, cu_seqlens: Tensor | None, ratio: int) -> tuple[int, int, tuple[Tensor | None, Tensor | None]]:
    """The number of rows; the length of all sequences; or, if they differ, their offsets in tokens and in rows.

    Offsets are on x's device.
    """
    if cu_seqlens is None:
        return -(-len(x) // ratio), len(x), (None, None)
    row_offsets, lengths = window_offsets(cu_seqlens, ratio), cu_seqlens.diff()
    rows = int(row_offsets[-1])
    if len(lengths) and bool((lengths == lengths[0]).all()):
        return rows, int(lengths[0]), (None, None)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "cu_seqlens differ between sequences while a CUDA graph is captured, expected sequences of one length: "
            "other offsets are copied to the device in every call"
        )
    both = torch.stack([cu_seqlens, row_offsets]).to(x.device)
    return rows, 0, (both[0], both[1])
