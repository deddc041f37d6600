"""Python calls the kernels by the names of their parameters: those of csrc/cpu/table.h, and of the ops' schemas."""

import re
from pathlib import Path

import pytest
import torch

from condense_core import ops
from condense_core.ops import native

CHECKOUT = Path(__file__).resolve().parents[2]
assert ops.key_norm  # the schemas are registered when the ops are imported


def declared(header: str, pattern: str) -> dict[str, list[str]]:
    """The names of the parameters of every function that `pattern` finds in a header."""
    text = (CHECKOUT / "csrc" / header).read_text()
    functions = re.findall(pattern + r"\(([^()]*)\);", text)
    return {name: [parameter.split()[-1] for parameter in parameters.split(",")] for name, parameters in functions}


KERNELS = declared("cpu/table.h", r"void \(\*(\w+)\)")
CUDA_KERNELS = declared("cuda/cuda.h", r"void (\w+)")


def bound(function: object) -> list[str]:
    """The names that the binding of a function takes, from the signature in its documentation."""
    signature = (function.__doc__ or "").splitlines()[0]
    return re.findall(r"(\w+): ", signature)


@pytest.mark.parametrize("op", KERNELS)
def test_a_cpu_kernel_is_called_by_the_names_of_the_table(op: str) -> None:
    assert bound(getattr(native.extension().cpu, op)) == KERNELS[op]


@pytest.mark.skipif(
    native.missing() is not None or not native.extension().has_cuda, reason="the extension was built without CUDA"
)
@pytest.mark.parametrize("op", CUDA_KERNELS)
def test_a_cuda_kernel_is_called_by_the_names_of_its_header(op: str) -> None:
    assert bound(getattr(native.extension().cuda, op)) == CUDA_KERNELS[op]


# What a backend makes of an argument before the kernel sees it: offsets on the host become tasks or offsets of rows.
REPLACED = {"cross_pool": {"cu_seqlens", "cu_queries"}, "attention_pool_backward": {"out"}}


@pytest.mark.parametrize("op", KERNELS)
def test_arguments_are_named_as_in_the_schema_of_the_op(op: str) -> None:
    schema = getattr(torch.ops.condense_core, op).default._schema
    assert {argument.name for argument in schema.arguments} - REPLACED.get(op, set()) <= set(KERNELS[op])


@pytest.mark.parametrize("op", CUDA_KERNELS)
def test_cuda_kernels_name_their_arguments_as_the_schema_does(op: str) -> None:
    schema = getattr(torch.ops.condense_core, op).default._schema
    assert {argument.name for argument in schema.arguments} <= set(CUDA_KERNELS[op])


def test_a_kernel_runs_with_keywords_in_any_order() -> None:
    k, out = torch.ones(1, 1, 3, 4), torch.full((1, 1, 3), float("nan"))
    native.extension().cpu.key_norm(out=native.view(out), bounds=None, window=1, sink=0, k=native.view(k), threads=1)
    assert out.flatten().tolist() == [-2.0, -2.0, float("inf")]


@pytest.mark.parametrize(
    "arguments", [{"keys": None}, {"k": None}, {"k": "text", "sink": 0}], ids=["unknown", "missing", "wrong kind"]
)
def test_other_arguments_are_an_error_that_shows_the_signature(arguments: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=re.escape("key_norm(): incompatible function arguments")) as error:
        native.extension().cpu.key_norm(**arguments)
    assert "k: View | None, sink: typing.SupportsInt" in str(error.value)
