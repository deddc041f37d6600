"""The table of backends: preference, fallback with one line, the override, and kernels that join later."""

import logging
from typing import Any

import pytest
import torch

from condense_core import ops
from condense_core.ops import library, registry
from condense_core.ops.arguments import AttentionPoolArgs
from condense_core.ops.backends import REGISTRY
from condense_core.ops.registry import BACKENDS, Backend, Registry

LOGGER = "condense_core.ops.registry"


@pytest.fixture(autouse=True)
def no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONDENSE_BACKEND", raising=False)


def answering(name: str) -> Any:
    return lambda arguments: name


def make(*backends: Backend) -> Registry:
    return Registry([*backends, Backend("op", "reference", answering("reference"))])


def only_even(x: int) -> str | None:
    return None if x % 2 == 0 else "x is odd"


def test_the_most_preferred_able_backend_runs() -> None:
    table = make(
        Backend("op", "cpu", answering("cpu")),
        Backend("op", "triton", answering("triton"), supports=only_even),
        Backend("op", "cuda", answering("cuda"), available=lambda: "no CUDA device"),
    )
    assert table.call("op", 2) == "triton"
    assert table.call("op", 3) == "cpu"


def test_reference_answers_when_nothing_else_can(caplog: pytest.LogCaptureFixture) -> None:
    table = make(Backend("op", "triton", answering("triton"), supports=only_even))
    with caplog.at_level(logging.INFO, LOGGER):
        assert [table.call("op", x) for x in (1, 3, 5, 2)] == ["reference"] * 3 + ["triton"]
    assert [record.getMessage() for record in caplog.records] == ["op: backend triton is not used: x is odd"]
    assert caplog.records[0].levelno == logging.INFO


def test_each_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    table = make(Backend("op", "cpu", answering("cpu"), supports=lambda x: f"x is {x}"))
    with caplog.at_level(logging.INFO, LOGGER):
        for x in (1, 2, 1, 2):
            table.call("op", x)
    assert len(caplog.records) == 2


def test_the_override_chooses_a_less_preferred_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    table = make(Backend("op", "cpu", answering("cpu")), Backend("op", "triton", answering("triton")))
    for name in ("cpu", "triton", "reference"):
        monkeypatch.setenv("CONDENSE_BACKEND", name)
        assert table.call("op", 1) == name


@pytest.mark.parametrize("name", ["cuda", "triton"])  # one that is missing, one that is registered but unfit
def test_an_override_that_cannot_run_falls_back_to_reference_with_one_warning(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table = make(
        Backend("op", "cpu", answering("cpu")),
        Backend("op", "triton", answering("triton"), available=lambda: "triton is not installed"),
    )
    monkeypatch.setenv("CONDENSE_BACKEND", name)
    with caplog.at_level(logging.INFO, LOGGER):
        assert [table.call("op", 1) for _ in range(3)] == ["reference"] * 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"backend {name} is not used" in record.getMessage()


def test_an_unknown_override_is_an_error_that_lists_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDENSE_BACKEND", "cudnn")
    with pytest.raises(ValueError, match=r"CONDENSE_BACKEND='cudnn'.*cuda, triton, cpu, reference"):
        ops.attention_pool(torch.ones(4, 4), torch.ones(1, 4), ratio=2)


def test_an_empty_override_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDENSE_BACKEND", "")
    assert registry.requested_backend() is None


def test_the_table_lists_every_op_and_backend_with_the_reason() -> None:
    rows = REGISTRY.table()
    assert [(row.op, row.backend) for row in rows] == [(op, name) for op in REGISTRY.ops for name in BACKENDS]
    assert {"attention_pool", "cross_pool"} <= set(REGISTRY.ops)
    for row in rows:
        assert row.available == (row.why_not is None)
        assert row.available or row.why_not
    assert all(row.available for row in rows if row.backend == "reference")


def test_a_missing_backend_says_so() -> None:
    row = make().table()[0]
    assert (row.backend, row.available) == ("cuda", False)
    assert row.why_not == "this version has no cuda implementation of op"


def test_a_kernel_joins_without_a_change_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[AttentionPoolArgs] = []

    def kernel(arguments: AttentionPoolArgs) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(arguments)
        return torch.full((2, 4), 7.0), torch.zeros(2, 2)

    table = Registry(
        [
            Backend("attention_pool", "reference", answering("reference")),
            Backend("attention_pool", "cpu", kernel),
        ]
    )
    monkeypatch.setattr(library, "REGISTRY", table)
    out = ops.attention_pool(torch.ones(4, 4), torch.ones(2, 2), ratio=2, cu_seqlens=torch.tensor([0, 4]).int())
    assert (out == 7).all()
    (arguments,) = seen
    assert (arguments.ratio, arguments.halo, arguments.scale) == (2, 0, 2**-0.5)
    assert arguments.cu_seqlens is not None
    assert arguments.cu_seqlens.dtype == torch.int64


def test_triton_takes_no_cpu_tensor_unless_the_interpreter_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x, q = torch.ones(4, 4), torch.ones(2, 2)
    arguments = AttentionPoolArgs(
        x, q, ratio=2, cu_seqlens=None, halo=0, scale=1.0, norm_weight=None, window_bias=None, eps=1e-6
    )
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert REGISTRY.resolve("attention_pool", arguments).name != "triton"


@pytest.mark.parametrize(
    ("backends", "message"),
    [
        ([Backend("op", "cpu", answering("cpu"))], "no reference"),
        ([Backend("op", "reference", answering("a"))] * 2, "registered twice"),
        ([Backend("op", "rocm", answering("a"))], "'rocm' is not one of"),
    ],
)
def test_a_malformed_table_is_refused(backends: list[Backend], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Registry(backends)


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown op 'attention_pol'"):
        REGISTRY.resolve("attention_pol", ())
