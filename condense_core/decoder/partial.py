"""A decoder of which only the embeddings and the first layers are loaded, which is all that compression needs.

The whole model is built without values, on the meta device, and cut behind the last layer that is wanted. Its weights
then come one by one from memory-mapped safetensors files, straight to the device. Later layers and the output head are
not read, except for the few values of each that the digest of the whole model covers (``decoder.identity``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from condense_core.decoder.architecture import decoder_parts, unsupported
from condense_core.decoder.catalog import model_path
from condense_core.decoder.identity import digest_from, model_digest, remember_digest
from condense_core.decoder.model import load_errors, placement
from condense_core.decoder.shards import Shards

_ROWS = 4096  # of two weights that are compared at once


class MissingHead(nn.Module):
    """Stands where the output head would; whoever asks it for logits gets a ``ValueError``.

    num_layers: that were loaded. depth: layers of the whole model.
    """

    def __init__(self, name: str, num_layers: int, depth: int) -> None:
        super().__init__()
        self.name, self.num_layers, self.depth = name, num_layers, depth

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(self.refusal("logits"))

    def refusal(self, what: str) -> str:
        """Why ``what`` cannot be had of the model, in one line."""
        layers = (
            f" and {self.depth - self.num_layers} of its {self.depth} layers" if self.depth > self.num_layers else ""
        )
        return f"{what}: the model {self.name!r} was loaded without its output head{layers}; load it whole"


def check_whole(model: nn.Module, what: str) -> None:
    """``ValueError``, which begins with ``what``, where ``model`` was loaded in part."""
    if head := _missing_head(model):
        raise ValueError(head.refusal(what))


def whole_depth(model: PreTrainedModel) -> int:
    """The layers of ``model``; where it was loaded in part, those of the whole."""
    head = _missing_head(model)
    return head.depth if head else len(decoder_parts(model).layers)


def _missing_head(model: nn.Module) -> MissingHead | None:
    return next((child for child in model.children() if isinstance(child, MissingHead)), None)


def release_layers(model: PreTrainedModel) -> None:
    """Take the layers out of a model that was loaded in part, for an encoder that has them, or copies of them."""
    digest = model_digest(model)
    decoder_parts(model).layers = nn.ModuleList()
    remember_digest(model, digest)


def open_first_layers(
    name_or_path: str | Path,
    num_layers: int,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen decoder with its first ``num_layers`` layers alone, in evaluation mode, and its tokenizer.

    Its config has so many layers, its digest is that of the whole model's weights, and it has no output head. Arguments
    and defaults are otherwise those of ``open_decoder``.

    Raises:
        ValueError: the model has no so many layers, cannot be had, or its weights are incomplete, damaged, quantized or
            stored in another layout than the model's, as those of a mixture of experts.
        TypeError: it is no decoder that this project knows.
    """
    unloaded = UnloadedDecoder(name_or_path, device=device, dtype=dtype, revision=revision)
    return unloaded.load(num_layers), unloaded.tokenizer()


