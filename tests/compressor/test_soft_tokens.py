"""`SoftTokens`: its fields, exact round trips, and files that cannot be written or read."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save

from condense_core import SoftTokens
from condense_core.compressor import soft_tokens as module
from condense_core.compressor.config import num_kept
from condense_core.compressor.soft_tokens import SoftTokensError
from condense_core.files.atomic import write_atomically

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> SoftTokens:
    embeds = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    fields = {
        "embeds": embeds,
        "num_context_tokens": 19,
        "ratio": 4,
        "model_id": "maker/model é",
        "model_revision": "main",
        "method": "select",
        "context_sha256": hashlib.sha256(b"context").hexdigest(),
    }
    return SoftTokens(**(fields | changes))


# Round trips


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_round_trip_bit_for_bit(dtype: torch.dtype) -> None:
    soft = make(dtype)
    tiny = torch.finfo(dtype).smallest_normal / 4  # a subnormal
    soft.embeds[0, :4] = torch.tensor([-0.0, tiny, torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    data = soft.to_bytes()
    back = SoftTokens.from_bytes(data)
    assert back.embeds.dtype == dtype
    assert torch.equal(back.embeds.view(torch.uint8), soft.embeds.view(torch.uint8))
    for name in ("num_context_tokens", "ratio", "model_id", "model_revision", "method", "context_sha256"):
        assert getattr(back, name) == getattr(soft, name)
    assert back.to_bytes() == data


def test_the_result_shares_no_memory_with_the_input() -> None:
    data = bytearray(make().to_bytes())
    back = SoftTokens.from_bytes(memoryview(data))
    before = back.embeds.clone()
    data[-80:] = bytes(80)
    assert torch.equal(back.embeds, before)
    back.embeds.zero_()  # writable, as any tensor


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_format_is_plain_safetensors(dtype: torch.dtype) -> None:
    soft = make(dtype)
    data = soft.to_bytes()
    assert torch.equal(safetensors_load(data)["embeds"], soft.embeds)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"]["format"] == "condense-soft-tokens"
    # And a file that the library itself wrote, in its own order of keys, reads back.
    again = SoftTokens.from_bytes(safetensors_save({"embeds": soft.embeds}, header["__metadata__"]))
    assert torch.equal(again.embeds, soft.embeds)


@settings(max_examples=40, deadline=None)
@given(
    num_context_tokens=st.integers(1, 60),
    ratio=st.one_of(st.integers(1, 9), st.just(2**28), st.floats(1, 9).filter(lambda r: not r.is_integer())),
    width=st.integers(1, 7),
    dtype=st.sampled_from(DTYPES),
    name=st.text(min_size=1, max_size=20).filter(str.isprintable),
)
def test_any_valid_soft_tokens_round_trip(
    num_context_tokens: int, ratio: float, width: int, dtype: torch.dtype, name: str
) -> None:
    embeds = torch.randn(num_kept(num_context_tokens, ratio), width).to(dtype)
    soft = SoftTokens(embeds, num_context_tokens, ratio, name, method=name)
    back = SoftTokens.from_bytes(soft.to_bytes())
    assert torch.equal(back.embeds, embeds)
    assert (back.num_context_tokens, back.ratio, back.model_id) == (num_context_tokens, ratio, name)


@pytest.mark.parametrize("text", ["", "kept ... and kept", "Zoë 他 🙂\n\0", "x" * 100_000])
def test_a_kept_text_round_trips(text: str) -> None:
    soft = make(text=text)
    data = soft.to_bytes()
    back = SoftTokens.from_bytes(data)
    assert back.text == text
    assert torch.equal(back.embeds, soft.embeds)
    assert back.to_bytes() == data
    tensors = safetensors_load(data)  # and is a tensor of bytes to everybody else
    assert bytes(tensors["text"].tolist()).decode() == text if text else set(tensors) == {"embeds"}


def test_what_is_no_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SoftTokensError, match="text is a bytes, expected a str"):
        make(text=b"kept")
    with pytest.raises(SoftTokensError, match="text is not valid Unicode"):
        make(text="a\ud800")
    monkeypatch.setattr(module, "MAX_TEXT_BYTES", 5)
    make(text="12345")
    with pytest.raises(SoftTokensError, match="text has 6 bytes, expected at most 5"):
        make(text="1234é")


def test_strided_and_trained_embeddings_are_written_as_their_values() -> None:
    embeds = torch.randn(8, 5).t().requires_grad_()
    back = SoftTokens.from_bytes(make(embeds=embeds).to_bytes())
    assert torch.equal(back.embeds, embeds)
    assert not back.embeds.requires_grad


# The container


def test_properties() -> None:
    soft = make()
    assert (soft.num_soft_tokens, len(soft), soft.d_model, soft.nbytes) == (5, 5, 8, 80)
    assert "19 tokens -> 5 x 8 bfloat16" in repr(soft)
    assert "\n" not in repr(soft)
    with pytest.raises(AttributeError):
        soft.ratio = 8  # type: ignore[misc]


def test_to() -> None:
    soft = make(torch.float32)
    half = soft.to(dtype=torch.float16)
    assert half.embeds.dtype == torch.float16
    assert half.model_id == soft.model_id
    assert soft.embeds.dtype == torch.float32
    assert soft.to("cpu") is soft
    assert soft.to("meta").embeds.device.type == "meta"
    with pytest.raises(SoftTokensError, match=r"dtype torch\.int32"):
        soft.to(dtype=torch.int32)


def test_check_model() -> None:
    soft = make()
    soft.check_model("maker/model é", 8)
    with pytest.raises(SoftTokensError, match=r"made by 'maker/model é', expected one of 'other'"):
        soft.check_model("other", 8)
    with pytest.raises(SoftTokensError, match=r"8 wide, expected 16"):
        soft.check_model("maker/model é", 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeds": [[1.0]]}, "embeds is a list"),
        ({"embeds": torch.ones(5, 8).to_sparse()}, "embeds is a torch.sparse_coo tensor"),
        ({"embeds": torch.ones(5, 8).double()}, "dtype torch.float64"),
        ({"embeds": torch.ones(40)}, "shape [40]"),
        ({"embeds": torch.ones(1, 5, 8)}, "shape [1, 5, 8]"),
        ({"embeds": torch.ones(5, 0)}, "shape [5, 0]"),
        ({"embeds": torch.ones(4, 8)}, "4 soft tokens, expected 5"),
        ({"embeds": torch.ones(0, 8), "num_context_tokens": 0}, "num_context_tokens is 0"),
        ({"num_context_tokens": 19.0}, "num_context_tokens is 19.0"),
        ({"num_context_tokens": 2**40}, "num_context_tokens is 1099511627776"),
        ({"ratio": 0}, "ratio is 0"),
        ({"ratio": True}, "ratio is True"),
        ({"ratio": 5}, "5 soft tokens, expected 4"),
        ({"model_id": ""}, "model_id is ''"),
        ({"model_id": None}, "model_id is None"),
        ({"model_id": "a\nb"}, "model_id is 'a\\nb'"),
        ({"model_id": "a" * 513}, "model_id is 'aaa"),
        ({"model_revision": "\ud800"}, "model_revision is"),
        ({"method": ""}, "method is ''"),
        ({"context_sha256": "abc"}, "context_sha256 is 'abc'"),
        ({"context_sha256": "A" * 64}, "context_sha256 is 'AAA"),
    ],
)
def test_bad_fields_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SoftTokensError) as caught:
        make(**changes)
    assert message in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_never_written(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    soft = make(dtype)
    soft.embeds[3, 2] = value
    with pytest.raises(SoftTokensError, match=r"NaN or infinite values in 1 of 5 soft tokens \(the first is 3\)"):
        soft.save(tmp_path / "soft.safetensors")
    assert not list(tmp_path.iterdir())


# Files


@pytest.mark.parametrize("as_type", [str, Path])
def test_files_round_trip(as_type: type, tmp_path: Path) -> None:
    soft, path = make(), tmp_path / "soft.safetensors"
    soft.save(as_type(path))
    assert path.read_bytes() == soft.to_bytes()
    assert torch.equal(SoftTokens.load(as_type(path)).embeds, soft.embeds)
    make(torch.float32).save(path)  # replaces
    assert SoftTokens.load(path).embeds.dtype == torch.float32
    assert [entry.name for entry in tmp_path.iterdir()] == ["soft.safetensors"]


def test_new_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    make().save(tmp_path / "soft")
    assert (tmp_path / "soft").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_name_as_long_as_allowed_and_a_link_are_written(tmp_path: Path) -> None:
    make().save(tmp_path / ("a" * 255))
    (tmp_path / "link").symlink_to(tmp_path / "target")
    make().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(SoftTokens.load(tmp_path / "target")) == 5


@contextlib.contextmanager
def no_space_for_sync(_: Path) -> Iterator[int]:
    """The disk is full, which the file system only notices when it must really write."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        yield errno.ENOSPC


