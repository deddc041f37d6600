"""Every kernel refuses tensors that do not fit each other, outputs included, and says which and what it expected.

The ops check what a user passes; what is tested here keeps a mistake between an op and its kernel from becoming an
access beyond a tensor. From one valid call of each kernel come all calls with one tensor changed.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core.ops import native

B, G, H, N, D = 2, 2, 4, 6, 8  # sequences, KV heads, query heads, tokens, head_dim
T, ROWS = 6, 3  # tokens and rows of a pack, at ratio 2


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


POOLING = {
    "x": zeros(T, H * D),
    "ratio": 2,
    "cu_seqlens": torch.tensor([0, 4, 6]),
    "row_offsets": torch.tensor([0, 2, 3]),
    "halo": 1,
    "scale": 1.0,
    "norm_weight": zeros(H * D),
    "window_bias": zeros(H, 4),
    "eps": 1e-6,
    "lse": zeros(ROWS, H),
}
CACHE = {"k": zeros(B, G, N, D), "bounds": integers(B, 2), "out": zeros(B, G, N)}
# Rows without room for a head's offsets are ragged; cu_indices and indices then hold lists of any length.
RAGGED = {"k": zeros(12, D), "v": zeros(12, D), "cu_seqlens": torch.tensor([0, 3, 6, 9, 12])}
TURN = {"cos": zeros(9, D // 2), "sin": zeros(9, D // 2), "first": integers(B * G)}

VALID: dict[str, dict[str, Any]] = {
    "attention_pool": POOLING | {"q": zeros(ROWS, H, D), "out": zeros(ROWS, H * D)},
    "attention_pool_backward": POOLING
    | {"grad": zeros(ROWS, H * D), "q": zeros(ROWS, H, D), "dx": zeros(T, H * D), "dq": zeros(ROWS, H, D)}
    | {"dw": zeros(H * D), "dbias": zeros(H, 4)},
    "cross_pool": {"x": zeros(T, H * D), "q": zeros(ROWS, H, D), "blocks": torch.tensor([[0, ROWS, 0, T]])}
    | {"scale": 1.0, "norm_weight": zeros(H * D), "eps": 1e-6, "out": zeros(ROWS, H * D), "lse": zeros(ROWS, H)},
    "window_scores": CACHE | {"q_win": zeros(B, H, 3, D), "scale": 1.0, "kernel_size": 5},
    "non_causal_chunks": CACHE | {"q": zeros(B, H, N, D), "chunk_size": 4, "scale": 1.0},
    "query_moments": {"q": zeros(B, H, N, D), "cos": zeros(B, N, D), "sin": zeros(B, N, D), "sink": 1}
    | {"bounds": integers(B, 2), "mu": zeros(B, H, D), "cov": zeros(B, H, D, D)},
    "expected_attention": CACHE
    | {"v": zeros(B, G, N, D), "mu": zeros(B, H, D), "cov": zeros(B, H, D, D), "mean_cos": zeros(D)}
    | {"mean_sin": zeros(D), "scale": 1.0, "epsilon": 0.0, "sink": 1},
    "value_projection_norm": {"v": zeros(B, G, N, D), "w_o": zeros(5, H * D), "bounds": integers(B, 2)}
    | {"out": zeros(B, G, N)},
    "key_norm": CACHE | {"sink": 0, "window": 0},
    "key_similarity": CACHE | {"sink": 0, "window": 0},
    "lag_scores": CACHE | {"v": zeros(B, G, N, D), "lag_size": 2, "sink": 1},
    "select": {"scores": zeros(B, G, N), "budget": 3, "across_heads": False, "protect": integers(B, 3, 2)}
    | {"indices": integers(B, G, 3), "counts": integers(B, G)},
    "compact": {"k": zeros(B, G, N, D), "v": zeros(B, G, N, D), "cu_seqlens": None, "indices": integers(B, G, 3)}
    | {"cu_indices": None, "k_out": zeros(B, G, 3, D), "v_out": zeros(B, G, 3, D)}
    | dict.fromkeys(TURN),
    "compact (ragged)": RAGGED
    | TURN
    | {
        "indices": torch.tensor([0, 1] * 4),
        "cu_indices": torch.tensor([0, 2, 4, 6, 8]),
        "k_out": zeros(8, D),
        "v_out": zeros(8, D),
    },
    "compact_": RAGGED | TURN | {"indices": integers(B, G, 1), "cu_indices": None, "check_only": False},
    "ragged_append": RAGGED | {"lengths": integers(B * G), "k_new": zeros(B, G, 1, D), "v_new": zeros(B, G, 1, D)},
    "ragged_decode_attention": RAGGED
    | {"q": zeros(B, H, D), "lengths": integers(B * G), "scale": 1.0, "out": zeros(B, H, D)},
}
# Sizes that nothing else of the call fixes: (kernel, tensor, dimension).
FREE = {
    ("cross_pool", "x", 0),
    ("key_norm", "k", 3),
    ("key_similarity", "k", 3),
    ("select", "scores", 2),
    ("window_scores", "q_win", 2),
    ("value_projection_norm", "w_o", 0),
    ("cross_pool", "blocks", 0),
    ("select", "protect", 1),
    ("compact_", "indices", 2),
}
# Tensors whose dtype decides that of the others, alone or with one that may differ from it.
LEADING = {("cross_pool", "x"), ("attention_pool", "x"), ("query_moments", "q")} | {
    (op, "k") for op in ("key_norm", "key_similarity", "expected_attention", "window_scores")
}
# Integers that are read or written by one running offset; others may have any strides.
PACKED_INTEGERS = {
    ("select", "indices"),
    ("select", "counts"),
    ("cross_pool", "blocks"),
    ("attention_pool", "row_offsets"),
}


def run(case: str, **changed: Any) -> None:
    op = case.split()[0]
    arguments = VALID[case] | changed
    views = {name: native.view(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    getattr(native.extension().cpu, op)(**views, threads=1)


def tensors() -> Iterator[tuple[str, str, Tensor]]:
    for case, arguments in VALID.items():
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                yield case, name, value


OPTIONAL = {"bounds", "norm_weight", "window_bias", "v", "cov", "protect", "first", "lengths"}
NEEDED = {(op, "v") for op in VALID if op != "expected_attention"} | {("ragged_append", "lengths")}
OPTIONAL_WITH_ANOTHER = {"cos", "sin", "mean_cos", "mean_sin", "cu_seqlens", "row_offsets", "cu_indices", "dw", "dbias"}


def other_sizes() -> Iterator[Any]:
    for case, name, tensor in tensors():
        for dimension in range(tensor.dim()):
            if (case, name, dimension) not in FREE:
                size = list(tensor.shape)
                size[dimension] += 1
                yield pytest.param(case, name, tensor.new_zeros(size), id=f"{case}-{name}-{dimension}")


@pytest.mark.parametrize("case", VALID)
def test_the_calls_that_are_changed_below_are_valid(case: str) -> None:
    run(case)


@pytest.mark.parametrize(("case", "name", "tensor"), list(other_sizes()))
def test_a_size_that_does_not_fit_is_refused(case: str, name: str, tensor: Tensor) -> None:
    with pytest.raises(ValueError, match=f"^{case.split()[0]}: .*(expected|do not)"):
        run(case, **{name: tensor})


def each(change: Callable[[Tensor], Tensor], wanted: Callable[[str, str, Tensor], bool]) -> list[Any]:
    chosen = [one for one in tensors() if wanted(*one)]
    return [pytest.param(case, name, change(tensor), id=f"{case}-{name}") for case, name, tensor in chosen]


@pytest.mark.parametrize(
    ("case", "name", "tensor"),
    each(lambda tensor: tensor.new_zeros(1, *tensor.shape), lambda *_: True),
)
def test_another_number_of_dimensions_is_refused(case: str, name: str, tensor: Tensor) -> None:
    with pytest.raises(ValueError, match=f"^{case.split()[0]}: .*expected"):
        run(case, **{name: tensor})


@pytest.mark.parametrize(
    ("case", "name", "tensor"),
    each(lambda tensor: tensor.float() if not tensor.is_floating_point() else tensor.int(), lambda *_: True),
)
def test_integers_for_floats_and_floats_for_integers_are_refused(case: str, name: str, tensor: Tensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"^{case.split()[0]}: {name} is {dtype}, expected "):
        run(case, **{name: tensor})


@pytest.mark.parametrize(
    ("case", "name", "tensor"),
    each(Tensor.half, lambda case, name, tensor: tensor.is_floating_point() and (case, name) not in LEADING),
)
def test_floats_of_another_dtype_are_refused(case: str, name: str, tensor: Tensor) -> None:
    with pytest.raises(ValueError, match=f"^{case.split()[0]}: \\w+ is float(16|32), expected float(16|32)"):
        run(case, **{name: tensor})


@pytest.mark.parametrize(
    ("case", "name", "tensor"),
    each(
        lambda tensor: torch.cat([tensor, tensor], -1)[..., ::2],
        lambda case, name, tensor: tensor.is_floating_point() or (case, name) in PACKED_INTEGERS,
    ),
)
def test_rows_with_gaps_are_refused(case: str, name: str, tensor: Tensor) -> None:
    with pytest.raises(ValueError, match=f"^{case.split()[0]}: {name} has strides? .*expected"):
        run(case, **{name: tensor})


@pytest.mark.parametrize(
    ("case", "name", "tensor"),
    each(
        lambda tensor: tensor.new_zeros(tensor.shape[0], *(2 * n for n in tensor.shape[1:-1]), tensor.shape[-1])[
            (slice(None), *(slice(None, n) for n in tensor.shape[1:-1]))
        ],
        lambda case, name, tensor: (
            tensor.dim() > 2
            and ((case, name) in PACKED_INTEGERS or name in ("out", "mu", "cov", "k_out", "v_out", "dq"))
        ),
    ),
)
def test_outputs_with_gaps_between_rows_are_refused(case: str, name: str, tensor: Tensor) -> None:
    with pytest.raises(ValueError, match=f"^{case.split()[0]}: {name} has strides .*expected contiguous"):
        run(case, **{name: tensor})


@pytest.mark.parametrize(
    ("case", "name", "tensor"),
    each(lambda tensor: tensor, lambda case, name, _: name not in OPTIONAL or (case, name) in NEEDED),
)
def test_a_tensor_that_is_missing_is_refused(case: str, name: str, tensor: Tensor) -> None:
    expected = "expected" if name in OPTIONAL_WITH_ANOTHER else f"{name} is None, expected a tensor"
    with pytest.raises(ValueError, match=f"^{case.split()[0]}: .*{expected}"):
        run(case, **{name: None})


@pytest.mark.parametrize("case", ["compact_", "ragged_append"])
def test_a_cache_that_is_the_same_memory_twice_is_not_written_to(case: str) -> None:
    with pytest.raises(ValueError, match=r"k has strides \[0, 1\] for shape \[12, 8\], expected no stride of 0"):
        run(case, k=zeros(1, D).expand(12, D))


def test_a_tensor_without_memory_is_refused() -> None:
    k, out = (0, 0, (B, G, N, D), (1, 1, 1, 1)), native.view(zeros(B, G, N))
    with pytest.raises(ValueError, match="key_norm: k has no memory, expected a tensor with data"):
        native.extension().cpu.key_norm(k=k, sink=0, window=0, bounds=None, out=out, threads=1)


def test_no_threads_are_refused() -> None:
    k, out = native.view(zeros(B, G, N, D)), native.view(zeros(B, G, N))
    with pytest.raises(ValueError, match="key_norm: threads is 0, expected 1 or more"):
        native.extension().cpu.key_norm(k=k, sink=0, window=0, bounds=None, out=out, threads=0)


def test_a_code_that_is_no_dtype_is_refused() -> None:
    address, _, shape, strides = native.view(zeros(B, G, N, D)) or ()
    for code in (-1, 5, 99):
        k = (address, code, shape, strides)
        with pytest.raises(TypeError, match="incompatible function arguments"):
            native.extension().cpu.key_norm(k=k, sink=0, window=0, bounds=None, out=None, threads=1)


TEXTS = {
    "shape": ("key_norm", {"out": zeros(2, 3)}, "key_norm: out has shape [2, 3], expected [2, 2, 6]"),
    "rank": ("key_norm", {"k": zeros(2, 3)}, "key_norm: k has shape [2, 3], expected 4 dimensions"),
    "empty": (
        "key_norm",
        {"k": zeros(0, G, N, D)},
        "key_norm: k has shape [0, 2, 6, 8], expected [1 or more, 1 or more, any, 1 or more]",
    ),
    "none": ("lag_scores", {"v": None}, "lag_scores: v is None, expected a tensor"),
    "dtype": ("key_norm", {"k": integers(B, G, N, D)}, "key_norm: k is int64, expected float32, bfloat16 or float16"),
    "same dtype": (
        "lag_scores",
        {"v": zeros(B, G, N, D).bfloat16()},
        "lag_scores: v is bfloat16, expected float32, the dtype of k",
    ),
    "rows": (
        "key_norm",
        {"k": zeros(B, G, N, 2 * D)[..., ::2]},
        "key_norm: k has stride 2 in its last dimension, expected 1",
    ),
    "strides": (
        "key_norm",
        {"out": zeros(B, N, G).transpose(1, 2)},
        "key_norm: out has strides [12, 1, 2] for shape [2, 2, 6], expected contiguous",
    ),
    "heads": (
        "window_scores",
        {"q_win": zeros(B, 3, 3, D)},
        "window_scores: q_win has 3 heads, expected a multiple of the 2 KV heads",
    ),
    "columns": (
        "value_projection_norm",
        {"w_o": zeros(5, 33)},
        "value_projection_norm: w_o has 33 columns, expected a multiple of D, 8",
    ),
    "negative": ("key_norm", {"sink": -1}, "key_norm: sink is -1, expected 0 or more"),
    "zero": ("lag_scores", {"lag_size": 0}, "lag_scores: lag_size is 0, expected 1 or more"),
    "chunk": ("non_causal_chunks", {"chunk_size": 0}, "non_causal_chunks: chunk_size is 0, expected 1 or more"),
    "even": ("window_scores", {"kernel_size": 4}, "window_scores: kernel_size is 4, expected an odd number"),
    "ratio": ("attention_pool", {"ratio": 0}, "attention_pool: ratio is 0, expected 1 or more"),
    "budget": ("select", {"budget": -1}, "select: budget is -1, expected 0 or more"),
    "one of two": ("query_moments", {"sin": None}, "query_moments: cos and sin are expected together, or neither"),
    "offsets": (
        "attention_pool",
        {"cu_seqlens": torch.tensor([0, 2, 6])},
        "attention_pool: cu_seqlens and row_offsets do not cut 6 tokens into windows of 2 and 3 rows",
    ),
    "queries": (
        "cross_pool",
        {"blocks": torch.tensor([[1, 3, 0, 6]])},
        "cross_pool: blocks holds 3 queries from 1 in row 0, expected up to 64 of 3",
    ),
    "tokens": (
        "cross_pool",
        {"blocks": torch.tensor([[0, 3, 4, 7]])},
        "cross_pool: blocks holds the tokens 4 to 7 in row 0, expected an ascending range of 6",
    ),
    "heads of offsets": (
        "ragged_decode_attention",
        {"cu_seqlens": torch.tensor([0, 3, 6, 9])},
        "ragged_decode_attention: cu_seqlens has 4 offsets, expected B*G + 1 with B 2",
    ),
}


@pytest.mark.parametrize(("case", "changed", "text"), TEXTS.values(), ids=TEXTS)
def test_the_text_names_the_op_the_argument_what_came_and_what_was_expected(
    case: str, changed: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        run(case, **changed)


# Values at the end of the integers, where a sum of two would wrap around to a negative offset.
EXTREMES = {
    "key_norm": {"sink": 2**63 - 1, "window": 2**63 - 1},
    "key_similarity": {"sink": 2**63 - 1, "window": 2**63 - 1},
    "lag_scores": {"lag_size": 2**63 - 1, "sink": 2**63 - 1},
    "query_moments": {"sink": 2**63 - 1},
    "expected_attention": {"sink": 2**63 - 1},
    "non_causal_chunks": {"chunk_size": 2**63 - 1},
    "window_scores": {"kernel_size": 2**63 - 1},
}


@pytest.mark.parametrize("op", EXTREMES)
def test_numbers_at_the_end_of_the_integers_neither_wrap_nor_ask_for_memory(op: str) -> None:
    bounds = torch.tensor([[1, N], [2**63 - 1, -(2**63)]])
    run(op, **EXTREMES[op], bounds=bounds)
    if "out" in VALID[op]:
        assert torch.isinf(VALID[op]["out"][0, :, 0]).all()  # padding


@pytest.mark.parametrize("op", ["window_scores", "non_causal_chunks", "expected_attention", "lag_scores", "key_norm"])
def test_a_cache_without_tokens_has_no_scores(op: str) -> None:
    """One of these divided by the number of its blocks, which ended the process."""
    changed = {name: VALID[op][name][:, :, :0] for name in ("k", "v", "q") if name in VALID[op]}
    run(op, **changed, out=zeros(B, G, 0))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_a_check_that_passes_allocates_nothing(tmp_path: Path) -> None:
    checkout, program = Path(__file__).resolve().parents[2], tmp_path / "allocations"
    sources = ["tests/csrc/allocations.cpp", "csrc/condense/tensor.cpp"]
    subprocess.run(["g++", "-std=c++20", "-Icsrc", *sources, "-o", str(program)], cwd=checkout, check=True, timeout=300)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "checks: k has shape [1, 2, 3, 4], expected [1, 2, 3, 5]\n"