class UnloadedDecoder:
    """A decoder whose shape and digest are known, and none of whose weights is loaded.

    Attributes:
        model: on the meta device, until ``load`` gives it values. ``model_digest(model)`` is that of the weights.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> None:
        """Read config and headers, and the few values that the digest covers; errors as of ``open_first_layers``."""
        self.name, self._revision = model_path(name_or_path), revision
        self.device, dtype = placement(self.name, device, dtype, revision)
        with load_errors(self.name):
            config = AutoConfig.from_pretrained(self.name, revision=revision)
            if getattr(config, "quantization_config", None):
                raise ValueError("its weights are quantized; load it whole")
            with torch.device("meta"):
                self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False).eval()
        self._inner = decoder_parts(self.model)
        with load_errors(self.name):
            fill_buffers(self.model)
            self._shards = Shards(self.name, revision)
            self._check_layout()
            self._stored = self._find_weights()
            remember_digest(self.model, self._digest())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; ``ValueError`` where it cannot be had."""
        with load_errors(self.name):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.name, revision=self._revision)
            return tokenizer

    def load(self, num_layers: int) -> PreTrainedModel:
        """``model``, cut behind its first ``num_layers`` layers and with their weights; once."""
        depth = len(self._inner.layers)
        if not 0 <= num_layers <= depth:
            raise ValueError(f"num_layers: got {num_layers}, expected 0 to {depth}, the layers of {self.name!r}")
        digest = model_digest(self.model)
        keep_first_layers(self.model, num_layers)
        with load_errors(self.name):
            names = {self._stored[name]: name for name in self.model.state_dict()}
            for stored, tensor in self._shards.tensors(names, self.device):
                self._set(names[stored], tensor)
            for name, buffer in list(self.model.named_buffers()):
                self._set(name, buffer)
                if buffer.is_floating_point() and buffer.isnan().any():
                    raise ValueError(f"the values of its {name} are not known; load it whole")
        remember_digest(self.model, digest)
        return self.model

    def _set(self, name: str, tensor: Tensor) -> None:
        """Put a weight or a buffer where the model has ``name``."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        before = getattr(module, leaf)
        if isinstance(before, nn.Parameter):
            setattr(module, leaf, nn.Parameter(tensor.to(self._dtype(name, before)), requires_grad=False))
        else:
            setattr(module, leaf, tensor.to(self.device, before.dtype))

    def _dtype(self, name: str, parameter: Tensor) -> torch.dtype:
        """What transformers loads a parameter as: the model's dtype, or fp32 where the model insists on it."""
        kept: set[str] = set()
        if parameter.dtype in (torch.float16, torch.bfloat16):
            kept |= {*(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())}
        if parameter.dtype == torch.float16:
            kept |= {*(getattr(self.model, "_keep_in_fp32_modules", None) or ())}
        return torch.float32 if any(f".{part}." in f".{name}." for part in kept) else parameter.dtype

    def _check_layout(self) -> None:
        """``ValueError`` where transformers would compute weights from the files' tensors, not take them as is."""
        for converter in get_model_conversion_mapping(self.model):
            if isinstance(converter, WeightConverter):
                found = (name for name in self._shards.files if converter.rename_source_key(name)[1] is not None)
                if name := next(found, None):
                    raise ValueError(f"its files hold weights such as {name} in another layout; load it whole")

    def _find_weights(self) -> dict[str, str]:
        """For each weight of the model its name in the files; ``ValueError`` where one is missing.

        Of tied weights one is enough. Where the files have both and they differ, transformers does not tie them, and
        neither does this.
        """
        shared: dict[int, list[str]] = {}
        weights: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        for name, weight in weights.items():
            shared.setdefault(id(weight), []).append(name)
        found: dict[str, str] = {}
        missing: list[str] = []
        for names in shared.values():
            stored = {name: own for name in names if (own := self._name_in_files(name))}
            missing += names[:1] if not stored else []
            if len(stored) > 1 and not self._same(list(stored.values()), weights[names[0]]):
                for name in names[1:]:  # each is a weight of its own
                    path, _, leaf = name.rpartition(".")
                    own_weight = nn.Parameter(torch.empty_like(weights[name]), requires_grad=False)
                    setattr(self.model.get_submodule(path), leaf, own_weight)
                found |= stored
            elif stored:
                found |= dict.fromkeys(names, next(iter(stored.values())))
        if missing:
            raise ValueError(f"{len(missing)} weights that its config asks for are missing, such as {min(missing)}")
        return found

    def _name_in_files(self, name: str) -> str | None:
        """Files of an inner model alone lack its prefix."""
        candidates = (name, name.removeprefix(f"{self.model.base_model_prefix}."))
        return next((each for each in candidates if each in self._shards.files), None)

    def _same(self, names: list[str], weight: Tensor) -> bool:
        """Whether tied weights that are all in the files are equal, in the dtype that they are loaded in."""

        def rows() -> Iterator[slice]:
            return (slice(start, start + _ROWS) for start in range(0, len(weight), _ROWS))

        with self._shards.pieces(dict.fromkeys(names, weight.shape)) as read:
            return all(
                torch.equal(read(names[0], (some,)).to(weight.dtype), read(other, (some,)).to(weight.dtype))
                for other in names[1:]
                for some in rows()
            )

    def _digest(self) -> str:
        """The digest that the whole model would have in its dtype."""
        weights = dict(self.model.named_parameters())
        shapes = {self._stored[name]: weight.shape for name, weight in weights.items()}
        with self._shards.pieces(shapes) as read:
            return digest_from(
                self.model, lambda name, place: read(self._stored[name], place).to(self._dtype(name, weights[name]))
            )


def keep_first_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Leave ``model`` its first ``num_layers`` layers, also in its config, and a ``MissingHead`` for an output head."""
    inner = decoder_parts(model)
    depth = len(inner.layers)
    setattr(model, _head_name(model), MissingHead(model.name_or_path, num_layers, depth))
    inner.layers = inner.layers[:num_layers]
    for config in {id(c): c for c in (model.config, inner.config)}.values():
        _cut_config(config, num_layers, depth)


def _head_name(model: PreTrainedModel) -> str:
    """The attribute of ``model`` that is its output head."""
    head = model.get_output_embeddings()
    for name, child in model.named_children():
        if child is head:
            return name
    raise unsupported(model, "has no output head over its inner model")


def _cut_config(config: Any, num_layers: int, depth: int) -> None:
    """Let ``config`` be of ``num_layers`` layers: also what it lists by layer, such as ``layer_types``."""
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list | tuple) and len(value) == depth:
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = num_layers


@torch.no_grad()
def fill_buffers(model: PreTrainedModel) -> None:
    """Give buffers of ``model`` that have no values those that transformers computes, such as rotary frequencies.

    NaN stays where it computes none.
    """
    for module in model.modules():
        empty = {name: b for name, b in module.named_buffers(recurse=False) if b.is_meta}
        for name, buffer in empty.items():
            value = torch.nan if buffer.is_floating_point() else 0
            setattr(module, name, torch.full_like(buffer, value, device="cpu"))
        if empty:
            model._init_weights(module)
