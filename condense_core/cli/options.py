"""What the commands have in common: options, and the loading of the model they name."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condense_core.cli.terminal import working
from condense_core.compressor.config import COMPRESSION_METHODS, CONFIG_NAME, MAX_RATIO, TRAINED_METHODS, check_ratio
from condense_core.decoder.embedded import EMBEDDED_NAME, embedded_model_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from condense_core.compressor.condenser import Condenser

DEFAULT_RATIO = 4
DTYPES = ("float32", "bfloat16", "float16")
_METHODS = ", ".join(COMPRESSION_METHODS)


def _parse_ratio(value: str | float) -> float:
    try:
        return check_ratio(float(value))
    except ValueError:
        raise typer.BadParameter(f"got {value!r}, expected a number from 1 to {MAX_RATIO}") from None


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="Model folder, hub id, or a name of 'condense models list'.",
        show_default=f"the embedded {EMBEDDED_NAME}",
        metavar="MODEL",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1 ...", show_default="cuda if there is one, else cpu")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Of the model's weights: float32, bfloat16 or float16.",
        show_default="the checkpoint's own on a GPU, float32 on the CPU",
    ),
]
EncoderWeights = Annotated[
    str | None,
    typer.Option(
        help="Keep the encoder's linears in 8 bits: int8 or fp8.", show_default="the model's dtype", metavar="FORMAT"
    ),
]
CompileEncoder = Annotated[
    str | None,
    typer.Option(
        "--compile",
        help="Let torch compile the encoder's layers: default, reduce-overhead or max-autotune-no-cudagraphs.",
        show_default="not compiled",
        metavar="MODE",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(help=f"Compressor: {_METHODS}.", show_default="pool if the model has one, else select"),
]

Compressor = Annotated[
    str | None,
    typer.Option(
        help="Folder of a trained compressor, as 'condense train --out OUT' writes OUT/checkpoint.",
        show_default="the model folder's own",
        metavar="FOLDER",
    ),
]

Compressors = Annotated[
    list[str] | None,
    typer.Option(
        "--compressor",
        help="Folder of a trained compressor. May be repeated.",
        metavar="FOLDER",
        show_default=False,
    ),
]

Squad = Annotated[
    Path | None,
    typer.Option(
        help="Ask the questions of a file in SQuAD's JSON format, about contexts made of its paragraphs, not about "
        "facts inserted into a corpus.",
        metavar="FILE",
        show_default=False,
    ),
]

Threads = Annotated[int | None, typer.Option(help="Of the CPU.", min=1, show_default="one for each core")]
PlainLogs = Annotated[bool, typer.Option("--plain-logs", help="Logs for people instead of JSON.")]

Corpus = Annotated[
    str | None,
    typer.Option(help="Text: a folder, a text or .jsonl(.xz) file, or dataset:NAME.", show_default="built-in prose"),
]

TemplateArg = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg",
        help="A variable of the chat template, such as enable_thinking=false (JSON, or text); system_prompt=TEXT is a "
        "system message. May be repeated.",
        metavar="NAME=VALUE",
        show_default=False,
    ),
]

_RATIO_HELP = "Context tokens per soft token; select takes fractions, such as 2.5."
Ratio = Annotated[float, typer.Option(help=_RATIO_HELP, parser=_parse_ratio, metavar="NUMBER")]
OptionalRatio = Annotated[
    float | None,
    typer.Option(help=_RATIO_HELP, parser=_parse_ratio, metavar="NUMBER", show_default=str(DEFAULT_RATIO)),
]


def parse_ratios(text: str) -> tuple[Any, ...]:
    """``"2.5,4"`` as (2.5, 4), whose types the method checks; ``ValueError`` for what is no list of ratios."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"ratios: got {text!r}, expected numbers separated by commas, such as 4,8,16") from None
    return tuple(check_ratio(ratio) for ratio in found)


def parse_template_args(given: Sequence[str] | None) -> dict[str, Any]:
    """``["enable_thinking=false"]`` as ``{"enable_thinking": False}``: values are JSON, or else text.

    Raises:
        ValueError: one has no name, or a name is given twice.
    """
    found: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--template-arg: got {text!r}, expected NAME=VALUE, such as enable_thinking=false")
        if name in found:
            raise ValueError(f"--template-arg: got {name!r} twice, expected each name once")
        try:
            found[name] = value if name == "system_prompt" else json.loads(value)
        except ValueError:
            found[name] = value
    return found


def model_source(model: str | None) -> str | Path:
    """What ``--model`` names; by default the embedded model's folder."""
    return embedded_model_path() if model is None else model


def load_condenser(
    model: str | None,
    method: str | None,
    device: str | None,
    compressor: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    encoder_weights: str | None = None,
) -> Condenser:
    """The condenser that ``--model``, ``--method``, ``--compressor`` and ``--device`` name; a spinner while it loads.

    Raises:
        ValueError: one of them names nothing that can be loaded.
    """
    if method is not None and method not in COMPRESSION_METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {_METHODS}")
    check_dtype(dtype)
    if compressor is not None:
        check_compressor(compressor)
    source = model_source(model)
    with working("loading the model"):
        quiet_libraries()

        from condense_core.compressor.condenser import Condenser

        condenser = Condenser.from_pretrained(
            source,
            method=method,
            compressor=compressor,
            device=checked_device(device),
            dtype=parse_dtype(dtype),
            template_args=template_args,
            encoder_weights=encoder_weights,
        )
    if condenser.config.method in TRAINED_METHODS and not condenser.config.ratios:
        print(
            f"note: {condenser.config.method!r} is untrained for this model; 'select' needs no training",
            file=sys.stderr,
        )
    return condenser


def check_compressor(folder: str) -> None:
    """``ValueError`` unless ``folder`` holds a compressor checkpoint; the model is not loaded for a wrong path."""
    if (Path(folder) / CONFIG_NAME).is_file():
        return
    hint = f"; its checkpoint is {folder}/checkpoint" if (Path(folder) / "checkpoint" / CONFIG_NAME).is_file() else ""
    raise ValueError(
        f"compressor: no {CONFIG_NAME} in {folder!r}, expected the checkpoint folder that 'condense train' writes{hint}"
    )


def check_dtype(dtype: str | None) -> None:
    """``ValueError`` unless ``dtype`` is one that ``--dtype`` takes, or None."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")


def parse_dtype(dtype: str | None) -> torch.dtype | None:
    """What ``--dtype`` names."""
    check_dtype(dtype)
    if dtype is None:
        return None
    import torch

    found: torch.dtype = getattr(torch, dtype)
    return found


def load_model(
    model: str | None, device: str | None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The decoder that ``--model`` and ``--device`` name, and its tokenizer, with a spinner while they load."""
    source = model_source(model)
    with working("loading the model"):
        quiet_libraries()
        from condense_core.decoder.model import open_decoder

        return open_decoder(source, device=checked_device(device), dtype=dtype)


def quiet_libraries() -> None:
    """Keep advice of transformers and of the hub client off the terminal; what matters arrives as an exception."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def checked_device(name: str | None) -> str | None:
    """``name`` if a tensor can be put there; ``ValueError`` otherwise."""
    if name is None:
        return None
    import torch

    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("the meta device holds no values")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"device: cannot use {name!r} ({reason}); expected cpu, or a device 'condense doctor' lists"
        ) from None
    return name
