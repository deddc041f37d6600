"""The decoder: loading one by name with errors of one line, its public name, its dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from condense_core.decoder.catalog import CATALOG, model_path


@contextmanager
def load_errors(name_or_path: str | Path) -> Iterator[None]:
    """Around the loading of a model: whatever goes wrong becomes a ``ValueError`` of one line that names the model."""
    path, name = Path(name_or_path), str(name_or_path)
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "~", "/"))
    if (path.exists() or not is_hub_id) and not (path / "config.json").is_file():
        raise ValueError(
            f"model: {name!r} is no model folder (no config.json in it); expected a folder, a hub id or "
            f"a name of 'condense models list' ({', '.join(CATALOG)})"
        )
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(f"model: cannot load {name!r} ({reason})") from error


def load_decoder(
    name_or_path: str | Path, *, dtype: torch.dtype, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen decoder, in evaluation mode on the CPU, and its tokenizer; ``ValueError`` where they cannot be had.

    Its name is one that ``catalog.model_path`` takes. Only safetensors are read: a pickled checkpoint is refused, as is
    one that lacks weights.
    """
    name = model_path(name_or_path)
    with load_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, revision=revision, use_safetensors=True, output_loading_info=True
        )
        if missing := sorted(loaded["missing_keys"]):  # transformers would go on with random numbers in their place
            raise ValueError(f"{len(missing)} weights that its config asks for are missing, such as {missing[0]}")
    return model.requires_grad_(False).eval(), tokenizer


def open_decoder(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """``load_decoder``, and to ``device``: by default ``cuda`` where there is one, else ``cpu``.

    dtype: by default the checkpoint's own on a GPU and fp32 on the CPU.
    """
    name = model_path(name_or_path)
    device, dtype = placement(name, device, dtype, revision)
    model, tokenizer = load_decoder(name, dtype=dtype, revision=revision)
    return model.to(device), tokenizer


def placement(
    name: str, device: str | torch.device | None, dtype: torch.dtype | None, revision: str | None
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a model that is loaded, with the defaults of ``open_decoder`` for what is None.

    name: as ``catalog.model_path`` gives it.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with load_errors(name):
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else checkpoint_dtype(name, revision)
    return device, dtype


def weight_bytes(name_or_path: str | Path, dtype: torch.dtype, *, revision: str | None = None) -> int:
    """Bytes that the weights of a model take in ``dtype``, by its config; nothing is loaded. Errors as of loading."""
    name = model_path(name_or_path)
    with load_errors(name), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, revision=revision), dtype=dtype)
    return sum(parameter.nbytes for parameter in model.parameters())


def public_model_id(name_or_path: str) -> str:
    """A hub id as it is; of a local folder only its name, so that soft tokens do not carry paths of a machine."""
    if not name_or_path:  # a live model that was never loaded; Path("") would be the current folder
        return "unnamed"
    path = Path(name_or_path)
    return path.resolve().name if path.exists() else name_or_path


def checkpoint_dtype(name: str, revision: str | None) -> torch.dtype:
    """The dtype that a checkpoint's config names, else bfloat16."""
    dtype = AutoConfig.from_pretrained(name, revision=revision).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
