"""Tensors in files: the system's own errors, the umask's permissions."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from condense_core.files import tensors as module
from condense_core.files.tensors import save_tensors


def test_tensors_come_back_with_the_permissions_of_any_other_file(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    old = os.umask(0o027)
    try:
        save_tensors({"a": torch.arange(3)}, path, {"k": "v"})
    finally:
        os.umask(old)
    assert torch.equal(load_file(path)["a"], torch.arange(3))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_folder_that_is_not_there_is_an_oserror_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*/t.safetensors"):
        save_tensors({"a": torch.ones(1)}, tmp_path / "nowhere" / "t.safetensors")


def test_a_full_disk_is_an_oserror_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        # What safetensors 0.8 says; a file system that can be filled needs rights that a test may not have.
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: .*/t.safetensors") as caught:
        save_tensors({"a": torch.ones(1)}, tmp_path / "t.safetensors")
    assert caught.value.errno == errno.ENOSPC


def test_a_fault_that_is_not_the_systems_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: object, **__: object) -> None:
        raise SafetensorError("a header of a kind of its own")

    monkeypatch.setattr(module, "save_file", faulty)
    with pytest.raises(SafetensorError, match="of its own"):
        save_tensors({"a": torch.ones(1)}, tmp_path / "t.safetensors")
