"""Who gets which counters: told by a pretended device, since what it keeps apart are streams."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from condense_core.kernels.counters import _Counters, counters


class Device:
    """The parts of torch.cuda that decide: the current stream, and whether it is being captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing, self.tables = 1, False, 0
        self.rows = _Counters()
        monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=self.stream))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(self.rows, "_zeroed", self.table)
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))

    def table(self, index: int, size: int) -> list[Tensor]:
        self.tables += 1
        return list(torch.zeros(_Counters._ROWS, size, dtype=torch.int32, device="cuda"))

    def take(self, index: int | None = 0, size: int = 8) -> Tensor:
        return self.rows.take(torch.device("cuda", index), size)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def test_a_stream_keeps_its_row_and_shares_it_with_none(device: Device) -> None:
    first = device.take()
    assert device.take() is first
    assert device.take(None) is first
    device.stream = 2
    assert device.take() is not first
    device.stream = 1
    assert device.take() is first
    assert device.take(1) is not first
    assert device.take(size=9).shape == (9,)


def test_every_captured_launch_has_a_row_of_its_own(device: Device) -> None:
    eager = device.take()
    device.capturing = True
    rows = [device.take() for _ in range(2 * _Counters._ROWS)]  # more than are left
    assert device.tables == 1, "no memory outside the graph can be zeroed during a capture"
    assert len({row.data_ptr() for row in [eager, *rows]}) == 1 + len(rows)
    assert all(row.eq(0).all() and row.shape == (8,) for row in rows)
    device.capturing = False
    assert device.take() is eager
    assert device.tables == 2, "the next eager call fills up"


def test_without_a_row_the_graph_zeroes_its_own(device: Device) -> None:
    device.capturing = True
    first, second = device.take(), device.take()
    assert device.tables == 0
    assert first.eq(0).all()
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("name", ["cpu", "meta"])
def test_nothing_of_cuda_is_asked_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", None)
    row = counters(torch.device(name), 5)
    assert (row.shape, row.dtype, row.device.type) == ((5,), torch.int32, name)
