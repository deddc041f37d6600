"""What a compressor is: the architecture of a checkpoint, independent of its weights."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

COMPRESSION_METHODS = ("pool", "mixed", "select", "mean", "memory")
TRAINED_METHODS = ("pool", "mixed", "mean", "memory")
FRACTIONAL_METHODS = ("select", "mixed")
"""Methods that take a ratio such as 2.5. The others read windows of ``ratio`` tokens, so theirs is an integer."""
CONFIG_NAME = "compressor.json"
WEIGHTS_NAME = "compressor.safetensors"
FORMAT_VERSION = 1
MAX_RATIO = 1024
MEMORY_SEGMENT = 512  # tokens; the memory method reads its context in segments of this length, as ICAE does


@dataclass(frozen=True)
class CompressorConfig:
    """Architecture of a compressor.

    method: ``pool``, ``mixed``, ``select``, ``mean`` or ``memory``.
    d_model: width of the decoder's input embeddings; soft tokens have this width.
    encoder_layers: how many of the decoder's first layers read the context (0: its embeddings only).
    causal: whether the encoder's attention looks back only, as the decoder's does, or both ways.
    ratios: the ratios the checkpoint was trained on; empty for an untrained compressor, which takes any. ``mixed``
        serves others too, up to its window.
    num_heads: heads of ``attention_pool`` (``pool`` and ``mixed``); divides d_model.
    halo: tokens on either side of a window that its soft token may also attend to (``pool`` only).
    window_queries: whether queries are computed from window means on top of the static ones (``pool`` only).
    window: tokens that share a soft token where they are not kept exact (``mixed`` only).
    mlp_hidden: width of the projection's hidden layer; 0 for none.
    residual: whether a soft token is the sum of its tokens' embeddings, scaled to the norm of one, and what is learned
        on top of it, which is nothing at first; at ratio 1 an untrained compressor returns the embeddings themselves.
        Otherwise hidden states are projected, and soft tokens have the norm of embeddings. Not for ``memory``.
    segment_tokens: encoder segment length in tokens; 0 for the decoder's positions. Longer texts are cut here.
    lora_rank, lora_alpha: of the adapter beside the checkpoint; rank 0 for none.
    model_id, model_revision: the decoder the checkpoint was trained for.
    model_digest: digest of that decoder's weights, which decides (``decoder.identity``); "" where it is not known.
    """

    method: str
    d_model: int
    encoder_layers: int
    causal: bool = True
    ratios: tuple[float, ...] = ()
    num_heads: int = 1
    halo: int = 0
    window_queries: bool = False
    window: int = 0
    mlp_hidden: int = 0
    residual: bool = False
    segment_tokens: int = 0
    lora_rank: int = 0
    lora_alpha: float = 0.0
    model_id: str = ""
    model_revision: str = ""
    model_digest: str = ""

    def __post_init__(self) -> None:
        if self.method not in COMPRESSION_METHODS:
            raise ValueError(f"method: got {self.method!r}, expected one of {', '.join(COMPRESSION_METHODS)}")
        for name in ("d_model", "num_heads"):
            _check_int(name, getattr(self, name), 1)
        for name in ("encoder_layers", "halo", "window", "mlp_hidden", "segment_tokens", "lora_rank"):
            _check_int(name, getattr(self, name), 0)
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads: got {self.num_heads}, expected a divisor of d_model={self.d_model}")
        for ratio in self.ratios:
            self.check_ratio(ratio)
        if (self.method == "mixed") != bool(self.window) or self.window == 1:
            raise ValueError(f"window: got {self.window}, expected at least 2 for the method 'mixed', 0 for others")
        if self.method == "mixed" and (self.halo or self.window_queries or not self.residual):
            raise ValueError("halo, window_queries, residual: 'mixed' has only the last of them, and needs it")
        if self.residual and (self.method == "memory" or not self.mlp_hidden):
            raise ValueError("residual: expected a method that pools windows, and mlp_hidden of at least 1")
        if self.method == "memory" and not self.segment_tokens:
            raise ValueError("segment_tokens: got 0, expected at least 1 for the method 'memory'")

    def check_ratio(self, ratio: object) -> float:
        """``ratio``, 4.0 as 4; ``TypeError`` or ``ValueError`` where the method takes no such ratio."""
        checked = check_ratio(ratio, self.method)
        if self.window and checked > self.window:
            raise ValueError(
                f"ratio: got {ratio}, expected at most {self.window}, the window of this 'mixed' compressor"
            )
        return checked

    def check_served(self, ratio: object) -> float:
        """``ratio``, 4.0 as 4; ``TypeError`` or ``ValueError`` where it is none that such a compressor serves."""
        number = self.check_ratio(ratio)
        if self.ratios and number not in self.ratios and not self.window:
            served = ", ".join(map(str, self.ratios))
            raise ValueError(
                f"ratio: got {number}, expected one of {served}, which this {self.method!r} checkpoint serves"
            )
        return number

    def check_length(self, num_tokens: int, ratio: float) -> None:
        """``ValueError`` where a text has fewer tokens than ``ratio``."""
        if ratio <= num_tokens:
            return
        served = [r for r in self.ratios if r <= num_tokens]
        expected = f"one of {', '.join(map(str, served))}" if served else f"1 to {num_tokens}"
        if self.ratios and not served:
            expected = f"a text of at least {min(self.ratios)} tokens, or the method 'select'"
        raise ValueError(f"ratio: got {ratio}, more than the text's {num_tokens} tokens; expected {expected}")

    def ratio_for(self, num_tokens: int, max_soft_tokens: int) -> float:
        """The smallest ratio that this compressor serves at which a text becomes at most so many soft tokens.

        ``select`` and ``mixed`` take fractions, so that ``select`` gives exactly that many of a longer text.
        ``ValueError`` where no ratio gives so few.
        """
        _check_int("max_soft_tokens", max_soft_tokens, 1)
        if num_tokens <= max_soft_tokens and (not self.ratios or self.method == "mixed"):
            return 1
        if self.method in FRACTIONAL_METHODS:
            # Rounded up, since a ratio is what its decimals say; `mixed` cuts long texts at multiples of it.
            places = 10**6 if self.method == "select" else 10**2
            least: float = math.ceil(Fraction(num_tokens, max_soft_tokens) * places) / places
            fitting = [least] if least <= (self.window or MAX_RATIO) else []
        else:
            served = self.ratios or range(1, min(num_tokens, MAX_RATIO) + 1)
            fitting = sorted(r for r in served if num_kept(num_tokens, r) <= max_soft_tokens and r <= num_tokens)
        if not fitting:
            most = self.window or max(self.ratios, default=MAX_RATIO)
            raise ValueError(
                f"max_soft_tokens: got {max_soft_tokens} for a text of {num_tokens:,} tokens, expected at least "
                f"{num_kept(num_tokens, most):,}, since this {self.method!r} compressor goes up to {most}x"
            )
        return fitting[0]

    def save(self, folder: Path) -> None:
        data = {"format_version": FORMAT_VERSION, **asdict(self)}
        (folder / CONFIG_NAME).write_text(json.dumps(data, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> CompressorConfig:
        """Read ``folder/compressor.json``; ``ValueError`` where it is missing, foreign or of another version."""
        path = folder / CONFIG_NAME
        try:
            data: dict[str, Any] = json.loads(path.read_text())
            version = data.pop("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"format_version {version}, this release reads {FORMAT_VERSION}")
            if unknown := set(data) - {f.name for f in fields(cls)}:
                raise ValueError(f"unknown entries {', '.join(sorted(unknown))}")
            return cls(**{**data, "ratios": tuple(data["ratios"])})
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{folder}: no {CONFIG_NAME} here; expected a compressor checkpoint folder") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a compressor config ({error})") from error


def _check_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: got {value!r}, expected an integer of at least {least}")


def check_ratio(ratio: object, method: str | None = None) -> float:
    """A compression ratio in [1, MAX_RATIO]: an int, or a float that is none; 4.0 comes back as 4.

    method: which one is to take the ratio; None: any.

    Raises:
        TypeError: ``ratio`` is no number.
        ValueError: it is out of range, or a fraction for a method that takes none.
    """
    whole = method is not None and method not in FRACTIONAL_METHODS
    expected = f"expected {'an integer' if whole else 'a number'} from 1 to {MAX_RATIO}"
    if not isinstance(ratio, int | float) or isinstance(ratio, bool):
        raise TypeError(f"ratio: got {ratio!r} ({type(ratio).__name__}), {expected}")
    if not 1 <= ratio <= MAX_RATIO:  # NaN is in no range
        raise ValueError(f"ratio: got {ratio}, {expected}")
    if ratio == int(ratio):
        return int(ratio)
    if whole:
        raise ValueError(f"ratio: got {ratio}, {expected} for the method {method!r}")
    return float(ratio)


def exact_ratio(ratio: float) -> Fraction:
    """``ratio`` as its decimals say: 3.3 is 33/10, not the binary number next to it."""
    return Fraction(repr(float(ratio))) if isinstance(ratio, float) else Fraction(ratio)


def num_kept(num_tokens: int, ratio: float) -> int:
    """ceil(num_tokens / ratio), exactly: how many soft tokens ``num_tokens`` tokens become."""
    return math.ceil(num_tokens / exact_ratio(ratio))
