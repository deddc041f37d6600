"""Which model it is: a digest of the weights, to which caches, soft tokens and compressor checkpoints belong.

A name decides nothing, since folders are copied, renamed and trained on. The digest covers the name, the shape and 128
values of every weight (two places of 64 neighbours), the frequencies of the rotary embedding, and LoRA adapters as far
as they are active. It reads no more than that: 7 billion parameters take some milliseconds. Rows of the vocabulary
beyond the first are not counted, so that added tokens leave the model what it was.

Values count as rounded to bfloat16, so that a checkpoint has one digest in whatever dtype it is loaded. For a float32
checkpoint loaded as float16 that is not enough, since it is rounded twice then; the second half of a digest is of
values that went through float16 first, and two digests agree where either half of one is a half of the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

DIGEST_CHARS = 64
_RUN = 64  # neighbouring values read at each place
_VOCABULARY_ROWS = (7, 31, 101, 257, 509)
_SMALLEST = 2.0**-16  # below, float16 holds fewer bits than bfloat16
_LARGEST = 2.0**15

_lock = Lock()
_known: WeakKeyDictionary[nn.Module, tuple[int, str]] = WeakKeyDictionary()
_wholes: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()

Place = tuple[slice, ...]
"""Some values of a tensor: a slice for each dimension."""


def model_digest(model: nn.Module) -> str:
    """64 hexadecimal digits that tell the weights of ``model`` from any others; "" where it has no values (meta).

    Independent of the dtype the weights are loaded in, the device, the path and the name. Another fine-tune, an active
    LoRA adapter and other rotary frequencies give another digest.

    Kept for each model as long as its tensors stay the same ones at the same version and the same adapters are active.
    A change that goes around torch's version counter (``parameter.data.normal_()``) is not noticed. A model that holds
    a part of its weights has the digest of the whole, where ``remember_digest`` said so.
    """
    own = _own_digest(model)
    with _lock:
        part, whole = _wholes.get(model, (own, own))
    return whole if same_weights(part, own) else own


def remember_digest(model: nn.Module, digest: str) -> None:
    """Let ``model``, which holds a part of the weights that ``digest`` is of, have it as long as that part stays."""
    own = _own_digest(model)
    with _lock:
        _wholes[model] = own, digest


def digest_from(model: nn.Module, read: Callable[[str, Place], Tensor]) -> str:
    """The digest of ``model``, whose parameters have no values, with the values that ``read`` gives.

    read: ``read(name, place)``: the values of a parameter at a place, in the dtype that the model will have them in.
    """
    tensors = dict(_weights(model))

    def values(name: str, place: Place) -> Tensor:
        return read(name, place) if tensors[name].is_meta else tensors[name][place]

    return _digest({name: tensor.shape for name, tensor in tensors.items()}, values)


def _own_digest(model: nn.Module) -> str:
    """The digest of what ``model`` holds."""
    tensors = dict(_weights(model))
    state = hash(tuple((name, tensor.data_ptr(), _version(tensor)) for name, tensor in tensors.items()))
    with _lock:
        found = _known.get(model)
        if found is None or found[0] != state:
            meta = not tensors or any(tensor.is_meta for tensor in tensors.values())
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            digest = "" if meta else _digest(shapes, lambda name, place: tensors[name][place])
            found = _known[model] = (state, digest)
    return found[1]


def same_weights(first: str, second: str) -> bool:
    """Whether two digests, both known, are of the same weights."""
    half = DIGEST_CHARS // 2
    return bool({first[:half], first[half:]} & {second[:half], second[half:]})


def same_name(first: str, second: str) -> bool:
    """Whether two names may name one model: a hub id and a local copy of it differ in the owner's name only."""
    return first.rpartition("/")[2] == second.rpartition("/")[2]


