"""The CUDA kernels of compact and compact_ in the emulation, against the specification."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import CompactArgs
from condense_core.ops.cuda.compact import compact, compact_

# Without rotation bits are moved. With it the sum of two products is rounded once or twice, then to the dtype.
EXACT = {"rtol": 0.0, "atol": 0.0}
TOLERANCES = {
    torch.float32: {"rtol": 0.0, "atol": 2e-6},
    torch.bfloat16: {"rtol": 0.0, "atol": 2e-2},
    torch.float16: {"rtol": 0.0, "atol": 2e-2},
}
NO_TURN: dict[str, Any] = {"cos": None, "sin": None, "first": None}


def cache(num_tokens: int, head_dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random keys or values `[2, 3, N, D]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, num_tokens, head_dim, generator=generator).to(dtype)


def kept(count: int, num_tokens: int) -> Tensor:
    """[2, 3, count], ascending."""
    noise = torch.rand(2, 3, num_tokens, generator=torch.Generator().manual_seed(num_tokens))
    return noise.topk(count).indices.sort().values


def turn(positions: int, head_dim: int) -> dict[str, Tensor]:
    frequencies = torch.rand(head_dim // 2, generator=torch.Generator().manual_seed(3))
    angles = torch.arange(positions)[:, None] * frequencies
    return {"cos": angles.cos(), "sin": angles.sin()}


def copy_with_gaps(x: Tensor) -> Tensor:
    """A copy with the strides of the original."""
    if not x.numel():
        return x.clone()
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return torch.zeros(length, dtype=x.dtype).as_strided(x.shape, x.stride()).copy_(x)


def check(args: CompactArgs) -> None:
    """compact and, on copies, compact_."""
    tolerances = EXACT if args.cos is None else TOLERANCES[args.k[0].dtype]
    for mine, theirs in zip(compact(args), reference.compact(*args), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerances)
    actual, after = (
        args._replace(k=[copy_with_gaps(x) for x in args.k], v=[copy_with_gaps(x) for x in args.v]) for _ in range(2)
    )
    compact_(actual)
    reference.compact_(*after)
    torch.testing.assert_close([*actual.k, *actual.v], [*after.k, *after.v], **tolerances)


def lists(count: int, num_tokens: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """For two layers: indices [2, 3, count], -1 behind some; as one list, and its offsets."""
    uniform, flat, offsets = [], [], []
    for layer in range(2):
        noise = torch.rand(2, 3, num_tokens, generator=torch.Generator().manual_seed(layer))
        noise[1, 1] = float("-inf")
        noise[0, 2, 4:] = float("-inf")
        uniform.append(reference.select(noise, count)[0])
        indices, counts = reference.select(noise, count, True)
        flat.append(indices.flatten())
        starts = torch.arange(2)[:, None] * indices.shape[1] + counts.cumsum(1) - counts
        offsets.append(torch.cat([starts.flatten(), torch.tensor([indices.numel()])]))
    return uniform, flat, offsets


# dtype, head_dim, and whether rows begin at odd addresses.
ROWS = {
    "units of 16 bytes": (torch.bfloat16, 64, False),
    "odd addresses": (torch.float16, 6, True),
    "units of 16 bytes in fp32": (torch.float32, 8, False),
    "odd head_dim and addresses": (torch.bfloat16, 5, True),
}


@pytest.mark.parametrize("ragged_indices", [False, True], ids=["to padded", "to ragged"])
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize(("dtype", "head_dim", "odd"), ROWS.values(), ids=ROWS)
@pytest.mark.usefixtures("launched")
def test_all_layouts(dtype: torch.dtype, head_dim: int, odd: bool, ragged: bool, ragged_indices: bool) -> None:
    num_tokens = (37, 42)  # of two layers

    def layers(seed: int) -> list[Tensor]:
        whole = [cache(n, head_dim + odd, dtype, seed)[..., odd:] for n in num_tokens]
        return [x.reshape(-1, head_dim) for x in whole] if ragged else whole

    uniform, flat, offsets = lists(10, 37)
    args = CompactArgs(
        k=layers(0),
        v=layers(1),
        cu_seqlens=[torch.arange(7) * n for n in num_tokens] if ragged else [],
        indices=flat if ragged_indices else uniform,
        cu_indices=[x.int() for x in offsets] if ragged_indices else [],
        **NO_TURN,
    )
    check(args)
    if head_dim % 2 == 0:
        check(args._replace(**turn(43, head_dim), first=torch.zeros(6, dtype=torch.int64)))


def test_an_index_out_of_range_makes_zeros_and_reads_nothing(emulation: Any) -> None:
    k, v = cache(37, 64, torch.bfloat16), cache(37, 64, torch.bfloat16, seed=1)
    indices = torch.tensor([0, 37, 10**12, -5, 36, -1]).expand(2, 3, 6).contiguous()
    out = {name: [torch.full((2, 3, 6, 64), 7, dtype=torch.bfloat16)] for name in ("k_out", "v_out")}
    places = {"cu_seqlens": [], "indices": [indices], "cu_indices": []}
    emulation.run("compact", k=[k], v=[v], **places, **NO_TURN, **out)
    for x, written in ((k, out["k_out"][0]), (v, out["v_out"][0])):
        assert torch.equal(written[:, :, [0, 4]], x[:, :, [0, 36]])
        assert not written[:, :, [1, 2, 3, 5]].any()


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(1, torch.float16), (5, torch.float32), (80, torch.bfloat16), (128, torch.bfloat16), (300, torch.float16)],
    ids=["one element", "odd", "a part of a slice", "whole slices", "wider than a block's share"],
)
@pytest.mark.parametrize("counts", [[9, 5, 1], [5, 9, 0], [0, 0, 1]], ids=str)
def test_layers_may_differ_in_every_length(
    head_dim: int, dtype: torch.dtype, counts: list[int], launched: list[str]
) -> None:
    num_tokens = [20, 31, 2]
    k, v = ([cache(n, head_dim, dtype, seed) for n in num_tokens] for seed in (0, 1))
    indices = [kept(count, n) for count, n in zip(counts, num_tokens, strict=True)]
    args = CompactArgs(k=k, v=v, cu_seqlens=[], indices=indices, cu_indices=[], **NO_TURN)
    check(args)
    if head_dim % 2 == 0 and counts[0]:
        check(args._replace(indices=[x.int() for x in indices], **turn(31, head_dim)))
    assert set(launched) == {"compact", "compact_"}


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.usefixtures("launched")
def test_keys_behind_padding_count_positions_from_its_end(index: torch.dtype) -> None:
    first = torch.tensor([0, 0, 0, 4, 4, 4])
    check(
        CompactArgs(
            k=[cache(30, 64, torch.bfloat16)],
            v=[cache(30, 64, torch.bfloat16, seed=1)],
            cu_seqlens=[],
            indices=[(kept(7, 26) + first.view(2, 3, 1)).to(index)],
            cu_indices=[],
            **turn(40, 64),
            first=first.to(index),
        )
    )


def same(x: Tensor) -> Tensor:
    return x


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x - 99], 1)[:, 0]


@pytest.mark.parametrize(
    "forms",
    [(same, same), (strided, strided), (same, Tensor.int), (Tensor.int, strided)],
    ids=["as they are", "strided", "mixed widths", "mixed widths, one strided"],
)
@pytest.mark.usefixtures("launched")
def test_offsets_of_any_width_and_strides(forms: tuple[Callable[[Tensor], Tensor], ...]) -> None:
    def layers(*values: list[int]) -> list[Tensor]:
        return [make(torch.tensor(numbers)) for make, numbers in zip(forms, values, strict=True)]

    k, v = ([cache(20, 8, seed=seed)[0, 0] for seed in seeds] for seeds in ((0, 1), (2, 3)))
    check(
        CompactArgs(
            k=k,
            v=v,
            cu_seqlens=layers([0, 8, 20], [-3, 12, 50]),
            indices=layers([0, 4, 7, 1, 2], [0, 1, 3, 7, 9, 9]),
            cu_indices=layers([0, 3, 5], [0, 1, 4]),  # rows 4 and 5 of the second list belong to no head
            **NO_TURN,
        )
    )


STRIDES = {
    "columns apart": cache(8, 20).transpose(2, 3),
    "every other column": cache(20, 16)[..., ::2],
    "odd addresses": cache(20, 17)[..., 1:],
    "one column": cache(20, 1).mT.mT,
}


@pytest.mark.parametrize("form", STRIDES.values(), ids=STRIDES)
@pytest.mark.usefixtures("launched")
def test_caches_of_any_strides_are_compacted_in_place(form: Tensor) -> None:
    check(CompactArgs(k=[form], v=[form.clone()], cu_seqlens=[], indices=[kept(7, 20)], cu_indices=[], **NO_TURN))


def test_a_cache_of_more_layers_than_a_launch_takes(launched: list[str]) -> None:
    num_tokens = [n % 7 for n in range(67)]
    k, v = ([cache(n, 8, torch.bfloat16, seed) for n in num_tokens] for seed in (0, 1))
    indices = [kept(n // 2, n) for n in num_tokens]
    check(CompactArgs(k=k, v=v, cu_seqlens=[], indices=indices, cu_indices=[], **NO_TURN))
    assert launched == ["compact", "compact_"]


def test_arguments_that_do_not_fit_are_refused(emulation: Any) -> None:
    k, half = torch.zeros(2, 3, 9, 8), torch.zeros(2, 3, 9, 8, dtype=torch.float16)
    indices, rows = torch.zeros(2, 3, 4, dtype=torch.int64), torch.zeros(2, 3, 4, 8)
    valid = {"k": [k, k], "v": [k, k], "cu_seqlens": [], "indices": [indices] * 2, "cu_indices": []} | NO_TURN
    valid |= {"k_out": [rows] * 2, "v_out": [rows] * 2}
    tables = turn(9, 8)
    changes: dict[str, dict[str, Any]] = {
        "v has shape [2, 3, 8, 8], expected [2, 3, 9, 8]": {"v": [k, k[:, :, :8]]},
        "v is float16, expected float32": {"v": [k, half]},
        "k has stride 2 in its last dimension, expected 1": {"k": [k, torch.zeros(2, 3, 9, 16)[..., ::2]]},
        "indices is int32, expected int64": {"indices": [indices, indices.int()]},
        "indices is float32, expected int32 or int64": {"indices": [indices, indices.float()]},
        "indices has 4 heads, expected 6": {"indices": [indices, indices[:, :2].contiguous()]},
        "indices has strides [24, 8, 2] for shape [2, 3, 4], expected contiguous": {
            "indices": [indices, torch.zeros(2, 3, 8, dtype=torch.int64)[..., ::2]]
        },
        "k_out has shape [2, 3, 3, 8], expected [2, 3, 4, 8]": {"k_out": [rows, rows[:, :, :3].contiguous()]},
        "v_out is float16, expected float32": {"v_out": [rows, rows.half()]},
        "expected lists of one length, k has 2 layers, another list 1": {"v": [k]},
        "cos and sin are expected together, or neither": {"cos": tables["cos"]},
        "sin has shape [8, 4], expected [9, 4]": {"cos": tables["cos"], "sin": tables["sin"][:8]},
        "first has shape [5], expected [6]": {"first": torch.zeros(5, dtype=torch.int64)},
    }
    refused = emulation.refusals([("compact", valid | change) for change in ({}, *changes.values())])
    assert refused == {i + 1: f"compact: {text}" for i, text in enumerate(changes)}
    in_place = {name: value for name, value in valid.items() if not name.endswith("_out")}
    refused = emulation.refusals([("compact_", in_place | {"k": [k[:1].expand(2, 3, 9, 8)] * 2})])
    text = "compact_: k has strides [0, 72, 8, 1] for shape [2, 3, 9, 8], expected no stride of 0"
    assert refused[0].startswith(text)
