"""Resumable state: what is written comes back bit for bit, and a write cut off in the middle loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from condense_core.training import checkpoint
from condense_core.training.checkpoint import load_state, read_meta, save_state


def parts(seed: int) -> tuple[dict[str, nn.Module], torch.optim.AdamW]:
    """Two modules, one of them a name's prefix of the other, and an optimizer over both in two groups."""
    torch.manual_seed(seed)
    modules = {"lm": nn.Linear(5, 3), "lm-head": nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))}
    groups = [{"params": list(module.parameters())} for module in modules.values()]
    return modules, torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)


def step(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, number: int, *, head: bool = True) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
    out = modules["lm"](x)
    loss = (modules["lm-head"](out) if head else out).square().sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def states(modules: dict[str, nn.Module]) -> list[torch.Tensor]:
    return [t.clone() for module in modules.values() for t in module.state_dict().values()]


@pytest.mark.parametrize("head", [True, False], ids=["all parameters", "some never had a gradient"])
def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, head: bool) -> None:
    modules, optimizer = parts(0)
    for number in range(3):
        step(modules, optimizer, number, head=head)
    save_state(tmp_path / "run", modules, optimizer, {"step": 3, "note": "é"})
    saved = states(modules)
    for number in range(3, 6):
        step(modules, optimizer, number)

    again, restored = parts(1)
    assert load_state(tmp_path / "run", again, restored) == {"step": 3, "note": "é"}
    assert all(torch.equal(a, b) for a, b in zip(states(again), saved, strict=True))
    for number in range(3, 6):
        step(again, restored, number)
    assert all(torch.equal(a, b) for a, b in zip(states(again), states(modules), strict=True))


def test_weights_without_the_optimizer(tmp_path: Path) -> None:
    modules, optimizer = parts(0)
    step(modules, optimizer, 0)
    save_state(tmp_path, modules, optimizer, {"step": 1})
    other, _ = parts(1)
    load_state(tmp_path, {"lm": other["lm"]}, None)
    assert torch.equal(other["lm"].weight, modules["lm"].weight)
    assert not torch.equal(other["lm-head"][0].weight, modules["lm-head"][0].weight)


def test_nothing_to_resume(tmp_path: Path) -> None:
    modules, optimizer = parts(0)
    assert load_state(tmp_path, modules, optimizer) is None
    assert load_state(tmp_path / "nowhere", modules, optimizer) is None


def test_a_write_cut_off_keeps_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules, optimizer = parts(0)
    save_state(tmp_path, modules, optimizer, {"step": 1})

    def cut_off(_: object, path: Path, *__: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_tensors", cut_off)
    with pytest.raises(OSError, match="no space left"):
        save_state(tmp_path, modules, optimizer, {"step": 2})
    assert load_state(tmp_path, modules, optimizer) == {"step": 1}


def test_a_state_of_another_architecture(tmp_path: Path) -> None:
    modules, optimizer = parts(0)
    save_state(tmp_path, modules, optimizer, {"step": 1})
    with pytest.raises(ValueError, match=r"does not fit 'lm' .*size mismatch") as caught:
        load_state(tmp_path, {"lm": nn.Linear(5, 4)}, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", b"half"], ids=["empty", "text", "cut off"])
def test_a_file_that_is_no_state(tmp_path: Path, content: bytes) -> None:
    if content == b"half":
        save_state(tmp_path, *parts(0), {"step": 1})
        content = (tmp_path / "state.safetensors").read_bytes()[:200]
    (tmp_path / "state.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"state.safetensors: no training state") as caught:
        read_meta(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["a weight", "a moment"])
def test_tensors_that_are_not_finite_are_never_written(tmp_path: Path, bad: float, where: str) -> None:
    modules, optimizer = parts(0)
    step(modules, optimizer, 0)
    save_state(tmp_path, modules, optimizer, {"step": 1})
    before = (tmp_path / "state.safetensors").read_bytes()
    weight = modules["lm"].weight
    with torch.no_grad():
        (weight if where == "a weight" else optimizer.state[weight]["exp_avg"])[0, 0] = bad
    with pytest.raises(ValueError, match=r"lm/weight|optimizer/0/exp_avg is not finite"):
        save_state(tmp_path, modules, optimizer, {"step": 2})
    assert (tmp_path / "state.safetensors").read_bytes() == before