def mismatch(made_by: str, made_by_digest: str, model: str, digest: str) -> str | None:
    """Why what one model made does not belong to another, or None where it does.

    The digests decide. Where one is "" (a file of an earlier release, a model without values) the names do: their last
    parts must be equal.

    Args:
        made_by, made_by_digest: name and digest of the model that made it.
        model, digest: name and digest of the model that is to use it.
    """
    made_by, model = made_by or "unnamed", model or "unnamed"
    if made_by_digest and digest:
        if same_weights(made_by_digest, digest):
            return None
        if same_name(made_by, model):
            return f"made by a model {made_by!r} with other weights, expected one of these weights"
        return f"made by {made_by!r}, expected one of {model!r} (their weights differ)"
    if same_name(made_by, model):
        return None
    return f"made by {made_by!r}, expected one of {model!r} (it has no digest of the weights, so the name decides)"


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and rotary frequencies by name; of adapters (peft) what is active, with its scaling.

    Names are those of the model without adapters, so that one with all of them switched off has its digest again.
    """
    skipped: list[str] = []
    for path, module in model.named_modules():
        adapter = getattr(module, "base_layer", None)
        if not isinstance(adapter, nn.Module) or not hasattr(module, "active_adapters"):
            continue
        active = [] if getattr(module, "disable_adapters", False) else list(module.active_adapters)
        merged = set(getattr(module, "merged_adapters", ()))
        working = [name for name in active if name not in merged]  # a merged one is in the base weight already
        for name in working:
            scaling = getattr(module, "scaling", {})
            if name in scaling:
                yield f"{_plain(path)}.{name}.scaling", torch.tensor(float(scaling[name]))
        for child, _ in module.named_parameters():
            parts = child.split(".")
            if parts[0] != "base_layer" and not any(name in parts for name in working):
                skipped.append(f"{path}.{child}" if path else child)
    left_out = set(skipped)
    for name, parameter in model.named_parameters():
        if name not in left_out:
            yield _plain(name), parameter.detach()
    for name, buffer in model.named_buffers():
        if name.endswith("original_inv_freq"):  # dynamic RoPE changes the one beside it with the length of the text
            yield f"buffer {_plain(name)}", buffer.detach()


def _plain(name: str) -> str:
    """A parameter's name without what peft puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _digest(shapes: Mapping[str, Sequence[int]], read: Callable[[str, Place], Tensor]) -> str:
    facts: list[Any] = []
    runs: dict[torch.device, list[tuple[int, Tensor]]] = {}
    places = 0
    for name, shape in sorted(shapes.items()):
        vocabulary = len(shape) == 2 and name.endswith(("embed_tokens.weight", "lm_head.weight"))
        facts.append([name, [0, *shape[1:]] if vocabulary else list(shape)])
        for place in _places(shape, vocabulary):
            run = read(name, place).reshape(-1)
            runs.setdefault(run.device, []).append((places, run.to(torch.float32)))
            places += 1
    values: dict[int, Tensor] = {}
    for found in runs.values():  # one transfer a device
        joined = torch.cat([run for _, run in found]).cpu()
        values |= dict(zip((n for n, _ in found), joined.split([len(run) for _, run in found]), strict=True))
    flat = torch.cat([values[n] for n in range(places)])
    flat = torch.where(flat.abs() < _SMALLEST, 0.0, flat).clamp(-_LARGEST, _LARGEST)
    head = json.dumps(facts, separators=(",", ":")).encode()
    halves = (flat.bfloat16(), flat.half().bfloat16())
    return "".join(
        hashlib.sha256(head + half.view(torch.uint8).numpy().tobytes()).hexdigest()[: DIGEST_CHARS // 2]
        for half in halves
    )


def _places(shape: Sequence[int], vocabulary: bool) -> list[Place]:
    """Places of short one-dimensional pieces of a tensor, which its shape fixes."""
    if vocabulary:
        rows = [row for row in _VOCABULARY_ROWS if row < shape[0]] or [0]
        return [(slice(row, row + 1), slice(0, _RUN)) for row in rows]
    if 0 in shape:
        return []
    if not shape:
        return [(), ()]
    places = []
    for third in (1, 2):
        rows = [size * third // 3 for size in shape[:-1]]
        start = max(0, shape[-1] - _RUN) * third // 3
        places.append((*(slice(row, row + 1) for row in rows), slice(start, start + _RUN)))
    return places
