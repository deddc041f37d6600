"""What an engine is made from, as plain values: a command line or a file names them, and any process can make it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from condense_core.compressor.compiled import check_mode
from condense_core.decoder.embedded import embedded_model_path
from condense_core.serving.engine import EngineLimits
from condense_core.serving.served import ServedModel


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """A model, what is offered of it, and how much is taken on.

    Attributes:
        model: as ``ServedModel.load`` takes it; None: the embedded model, where it lies on the machine that loads it.
        methods, compressors, prunes, answers: as ``ServedModel.load`` takes them.
        device: a torch device; None: a GPU where there is one.
        dtype: the name of a torch dtype; None: the checkpoint's own on a GPU, float32 on a CPU.
        compile_encoder: as ``ServedModel.load`` takes it.
        threads: of the CPU; None: as many as torch takes.
        limits: of the engine.
    """

    model: str | None = None
    methods: tuple[str, ...] | None = None
    compressors: tuple[str, ...] = ()
    device: str | None = None
    dtype: str | None = None
    compile_encoder: str | None = None
    prunes: bool = True
    answers: bool = True
    threads: int | None = None
    limits: EngineLimits = field(default_factory=EngineLimits)

    def __post_init__(self) -> None:
        if self.dtype is not None and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype: got {self.dtype!r:.60}, expected one of torch's, such as bfloat16")
        check_mode(self.compile_encoder)
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise ValueError(f"threads: got {self.threads!r:.40}, expected an integer of at least 1")

    @property
    def source(self) -> str | Path:
        """What is loaded; ``FileNotFoundError`` where that is the embedded model and it is not here."""
        return embedded_model_path() if self.model is None else self.model

    def load(self) -> ServedModel:
        """The model in this process; ``ValueError`` as of ``ServedModel.load``."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return ServedModel.load(
            self.source,
            self.methods,
            device=self.device,
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
            compressors=self.compressors,
            compile_encoder=self.compile_encoder,
            prunes=self.prunes,
            answers=self.answers,
        )
