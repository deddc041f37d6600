"""The weights of a model where they lie: in safetensors files, read tensor by tensor or a few values at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from condense_core.files.headers import header_length, parse_header

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER = 100_000_000  # bytes, as safetensors itself has it

Read = Callable[[str, tuple[slice, ...]], Tensor]
"""``read(name, place)``: neighbouring values ``[m]`` of a tensor, on the CPU.

place: a slice for each of the first dimensions; all but the last of these have one element.
"""


class Shards:
    """The tensors of the safetensors files of a model, of which only headers have been read.

    Attributes:
        files: the file that each tensor is in, by the tensor's name.
    """

    def __init__(self, name: str, revision: str | None = None) -> None:
        """Find the files of a model folder, or of a hub id, whose files are fetched as far as they are not cached.

        Raises:
            ValueError: there are no safetensors, the index is none or names a file elsewhere, or a file is missing,
                truncated or damaged.
        """
        find = _Finder(name, revision)
        if find("adapter_config.json") is not None:
            raise ValueError("an adapter lies beside its weights; load it whole")
        single = find(SINGLE_NAME)
        if single is not None:
            with _opened(single) as file:
                self.files = dict.fromkeys(file.keys(), single)
            return
        index = find(INDEX_NAME)
        if index is None:
            raise ValueError(f"neither {SINGLE_NAME} nor {INDEX_NAME} is here; only safetensors are read")
        tensors = _read_index(index)
        paths = {filename: find(filename) for filename in sorted(set(tensors.values()))}
        for filename, path in paths.items():
            if path is None:
                raise ValueError(f"{INDEX_NAME} names {filename}, which is not here")
        self.files = {tensor: path for tensor, filename in tensors.items() if (path := paths[filename]) is not None}

    def tensors(self, names: Iterable[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Each of ``names`` with its tensor in the file's dtype, straight to ``device``, one file after the other."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for path, own in by_file.items():
            with _opened(path, str(device)) as file:
                for name in own:
                    yield name, _read(path, name, file.get_tensor)

    @contextmanager
    def pieces(self, shapes: Mapping[str, Sequence[int]]) -> Iterator[Read]:
        """Inside, a function that reads a few values of a tensor and no others.

        Nothing is mapped into memory for it: with each value the system would map the pages around it.

        Args:
            shapes: what the tensors must be like.

        Raises:
            ValueError: a file lacks one of them, or holds another shape, or no floating point numbers.
        """
        with ExitStack() as stack:
            opened = {path: _Table(path, stack) for path in sorted({self.files[name] for name in shapes})}
            for name, shape in shapes.items():
                opened[self.files[name]].check(name, list(shape))
            yield lambda name, place: opened[self.files[name]].read(name, place)


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is in a file: ``start`` in bytes from the file's beginning."""

    dtype: str
    shape: list[int]
    start: int


class _Table:
    """The tensors of one file, and single values of them; closed with ``stack``."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        with _opened(path):  # safetensors finds whatever is wrong with the header
            pass
        self.file = stack.enter_context(path.open("rb"))
        size = path.stat().st_size
        length = header_length(self.file.read(9), size, limit=_MAX_HEADER, expected="weights")
        header = parse_header(os.pread(self.file.fileno(), length, 8))
        header.pop("__metadata__", None)
        self.entries = {
            name: _Entry(entry["dtype"], entry["shape"], 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        }

    def check(self, name: str, shape: list[int]) -> None:
        """``ValueError`` unless ``name`` is a tensor of ``shape`` of floating point numbers."""
        entry = self.entries.get(name)
        if entry is None:
            raise ValueError(f"{self.path.name}: {name} is not in it, as {INDEX_NAME} says")
        if entry.shape != shape:
            raise ValueError(f"{self.path.name}: {name} has the shape {entry.shape}, expected {shape}")
        if entry.dtype not in _FLOATING:
            raise ValueError(f"{self.path.name}: {name} is of {entry.dtype}, expected {', '.join(_FLOATING)}")

    def read(self, name: str, place: tuple[slice, ...]) -> Tensor:
        entry = self.entries[name]
        start, count = 0, 1
        for dimension, some in enumerate(place):
            first, stop, _ = some.indices(entry.shape[dimension])
            inner = math.prod(entry.shape[dimension + 1 :])
            start, count = start + first * inner, (stop - first) * inner
        dtype = _FLOATING[entry.dtype]
        data = os.pread(self.file.fileno(), count * dtype.itemsize, entry.start + start * dtype.itemsize)
        return torch.frombuffer(bytearray(data), dtype=dtype)


class _Finder:
    """Files of a model folder or of a hub id, by name; None where there is no such file."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name = name
        self.is_folder = Path(name).is_dir()
        found = (
            Path(name, "config.json") if self.is_folder else Path(cached_file(name, "config.json", revision=revision))
        )
        self.folder = found.parent  # of a hub id the snapshot of one commit, whose name is the commit's

    def __call__(self, filename: str) -> Path | None:
        path = self.folder / filename
        if path.is_file():
            return path
        if self.is_folder:
            return None
        try:
            return Path(hf_hub_download(self.name, filename, revision=self.folder.name))
        except EntryNotFoundError:  # not in the repository or, offline, not in the cache
            return None


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, by the tensor's name; ``ValueError`` unless all are files beside the index."""
    try:
        tensors: Any = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        tensors = None
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"{INDEX_NAME} is damaged (no weight_map in it)")
    for tensor, filename in tensors.items():
        plain = isinstance(filename, str) and "\\" not in filename and PurePosixPath(filename).name == filename
        if not plain or not filename.endswith(".safetensors"):
            raise ValueError(
                f"{INDEX_NAME} has {tensor} in {filename!r:.80}, expected a .safetensors file in the same folder"
            )
    return tensors


@contextmanager
def _opened(path: Path, device: str = "cpu") -> Iterator[Any]:
    """A safetensors file, memory-mapped; ``ValueError``, which names it, where it is none or cut off."""
    try:
        file = safe_open(path, framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name}: {' '.join(str(error).split())}") from error
    with file as opened:
        yield opened


def _read(path: Path, name: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(name)
    except SafetensorError as error:
        raise ValueError(f"{path.name}: cannot read {name} ({' '.join(str(error).split())})") from error
