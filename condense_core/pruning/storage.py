"""Pruned caches in files: written as a whole or not at all, and mapped into memory when read.

``cache_format`` says what is in a file and checks it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from condense_core.files.atomic import naming, regular_size, replacing
from condense_core.files.headers import canonical_json, header_length, parse_header
from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.cache_format import (
    CODES,
    FORMAT,
    FORMAT_VERSION,
    MAX_HEADER_BYTES,
    Entry,
    check_places,
    checked_header,
    digest,
    fail,
)
from condense_core.pruning.cache_layers import mark_uneven
from condense_core.pruning.layers import PrunedLayer, UniformLayer
from condense_core.pruning.quantized import STORAGES, Quantized
from condense_core.pruning.ragged import RaggedLayer
from condense_core.pruning.rotary import Rotary

WHAT = "a pruned cache"
_ALIGNMENT = 64


@dataclass(frozen=True)
class _Part:
    """A tensor to write; rows: those of its first dimension that count, gathered only when it is written."""

    tensor: Tensor
    rows: Tensor | None = None

    @property
    def shape(self) -> list[int]:
        return list(self.tensor.shape) if self.rows is None else [len(self.rows), *self.tensor.shape[1:]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.tensor.element_size()

    def to_bytes(self) -> memoryview:
        chosen = self.tensor if self.rows is None else self.tensor[self.rows]
        return chosen.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data


# -- writing -----------------------------------------------------------------------------------------------------------


def save(cache: PrunedCache, path: Path) -> None:
    """Write ``cache``; one tensor at a time passes through memory.

    What a layer holds is written, also what came after the pruning; room to grow is not, nor are the queries that a
    method remembers for evictions during generation.

    Raises:
        ValueError: the cache is one that ``load`` would refuse.
        OSError: the file cannot be written; a file that stood there before is untouched.
    """
    parts = {"inv_freq": _Part(cache.rotary.inv_freq.float())}
    layers = []
    for index, layer in enumerate(cache.layers):
        about, own = _dismantled(layer, index)
        layers.append(about)
        parts |= {f"{index}.{name}": part for name, part in own.items()}
    payload = sum(part.nbytes for part in parts.values())
    facts = {
        "model_id": cache.model_id,
        "method": cache.method,
        "ratio": round(cache.full_nbytes / payload, 4),  # without room, so that equal caches give equal files
        "lengths": list(cache.lengths),
        "context_tokens": list(cache.context_tokens),
        "full_nbytes": cache.full_nbytes,
        "rotary_factor": cache.rotary.factor,
        "layers": layers,
    }
    # Wide types first: each tensor is then aligned to its type.
    parts = dict(sorted(parts.items(), key=lambda item: -item[1].tensor.element_size()))
    try:
        header = _header(facts, parts)
        _, table = checked_header(header, payload)
        check_places(facts, table, {name: part.tensor for name, part in parts.items()})
    except ValueError as error:
        raise ValueError(f"cache: it cannot be saved: {error}") from None
    with replacing(path, WHAT) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in parts.values():
            file.write(part.to_bytes())


def _dismantled(layer: Any, index: int) -> tuple[dict[str, Any], dict[str, _Part]]:
    """What the header says of a layer, and its tensors."""
    if isinstance(layer, RaggedLayer):
        offsets, rows = _valid_rows(layer)
        about = {
            "kind": "ragged",
            "seen": layer.seen,
            "since": layer.since,
            "batch": layer.batch,
            "kv_heads": layer.kv_heads,
        }
        return about, {
            "keys": _Part(layer.keys, rows),
            "values": _Part(layer.values, rows),
            "cu_seqlens": _Part(offsets),
            "positions": _Part(layer.positions),
            "kept_offsets": _Part(layer.kept_offsets),
        }
    if not isinstance(layer, UniformLayer) or layer._keys is None or layer._values is None:
        raise ValueError(f"cache: layer {index} is an empty {type(layer).__name__}, expected one that was prefilled")
    length = layer._length
    parts = {"keys": _Part(layer._keys[:, :, :length]), "values": _Part(layer._values[:, :, :length])}
    storage = None
    if layer.positions is not None:
        parts["positions"] = _Part(layer.positions)
    if layer.stored is not None:
        storage = next(name for name, dtype in STORAGES.items() if dtype == layer.stored.rows[0].dtype)
        for name, rows, scale in zip(("keys", "values"), layer.stored.rows, layer.stored.scales, strict=True):
            parts |= {f"stored_{name}": _Part(rows), f"stored_{name}_scale": _Part(scale)}
    about = {
        "kind": "uniform",
        "seen": layer.seen,
        "since": layer.since,
        "num_kept": layer.num_kept,
        "storage": storage,
    }
    return about, parts


def _valid_rows(layer: RaggedLayer) -> tuple[Tensor, Tensor | None]:
    """Offsets of the heads without the room between them, and the rows that then remain; None: all."""
    lengths = layer.lengths
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0).int()])
    count = int(offsets[-1])
    if count == len(layer.keys):
        return offsets, None
    shift = (layer.cu_seqlens - offsets)[:-1].repeat_interleave(lengths, output_size=count)
    return offsets, torch.arange(count, device=lengths.device) + shift


def _header(facts: dict[str, Any], parts: dict[str, _Part]) -> bytes:
    table, end = {}, 0
    for name, part in parts.items():
        if part.tensor.dtype not in CODES:
            fail(f"{name} has dtype {part.tensor.dtype}, expected one of {', '.join(map(str, CODES))}")
        offsets = [end, end + part.nbytes]
        table[name] = {"dtype": CODES[part.tensor.dtype], "shape": part.shape, "data_offsets": offsets}
        end = offsets[1]
    text = canonical_json(facts).decode()
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "cache": text, "sha256": digest(text, table)}
    header = canonical_json({"__metadata__": metadata} | table)
    return header + b" " * (-(len(header) + 8) % _ALIGNMENT)


# -- reading -----------------------------------------------------------------------------------------------------------


def load(path: Path) -> PrunedCache:
    """Read what ``save`` wrote, mapped into memory.

    Changing the cache does not change the file. The file must not be cut while the cache is in use, which ``save``
    never does: it puts a new file in the place of the old one.

    Raises:
        ValueError: the file is truncated, damaged, of another format or out of bounds; the message names it.
        OSError: it cannot be read; the message names it.
    """
    try:
        with naming(f"read {WHAT} from", path):
            size = regular_size(path)
            with path.open("rb") as file:
                length = header_length(file.read(16), size, limit=MAX_HEADER_BYTES, expected=WHAT)
                file.seek(8)
                header = file.read(length)
            facts, table = checked_header(header, size - 8 - length)
            tensors = _mapped(path, header, table)
        check_places(facts, table, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    layers = [_assembled(layer, index, tensors) for index, layer in enumerate(facts["layers"])]
    cache = PrunedCache(
        layers,
        model_id=facts["model_id"],
        method=facts["method"],
        lengths=facts["lengths"],
        context_tokens=facts["context_tokens"],
        full_nbytes=facts["full_nbytes"],
        rotary=Rotary(tensors["inv_freq"], float(facts["rotary_factor"])),
    )
    mark_uneven(cache)
    return cache


def _mapped(path: Path, header: bytes, table: dict[str, Entry]) -> dict[str, Tensor]:
    """The tensors of a file whose header has been checked."""
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != parse_header(header)["__metadata__"]:
                fail("it changed while it was being read")
            return {name: file.get_tensor(name) for name in table}
    except SafetensorError as error:
        fail(str(error))


def _assembled(facts: dict[str, Any], index: int, tensors: dict[str, Tensor]) -> PrunedLayer:
    def own(name: str) -> Tensor:
        return tensors[f"{index}.{name}"]

    if facts["kind"] == "ragged":
        ragged = RaggedLayer(
            own("keys"),
            own("values"),
            own("cu_seqlens"),
            batch=facts["batch"],
            kv_heads=facts["kv_heads"],
            positions=own("positions"),
            seen=facts["seen"],
        )
        ragged.since, ragged.kept_offsets = facts["since"], own("kept_offsets")
        return ragged
    layer = UniformLayer()
    layer.hold(own("keys"), own("values"), facts["seen"])
    layer.num_kept, layer._added = facts["num_kept"], facts["since"]
    if layer.num_kept is not None:
        layer.positions = own("positions")
    if facts["storage"] is not None:
        rows, scales = ((own(f"stored_keys{suffix}"), own(f"stored_values{suffix}")) for suffix in ("", "_scale"))
        layer.stored = Quantized(rows, scales)
    return layer