@contextlib.contextmanager
def file_size_limit(_: Path) -> Iterator[int]:
    """A real write that stops half-way: the kernel refuses whatever lies beyond 300 bytes."""
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard_limit))
    try:
        yield errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft_limit, hard_limit))


@contextlib.contextmanager
def no_rename(_: Path) -> Iterator[int]:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        yield errno.EXDEV


@pytest.mark.parametrize("failure", [no_space_for_sync, file_size_limit, no_rename])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failed_save_leaves_everything_as_it_was(failure: Any, exists: bool, tmp_path: Path) -> None:
    path = tmp_path / "soft.safetensors"
    if exists:
        path.write_bytes(b"before")
    with failure(tmp_path) as number, pytest.raises(OSError) as caught:
        make().save(path)
    assert caught.value.errno == number
    assert f"cannot write soft tokens to {path}: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([b"before"] if exists else [])


def test_an_interrupted_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "soft", b"data")
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def without_root() -> Iterator[None]:
    """Permissions mean nothing to root: be nobody for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_cannot_be_written_and_a_file_that_cannot_be_read() -> None:
    folder = Path(tempfile.mkdtemp())  # not tmp_path, which only its owner may enter
    try:
        path = folder / "soft.safetensors"
        make().save(path)
        path.chmod(0)
        folder.chmod(0o555)
        with without_root():
            with pytest.raises(PermissionError, match=f"cannot write soft tokens to {folder}/other: Permission"):
                make().save(folder / "other")
            with pytest.raises(PermissionError, match=f"cannot read soft tokens from {path}: Permission"):
                SoftTokens.load(path)
        assert list(folder.iterdir()) == [path]
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match=f"cannot read soft tokens from {path}: it is not a regular file"):
            SoftTokens.load(path)
        with pytest.raises(OSError, match=f"cannot write soft tokens to {path}: it exists and is not a regular"):
            make().save(path)
    missing = tmp_path / "nowhere" / "soft"
    with pytest.raises(FileNotFoundError, match=f"cannot read soft tokens from {missing}"):
        SoftTokens.load(missing)
    with pytest.raises(FileNotFoundError, match=f"cannot write soft tokens to {missing}"):
        make().save(missing)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "soft.safetensors"
    path.write_bytes(make().to_bytes()[:-1])
    with pytest.raises(SoftTokensError, match=f"{path}: 79 bytes of tensor data, expected 80"):
        SoftTokens.load(path)
