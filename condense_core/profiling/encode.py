"""``condense bench encode``: how fast contexts become soft tokens, on random weights of a given configuration."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from condense_core.compressor.compiled import check_mode
from condense_core.compressor.compressor import Compressor
from condense_core.compressor.config import MEMORY_SEGMENT, CompressorConfig, check_ratio, num_kept
from condense_core.decoder.architecture import cut_decoder, decoder_parts
from condense_core.profiling.cost import activation_bytes, encode_flops, layer_bytes, weight_bytes
from condense_core.profiling.machine import PeakMemory, copy_bandwidth, free_memory, matmul_peak, seconds_of
from condense_core.profiling.random_model import decoder_shape, random_first_layers
from condense_core.profiling.stages import STAGES, StageTimer

METHODS = ("pool", "mean", "memory")
"""Methods whose time does not depend on what a text says."""

MIXED_TEXTS = 16
MIXED_CHARS = (500, 7000)
_USABLE = 0.9  # of the free memory; the rest is for what is not counted

Row = dict[str, Any]


@dataclass(frozen=True)
class EncodeSettings:
    """What is measured: a row for each of ``layers`` and each of ``batches``.

    Attributes:
        layers: depths of the encoder.
        batches: contexts that are compressed at once; of no meaning with ``mixed``.
        chars, chars_per_token: the length of each context.
        ratio: context tokens per soft token.
        method: one of ``METHODS``.
        mixed: instead a batch of 16 contexts of 500 to 7,000 characters, the same in every run.
        baseline: also the same layers as transformers runs them on the padded batch.
        rounds: measurements of each row; packed and padded take turns.
        seed: of token ids and lengths.
        compile_encoder: one of ``compiled.MODES``: the layers compiled; the padded ones stay as they are.

    Raises:
        ValueError: a number is out of range; the message names it.
    """

    layers: tuple[int, ...]
    batches: tuple[int, ...] = (1,)
    chars: int = 7000
    chars_per_token: float = 4.0
    ratio: int = 4
    method: str = "pool"
    mixed: bool = False
    baseline: bool = False
    rounds: int = 5
    seed: int = 0
    compile_encoder: str | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "batches"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name}: got {list(getattr(self, name))}, expected integers of at least 1")
        for name in ("chars", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected an integer of at least 1")
        if not 0.1 <= self.chars_per_token <= 1000:
            raise ValueError(f"chars_per_token: got {self.chars_per_token}, expected a number from 0.1 to 1000")
        if self.method not in METHODS:
            raise ValueError(f"method: got {self.method!r}, expected one of {', '.join(METHODS)}")
        check_ratio(self.ratio, self.method)
        check_mode(self.compile_encoder)

    def lengths(self, batch: int) -> list[int]:
        """Tokens of each context of a batch."""
        if not self.mixed:
            return [self._tokens(self.chars)] * batch
        draw = random.Random(self.seed)
        return [self._tokens(draw.randint(*MIXED_CHARS)) for _ in range(MIXED_TEXTS)]

    def _tokens(self, chars: int) -> int:
        return max(1, round(chars / self.chars_per_token))

    def rows(self) -> list[tuple[int, int]]:
        """Layers and contexts of each row."""
        batches = (MIXED_TEXTS,) if self.mixed else self.batches
        return [(layers, batch) for layers in self.layers for batch in batches]


class EncodeBenchmark:
    """A measurement of ``config``'s encoders; nothing is allocated before ``rows`` is iterated over.

    Raises:
        ValueError: the config is of no decoder, or has fewer layers.
        TypeError: it is none that this project knows.
    """

    def __init__(
        self, config: Any, settings: EncodeSettings, *, name: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.settings, self.name, self.device, self.dtype = config, settings, name, device, dtype
        self._shape = decoder_shape(config, dtype)
        depth = len(decoder_parts(self._shape).layers)
        if max(settings.layers) > depth:
            raise ValueError(f"layers: got {max(settings.layers)}, expected 1 to {depth}, the layers of {name!r}")

    def facts(self) -> dict[str, Any]:
        """What every row has in common: the configuration, the machine, and the settings."""
        cuda = self.device.type == "cuda"
        return {
            "benchmark": "encode",
            "model": self.name,
            "hidden_size": int(self.config.hidden_size),
            "device": torch.cuda.get_device_name(self.device) if cuda else str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "settings": asdict(self.settings),
        }

    def rows(self) -> Iterator[Row]:
        """Each row as soon as it is measured; one that does not fit into memory has ``refused``, why not."""
        bandwidth, peak = copy_bandwidth(self.device), 0.0
        measured: _Measured | None = None
        for layers, batch in self.settings.rows():
            lengths = self.settings.lengths(batch)
            row: Row = {"layers": layers, "batch": batch, "tokens": sum(lengths)}
            if measured is None or measured.layers != layers:
                measured = None  # before another is made
            if reason := self._does_not_fit(layers, lengths, created=measured is not None):
                yield row | {"refused": reason}
                continue
            try:
                measured = measured or _Measured(self, layers)
                row |= measured.row(lengths, bandwidth, peak)
                peak = row["matmul_flops_per_second"]
                yield row
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                measured = None
                yield row | {"refused": f"{_name(layers, batch)}: out of memory"}

    def _does_not_fit(self, layers: int, lengths: Sequence[int], *, created: bool) -> str | None:
        free = free_memory(self.device)
        if free is None:
            return None
        held = max(sum(lengths), len(lengths) * max(lengths) if self.settings.baseline else 0)
        work = activation_bytes(self.config, held, self.dtype.itemsize)
        vocabulary = decoder_parts(self._shape).embed_tokens.weight.numel() * 4  # whose norm is computed in fp32
        need = work if created else layer_bytes(self._shape, layers) + max(work, vocabulary)
        if need <= _USABLE * free:
            return None
        return f"{_name(layers, len(lengths))}: needs about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


class _Measured:
    """An encoder of some layers with random weights, and the same layers as transformers runs them."""

    def __init__(self, benchmark: EncodeBenchmark, layers: int) -> None:
        self.layers, self.settings, self.device = layers, benchmark.settings, benchmark.device
        self.model = random_first_layers(benchmark.config, layers, device=self.device, dtype=benchmark.dtype)
        self.compressor = benchmark_compressor(self.model, layers, self.settings)
        if self.settings.compile_encoder is not None:
            self.compressor.encoder.compile_layers(self.settings.compile_encoder)
        self.padded = cut_decoder(self.model, layers, "sdpa")[0] if self.settings.baseline else None

    @torch.no_grad()
    def row(self, lengths: list[int], bandwidth: float, peak_before: float) -> Row:
        """What was measured of a batch of contexts of so many tokens.

        peak_before: the highest peak of matrix products that was measured until then.
        """
        contexts, ratio = self._contexts(lengths), self.settings.ratio

        def packed() -> None:
            self.compressor.compress_pack(contexts, [ratio] * len(contexts))

        padded = None if self.padded is None else padded_forward(self.padded, contexts, self.device)
        dtype = self.compressor.embed_tokens.weight.dtype
        total: list[float] = []
        stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
        others: list[float] = []
        with StageTimer(self.compressor, self.device) as timer:
            with PeakMemory(self.device) as peak:
                packed()
            if self.settings.compile_encoder is not None:  # a graph is recorded in the second run
                packed()
            with PeakMemory(self.device) as padded_peak:
                if padded is not None:
                    padded()
            peaks = [peak_before, matmul_peak(self.device, dtype)]
            for _ in range(self.settings.rounds):
                timer.take()
                total.append(seconds_of(packed, self.device))
                for stage, taken in timer.take().items():
                    stages[stage].append(taken)
                if padded is not None:
                    others.append(seconds_of(padded, self.device))
            peaks.append(matmul_peak(self.device, dtype))
        seconds = {name: _summary(times) for name, times in (("total", total), *stages.items())}
        row = self._shares(lengths, seconds["total"]["median"], max(peaks), bandwidth)
        layer = activation_bytes(self.model.config, sum(lengths), dtype.itemsize)
        row |= {"seconds": seconds, "peak_bytes": peak.bytes, "layer_activation_bytes": layer}
        if others:
            encode = statistics.median(map(sum, zip(stages["embed"], stages["encode"], strict=True)))
            middle = statistics.median(others)
            row["baseline"] = {
                "seconds": _summary(others),
                "padded_tokens": len(lengths) * max(lengths),
                "peak_bytes": padded_peak.bytes,
                "padded_over_packed": middle / encode,
                "padded_over_total": middle / seconds["total"]["median"],
            }
        return row

    def _shares(self, lengths: list[int], seconds: float, peak: float, bandwidth: float) -> Row:
        ends = self.compressor.offsets(lengths, self.settings.ratio)
        segments = [b - a for a, b in pairwise(ends)]
        flops = encode_flops(self.compressor, self.model.config, segments, self.settings.ratio)
        weights = weight_bytes(self.compressor)
        by_memory, by_compute = weights / bandwidth, (flops or 0) / peak
        floor = max(by_memory, by_compute)
        return {
            "soft_tokens": sum(num_kept(n, self.settings.ratio) for n in lengths),
            "contexts_per_second": len(lengths) / seconds,
            "tokens_per_second": sum(lengths) / seconds,
            "weight_bytes": weights,
            "flops": flops,
            "matmul_flops_per_second": peak,
            "copy_bytes_per_second": bandwidth,
            "floor": "compute" if by_compute >= by_memory else "memory",
            "floor_seconds": None if flops is None else floor,
            "share_of_floor": None if flops is None else floor / seconds,
        }

    def _contexts(self, lengths: list[int]) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.settings.seed)
        vocabulary = len(self.compressor.embed_tokens.weight)
        return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def benchmark_compressor(model: PreTrainedModel, layers: int, settings: EncodeSettings) -> Compressor:
    """As ``condense train`` makes one: a head for each query head, an MLP twice as wide as the embeddings."""
    width = decoder_parts(model).embed_tokens.weight.shape[1]
    config = CompressorConfig(
        method=settings.method,
        d_model=width,
        encoder_layers=layers,
        ratios=(settings.ratio,),
        num_heads=model.config.num_attention_heads if settings.method == "pool" else 1,
        mlp_hidden=2 * width,
        residual=settings.method != "memory",
        segment_tokens=MEMORY_SEGMENT if settings.method == "memory" else 0,
    )
    compressor = Compressor(model, config).eval()
    weight = decoder_parts(model).embed_tokens.weight
    for module in compressor.own_modules().values():
        module.to(device=weight.device, dtype=weight.dtype).requires_grad_(False)
    return compressor


def padded_forward(decoder: Any, contexts: list[list[int]], device: torch.device) -> Callable[[], Tensor]:
    """A forward pass over ``contexts`` as transformers makes it: padded on the right, no cache and no output head.

    decoder: of ``cut_decoder``, which attends by SDPA. What is returned gives hidden states ``[B, longest, d]``.
    """
    longest = max(map(len, contexts))
    ids = torch.tensor([context + [0] * (longest - len(context)) for context in contexts], device=device)
    mask = torch.tensor([[1] * len(context) + [0] * (longest - len(context)) for context in contexts], device=device)

    def forward() -> Tensor:
        hidden: Tensor = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden

    return forward


def _summary(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def _name(layers: int, batch: int) -> str:
    return f"{layers} layers x {batch} contexts"


def _is_out_of_memory(error: Exception) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "can't allocate memory" in str(error) or "not enough memory" in str(error)
