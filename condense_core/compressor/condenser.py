"""Text in, soft tokens out, answers from them: the pipeline around a compressor and an unmodified decoder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.config import (
    COMPRESSION_METHODS,
    MEMORY_SEGMENT,
    TRAINED_METHODS,
    CompressorConfig,
    check_ratio,
)
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.generation import generation_options, streamed
from condense_core.decoder.identity import mismatch, model_digest
from condense_core.decoder.model import open_decoder, public_model_id
from condense_core.decoder.prompt import SEPARATOR, check_text, encode_context, render, split_prompt

Context = str | SoftTokens
DEFAULT_RATIO = 4


class Condenser:
    """Compresses contexts for ``model`` and generates from them with the same, unmodified model.

    >>> condenser = Condenser.from_pretrained("models/condense-tiny")
    >>> soft = condenser.compress(text, ratio=4)
    >>> condenser.generate(soft, "Who is the keeper of the north archive?")
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        method: str | None = None,
        compressor: str | Path | Compressor | None = None,
        encoder_layers: int | None = None,
        model_id: str | None = None,
    ) -> None:
        """Wrap a live model.

        Args:
            method: ``pool``, ``select``, ``mean`` or ``memory``; by default ``pool`` where the model's folder has a
                checkpoint of it, else ``select``.
            compressor: folder of a compressor checkpoint, or a live one (left as it is); by default the model
                folder's ``condense/<method>``.
            encoder_layers: depth of an untrained compressor's encoder; by default half of the layers for ``select``,
                0 for the others. A checkpoint brings its own depth, and another one is an error.
            model_id: the name written into soft tokens; by default what the model folder's own checkpoint says, else
                the hub id or the folder's name.
        """
        self.model, self.tokenizer = model, tokenizer
        self.model_id = model_id or public_model_id(model.name_or_path)
        self.model_digest = model_digest(model)
        self.model_revision = str(getattr(model.config, "_commit_hash", None) or "")
        self._inner = decoder_parts(model)
        if isinstance(compressor, Compressor):
            self.compressor, self.config = compressor, compressor.config
            self._check_model("the live one")
            return
        folder = self._find_checkpoint(method, compressor)
        if folder is None:
            self.config = self._untrained(method or "select", encoder_layers)
            self.compressor = Compressor(model, self.config)
            self.config = self.compressor.config
        else:
            self.config = CompressorConfig.load(folder)
            if compressor is None and not model_id:
                self.model_id = self.config.model_id or self.model_id  # its own: the folder may have been renamed
            self._check_config(folder, method, encoder_layers)
            self.compressor = Compressor(model, self.config)
            self.config = self.compressor.config
            self.compressor.load_weights(folder)
        # Only what is the compressor's own: the other parameters are the caller's model, which stays as it came.
        for module in self.compressor.own_modules().values():
            module.to(device=self.device, dtype=self.dtype).requires_grad_(False)
        self.compressor.encoder.eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        method: str | None = None,
        compressor: str | Path | None = None,
        encoder_layers: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> Condenser:
        """Load decoder, tokenizer and compressor from a local folder or a hub id.

        device: default ``cuda`` where there is one, else ``cpu``. dtype: default the checkpoint's own on a GPU and
        fp32 on the CPU. ``ValueError`` for a folder that is missing or holds no model.
        """
        model, tokenizer = open_decoder(name_or_path, device=device, dtype=dtype, revision=revision)
        return cls(
            model,
            tokenizer,
            method=method,
            compressor=compressor,
            encoder_layers=encoder_layers,
        )

    # -- compression ---------------------------------------------------------------------------------------------------

    @overload
    def compress(self, text: str, ratio: int = ...) -> SoftTokens: ...
    @overload
    def compress(self, text: list[str] | tuple[str, ...], ratio: int = ...) -> list[SoftTokens]: ...
    @torch.no_grad()  # not inference_mode, whose tensors no later computation with gradients could use
    def compress(
        self, text: str | list[str] | tuple[str, ...], ratio: int = DEFAULT_RATIO
    ) -> SoftTokens | list[SoftTokens]:
        """Soft tokens of one text or of several (one packed batch, no padding).

        n tokens become exactly ceil(n / ratio) soft tokens. A text beyond the encoder's positions is read in
        segments, never cut. ``ValueError`` for an empty text, a ratio above the text's tokens or one the checkpoint
        does not serve.
        """
        texts = [text] if isinstance(text, str) else list(text)
        self.check_ratio(ratio)
        contexts = [self.encode(t, f"text[{i}]" if len(texts) > 1 else "text") for i, t in enumerate(texts)]
        if not contexts:
            return []
        for ids in contexts:
            if ratio > len(ids):
                served = [r for r in self.config.ratios if r <= len(ids)]
                expected = f"one of {', '.join(map(str, served))}" if served else f"1 to {len(ids)}"
                if self.config.ratios and not served:
                    expected = f"a text of at least {min(self.config.ratios)} tokens, or the method 'select'"
                raise ValueError(f"ratio: got {ratio}, more than the text's {len(ids)} tokens; expected {expected}")
        ends = self.compressor.offsets([len(ids) for ids in contexts], ratio)
        pack = torch.tensor([i for ids in contexts for i in ids], dtype=torch.long, device=self.device)
        parts = self.compressor(pack, ends, ratio).split([-(-len(ids) // ratio) for ids in contexts])
        soft = [
            SoftTokens(
                embeds=part.clone(),
                num_context_tokens=len(ids),
                ratio=ratio,
                model_id=self.model_id,
                model_revision=self.model_revision,
                model_digest=self.model_digest,
                method=self.config.method,
                context_sha256=hashlib.sha256(t.encode()).hexdigest(),
            )
            for part, ids, t in zip(parts, contexts, texts, strict=True)
        ]
        return soft[0] if isinstance(text, str) else soft

    def encode(self, text: str, name: str = "text") -> list[int]:
        """Token ids of a context, without special tokens; ``ValueError`` where there are none."""
        return encode_context(self.tokenizer, text, name)

    def check_ratio(self, ratio: int) -> None:
        """Raise where ``ratio`` is no ratio, or none that this compressor serves."""
        check_ratio(ratio)
        if self.config.ratios and ratio not in self.config.ratios:
            served = ", ".join(map(str, self.config.ratios))
            raise ValueError(
                f"ratio: got {ratio}, expected one of {served}, which this {self.config.method!r} checkpoint serves"
            )

    # -- use -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()  # not inference_mode, whose tensors no later computation with gradients could use
    def prepare(self, contexts: Context | Sequence[Context], prompt: str) -> dict[str, Tensor]:
        """``inputs_embeds [1, N, d]`` and ``attention_mask [1, N]`` for plain ``model.generate(**inputs)``.

        contexts: a text (full context), soft tokens, a sequence of either (several contexts in one prompt), or ``""``.
        """
        given = [contexts] if isinstance(contexts, str | SoftTokens) else list(contexts)
        texts = [c for c in given if isinstance(c, str) and c]
        for name, text in (("prompt", prompt), *(("context", t) for t in texts)):
            check_text(text, name)
        # A template is rendered around plain texts as a whole, unless one of them spells out a token that would act.
        control = self.tokenizer.all_special_tokens
        if len(texts) == sum(c != "" for c in given) and not any(token in t for token in control for t in texts):
            text = render(self.tokenizer, SEPARATOR.join([*texts, prompt]))
            embeds = self._embed(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        else:
            around = [self._embed(ids) for ids in split_prompt(self.tokenizer, len(given), prompt)]
            parts = [around[0]]
            for context, following in zip(given, around[1:], strict=True):
                parts += [self._context_embeds(context), following]
            embeds = torch.cat(parts)
        if len(embeds) > self.max_positions:
            raise ValueError(
                f"prompt: {len(embeds)} positions with its context, the model has {self.max_positions}; "
                "compress the context, or raise the ratio"
            )
        mask = torch.ones(1, len(embeds), dtype=torch.long, device=self.device)
        return {"inputs_embeds": embeds.unsqueeze(0), "attention_mask": mask}

    def generate(
        self,
        contexts: Context | Sequence[Context] | Sequence[Sequence[Context]],
        prompt: str | Sequence[str],
        *,
        max_new_tokens: int = 64,
        **options: Any,
    ) -> str | list[str]:
        """The model's answer to ``prompt`` about ``contexts`` (as in ``prepare``); greedy unless ``options`` say
        otherwise.

        A list of prompts is a batch: ``contexts`` is then one entry per prompt, or a single one for all. ``options``
        go to ``model.generate``.
        """
        if isinstance(prompt, str):
            return self._generate([contexts], [prompt], max_new_tokens, options)[0]
        entries: list[Any] = [contexts] * len(prompt) if isinstance(contexts, str | SoftTokens) else [*contexts]
        return self._generate(entries, list(prompt), max_new_tokens, options)

    def _generate(
        self, entries: list[Any], prompt: list[str], max_new_tokens: int, options: dict[str, Any]
    ) -> list[str]:
        if len(entries) != len(prompt):
            raise ValueError(
                f"contexts: got {len(entries)} for {len(prompt)} prompts; expected one each, or one for all"
            )
        if not prompt:
            return []
        inputs = _left_pad([self.prepare(entry, question) for entry, question in zip(entries, prompt, strict=True)])
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, **self._options(max_new_tokens, options))
        return [t.strip() for t in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def stream(
        self, contexts: Context | Sequence[Context], prompt: str, *, max_new_tokens: int = 64, **options: Any
    ) -> Iterator[str]:
        """As ``generate`` for one prompt, piece by piece as they come; closing the iterator ends the generation."""
        inputs = self.prepare(contexts, prompt)
        settings = self._options(max_new_tokens, options)

        def generate(**more: Any) -> None:
            with torch.inference_mode():
                self.model.generate(**inputs, **settings, **more)

        yield from streamed(generate, self.tokenizer, settings.pop("stopping_criteria", ()))

    # -- facts ---------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self._inner.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._inner.embed_tokens.weight.dtype

    @property
    def max_positions(self) -> int:
        return int(self.model.config.max_position_embeddings)

    def kv_bytes(self, num_positions: int) -> int:
        """Bytes of the decoder's KV cache for ``num_positions`` positions in the model's dtype."""
        config = self.model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_layer = 2 * config.num_key_value_heads * head_dim * self.dtype.itemsize
        return int(num_positions * config.num_hidden_layers * per_layer)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _embed(self, ids: list[int]) -> Tensor:
        embeds: Tensor = self._inner.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device))
        return embeds

    def _context_embeds(self, context: Context) -> Tensor:
        if isinstance(context, str):
            return self._embed(self.encode(context, "context"))
        if not isinstance(context, SoftTokens):
            raise TypeError(f"contexts: got {type(context).__name__}, expected str or SoftTokens")
        context.check_model(self.model_id, self.config.d_model, self.model_digest)
        context.check_finite()
        return context.embeds.to(self.device, self.dtype)

    def _options(self, max_new_tokens: int, options: dict[str, Any]) -> dict[str, Any]:
        return generation_options(self.tokenizer, max_new_tokens, options)

    def _find_checkpoint(self, method: str | None, compressor: str | Path | None) -> Path | None:
        if method is not None and method not in COMPRESSION_METHODS:
            raise ValueError(f"method: got {method!r}, expected one of {', '.join(COMPRESSION_METHODS)}")
        if compressor is not None:
            return Path(compressor)
        beside = Path(self.model.name_or_path) / "condense" / (method or "pool")
        return beside if self.model.name_or_path and beside.is_dir() else None

    def _untrained(self, method: str, encoder_layers: int | None) -> CompressorConfig:
        depth = len(self._inner.layers)
        if encoder_layers is None:
            encoder_layers = max(1, depth // 2) if method == "select" else 0
        return CompressorConfig(
            method=method,
            d_model=self._inner.embed_tokens.weight.shape[1],
            encoder_layers=encoder_layers,
            num_heads=self.model.config.num_attention_heads if method == "pool" else 1,
            segment_tokens=MEMORY_SEGMENT if method == "memory" else 0,
            model_id=self.model_id,
            model_revision=self.model_revision,
        )

    def _check_config(self, folder: Path, method: str | None, encoder_layers: int | None) -> None:
        config = self.config
        if method is not None and config.method != method:
            raise ValueError(f"method: got {method!r}, the checkpoint {folder} is {config.method!r}")
        if encoder_layers is not None and encoder_layers != config.encoder_layers:
            raise ValueError(
                f"encoder_layers: got {encoder_layers}, the checkpoint {folder} was trained with"
                f" {config.encoder_layers}"
            )
        self._check_model(str(folder))

    def _check_model(self, what: str) -> None:
        """``ValueError`` where the compressor was trained for another model; ``select`` learns nothing of one."""
        config = self.config
        if config.method not in TRAINED_METHODS or not (config.model_id or config.model_digest):
            return
        if reason := mismatch(config.model_id, config.model_digest, self.model_id, self.model_digest):
            raise ValueError(f"compressor: {what} was {reason.replace('made by', 'trained for', 1)}")


def _left_pad(prompts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack prompts of different lengths; padding stands on the left, where generation does not see it."""
    width = max(p["attention_mask"].shape[1] for p in prompts)

    def pad(tensor: Tensor) -> Tensor:
        missing = width - tensor.shape[1]
        shape = (1, missing, *tensor.shape[2:])
        return torch.cat([tensor.new_zeros(shape), tensor], 1)

    return {key: torch.cat([pad(p[key]) for p in prompts]) for key in prompts[0]}
