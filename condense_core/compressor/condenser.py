"""Text in, soft tokens out, answers from them: the pipeline around a compressor and an unmodified decoder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from condense_core.compressor.answers import answer_pieces, answers, split_prompt
from condense_core.compressor.choice import check_model, choose, open_encoder
from condense_core.compressor.compiled import check_mode
from condense_core.compressor.compressor import Compressor
from condense_core.compressor.quantized import check_weight_format, quantize_linears
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.compressor.tokenized import TokenizedText, check_questions, kept_text, tokenized_text
from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.generation import check_room, generation_options
from condense_core.decoder.identity import model_digest
from condense_core.decoder.model import open_decoder, public_model_id
from condense_core.decoder.partial import check_whole, release_layers, whole_depth
from condense_core.decoder.prompt import TemplateArgs, checked_template_args, encode_context

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
        template_args: TemplateArgs | None = None,
        encoder_weights: str | None = None,
        compile_encoder: str | None = None,
    ) -> None:
        """Wrap a live model.

        Args:
            method: ``pool``, ``mixed``, ``select``, ``mean`` or ``memory``; by default ``pool`` where the folder of the
                model has a checkpoint of it, or one ships for these weights, else ``select``.
            compressor: folder of a compressor checkpoint, or a live one (left as it is); by default the model
                folder's ``condense/<method>``, else the one that ships for these weights.
            encoder_layers: depth of an untrained compressor's encoder; by default three fifths of the layers for
                ``select``, 0 for the others. A checkpoint brings its own depth, and another one is an error.
            model_id: the name written into soft tokens; by default what the model folder's own checkpoint says, else
                the hub id or the folder's name.
            template_args: variables of the chat template for every prompt, such as ``{"enable_thinking": False}``;
                ``system_prompt`` is the text of a system message instead.
            encoder_weights: ``int8`` or ``fp8``: keep the linears of the encoder, not of the decoder, in 8 bits.
            compile_encoder: ``default``, ``reduce-overhead`` or ``max-autotune-no-cudagraphs``: let torch compile the
                encoder's layers, at their first use (docs/encoder.md); not with ``select``.
        """
        check_weight_format(encoder_weights)
        check_mode(compile_encoder)
        self.model, self.tokenizer = model, tokenizer
        self.template_args = checked_template_args(template_args)
        self.model_id = model_id or public_model_id(model.name_or_path)
        self.model_digest = model_digest(model)
        self.model_revision = str(getattr(model.config, "_commit_hash", None) or "")
        self._inner = decoder_parts(model)
        self.encoder_weights = encoder_weights
        if isinstance(compressor, Compressor):
            for name, given in (("encoder_weights", encoder_weights), ("compile_encoder", compile_encoder)):
                if given is not None:
                    raise ValueError(f"{name}: got {given!r} for a live compressor, which stays as it is")
            self.compressor, self.config = compressor, compressor.config
            check_model("the live one", self.config, model, self.model_id)
            return
        asked = (method, compressor, encoder_layers)
        self.config, folder = choose(model, *asked, self.model_id, self.model_revision)
        check_mode(compile_encoder, self.config.method)
        if folder is not None:
            if compressor is None and not model_id:
                self.model_id = self.config.model_id or self.model_id  # its own: the folder may have been renamed
            check_model(str(folder), self.config, model, self.model_id)
        self.compressor = Compressor(model, self.config)
        self.config = self.compressor.config
        if folder is not None:
            self.compressor.load_weights(folder)
        # Only what is the compressor's own: the other parameters are the caller's model, which stays as it came.
        for module in self.compressor.own_modules().values():
            module.to(device=self.device, dtype=self.dtype).requires_grad_(False)
        self.compressor.encoder.eval()
        if encoder_weights is not None:
            quantize_linears(self.compressor.encoder.layers, encoder_weights)
        if compile_encoder is not None:
            self.compressor.encoder.compile_layers(compile_encoder)

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
        template_args: TemplateArgs | None = None,
        encoder_only: bool = False,
        encoder_weights: str | None = None,
        compile_encoder: str | None = None,
    ) -> Condenser:
        """Load decoder, tokenizer and compressor from a local folder or a hub id.

        device: default ``cuda`` where there is one, else ``cpu``. dtype: default the checkpoint's own on a GPU and
        fp32 on the CPU. encoder_only: load the embeddings and the encoder's layers alone, which compress as the whole
        model does but neither generate nor select without a question (docs/encoder.md). ``ValueError`` for a folder
        that is missing or holds no model.
        """
        check_weight_format(encoder_weights)
        check_mode(compile_encoder)
        which: dict[str, Any] = {"method": method, "compressor": compressor, "encoder_layers": encoder_layers}
        where: dict[str, Any] = {"device": device, "dtype": dtype, "revision": revision}
        how: dict[str, Any] = which | {"template_args": template_args, "encoder_weights": encoder_weights}
        how["compile_encoder"] = compile_encoder
        if not encoder_only:
            return cls(*open_decoder(name_or_path, **where), **how)
        condenser = cls(*open_encoder(name_or_path, **which, **where), **how)
        if condenser.config.lora_rank or encoder_weights:  # the encoder has weights of its own
            release_layers(condenser.model)
        return condenser

    # -- compression ---------------------------------------------------------------------------------------------------

    @overload
    def compress(self, text: str, ratio: float = ..., *, question: str | None = ...) -> SoftTokens: ...
    @overload
    def compress(
        self, text: list[str] | tuple[str, ...], ratio: float = ..., *, question: Sequence[str | None] | None = ...
    ) -> list[SoftTokens]: ...
    def compress(
        self,
        text: str | list[str] | tuple[str, ...],
        ratio: float = DEFAULT_RATIO,
        *,
        question: str | Sequence[str | None] | None = None,
    ) -> SoftTokens | list[SoftTokens]:
        """Soft tokens of one text or of several (one packed batch, no padding).

        n tokens become exactly ceil(n / ratio); ``select`` and ``mixed`` take fractions, such as 2.5. A text beyond the
        encoder's positions is read in segments. ``ValueError`` for an empty text or question, a ratio above the text's
        tokens or one the checkpoint does not serve. question: what will be asked, for ``select`` only, which keeps what
        bears on it; a list with a list of texts, where None is no question. A text given several times is read once.
        """
        texts = [text] if isinstance(text, str) else list(text)
        several = not isinstance(text, str)
        ratio = self.check_ratio(ratio)
        questions = check_questions(question, len(texts), self.config.method, several=several)
        names = [f"text[{i}]" if len(texts) > 1 else "text" for i in range(len(texts))]
        tokenized = [
            self.tokenize(each, ratio, question=asked, name=name)
            for each, asked, name in zip(texts, questions, names, strict=True)
        ]
        soft = self.compress_tokenized(tokenized)
        return soft if several else soft[0]

    def tokenize(
        self,
        text: str,
        ratio: float | None = None,
        *,
        max_soft_tokens: int | None = None,
        question: str | None = None,
        name: str = "text",
    ) -> TokenizedText:
        """A text as ``compress_tokenized`` takes it; no model runs, so a server can do this for the next batch.

        Arguments and errors as of ``compress``, and: max_soft_tokens instead of the ratio, the most soft tokens that
        may come out, and the smallest ratio that keeps to it. name: what errors call the text.
        """
        if max_soft_tokens is not None and ratio is not None:
            raise ValueError("max_soft_tokens: got a ratio too; expected one of them")
        [question] = check_questions(question, 1, self.config.method, several=False)
        made = tokenized_text(self.tokenizer, text, self.config.method, question, self.template_args, name)
        if max_soft_tokens is not None:
            ratio = self.config.ratio_for(len(made.ids), max_soft_tokens)
        ratio = self.check_ratio(DEFAULT_RATIO if ratio is None else ratio)
        self.config.check_length(len(made.ids), ratio)
        return replace(made, ratio=ratio)

    @torch.no_grad()  # not inference_mode, whose tensors no later computation with gradients could use
    def compress_tokenized(self, texts: Sequence[TokenizedText]) -> list[SoftTokens]:
        """Soft tokens of texts that ``tokenize`` made, each with a ratio of its own, in one packed batch."""
        if not texts:
            return []
        ratios = [each.ratio for each in texts]
        if self.config.method == "select":
            chosen = self.compressor.select([each.passage for each in texts if each.passage is not None], ratios)
            kept = [indices.tolist() for indices in chosen]
            parts = [self._embed([each.ids[i] for i in own]) for each, own in zip(texts, kept, strict=True)]
            excerpts = [kept_text(each.text, each.offsets, own) for each, own in zip(texts, kept, strict=True)]
        else:
            sentences = [each.sentences for each in texts] if self.config.method == "mixed" else None
            parts = self.compressor.compress_pack([each.ids for each in texts], ratios, sentences)
            excerpts = [""] * len(texts)
        return [
            SoftTokens(
                embeds=part.clone(),
                num_context_tokens=len(each.ids),
                ratio=each.ratio,
                model_id=self.model_id,
                model_revision=self.model_revision,
                model_digest=self.model_digest,
                method=self.config.method,
                context_sha256=hashlib.sha256(each.text.encode()).hexdigest(),
                text=excerpt,
            )
            for part, each, excerpt in zip(parts, texts, excerpts, strict=True)
        ]

    def encode(self, text: str, name: str = "text") -> list[int]:
        """Token ids of a context, without special tokens; ``ValueError`` where there are none."""
        return encode_context(self.tokenizer, text, name)

    def check_ratio(self, ratio: float) -> float:
        """``ratio``, 4.0 as 4; ``TypeError`` or ``ValueError`` where it is none that this compressor serves."""
        return self.config.check_served(ratio)

    # -- use -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()  # not inference_mode, whose tensors no later computation with gradients could use
    def prepare(
        self,
        contexts: Context | Sequence[Context],
        prompt: str,
        *,
        max_new_tokens: int = 0,
        template_args: TemplateArgs | None = None,
    ) -> dict[str, Tensor]:
        """``inputs_embeds [1, N, d]`` and ``attention_mask [1, N]`` for plain ``model.generate(**inputs)``.

        Args:
            contexts: a text (full context), soft tokens, a sequence of either (several contexts in one prompt), or
                ``""``. Control tokens spelled out in a text or in the prompt are text.
            prompt: what stands behind the contexts.
            max_new_tokens: for how many new tokens the model must have positions left.
            template_args: variables of the chat template, beside those that the condenser has.

        Raises:
            ValueError: the model has too few positions, the template cannot be split around the contexts, or soft
                tokens are of another model.
        """
        parts = self.prompt_parts(contexts, prompt, max_new_tokens=max_new_tokens, template_args=template_args)
        embeds = self.embed_parts(parts)
        mask = torch.ones(1, len(embeds), dtype=torch.long, device=self.device)
        return {"inputs_embeds": embeds.unsqueeze(0), "attention_mask": mask}

    def prompt_parts(
        self,
        contexts: Context | Sequence[Context],
        prompt: str,
        *,
        max_new_tokens: int = 0,
        template_args: TemplateArgs | None = None,
    ) -> list[list[int] | Tensor]:
        """What ``prepare`` embeds, in order: token ids, and soft tokens ``[k, d]`` as they are.

        Arguments and errors as of ``prepare``.
        """
        args = self.template_args | checked_template_args(template_args)
        split = split_prompt(self.tokenizer, contexts, prompt, args)
        parts = [part if isinstance(part, list) else self.context_embeds(part) for part in split]
        remedy = "compress the context, or raise the ratio"
        check_room(self.model, sum(map(len, parts)), max_new_tokens, "prompt: {} with its context", remedy)
        return parts

    def embed_parts(self, parts: Sequence[list[int] | Tensor]) -> Tensor:
        """Embeddings ``[N, d]`` of ``prompt_parts``, or of some of them."""
        return torch.cat([part if isinstance(part, Tensor) else self._embed(part) for part in parts])

    def context_embeds(self, context: SoftTokens) -> Tensor:
        """Soft tokens ``[k, d]`` as the model reads them; ``SoftTokensError`` where they are another model's."""
        if not isinstance(context, SoftTokens):
            raise TypeError(f"contexts: got {type(context).__name__}, expected str or SoftTokens")
        context.check_model(self.model_id, self.config.d_model, self.model_digest)
        context.check_finite()
        return context.embeds.to(self.device, self.dtype)

    def generate(
        self,
        contexts: Context | Sequence[Context] | Sequence[Sequence[Context]],
        prompt: str | Sequence[str],
        *,
        max_new_tokens: int = 64,
        template_args: TemplateArgs | None = None,
        **options: Any,
    ) -> str | list[str]:
        """The model's answer to ``prompt`` about ``contexts``, which are as in ``prepare``.

        Decoding is greedy unless ``options`` say otherwise. A list of prompts is a batch: ``contexts`` is then one
        entry per prompt, or a single one for all. ``options`` go to ``model.generate``; ``ValueError`` for one that has
        no meaning where answers are text.
        """
        settings = generation_options(self.tokenizer, max_new_tokens, options)
        asked = [prompt] if isinstance(prompt, str) else list(prompt)
        entries: list[Any] = [contexts] * len(asked)
        if not isinstance(prompt, str) and not isinstance(contexts, str | SoftTokens):
            entries = list(contexts)
        if len(entries) != len(asked):
            raise ValueError(
                f"contexts: got {len(entries)} for {len(asked)} prompts; expected one each, or one for all"
            )
        check_whole(self.model, "generate")
        room = {"max_new_tokens": settings["max_new_tokens"], "template_args": template_args}
        prompts = [self.prepare(entry, question, **room) for entry, question in zip(entries, asked, strict=True)]
        found = answers(self.model, self.tokenizer, prompts, settings) if prompts else []
        return found[0] if isinstance(prompt, str) else found

    def stream(
        self,
        contexts: Context | Sequence[Context],
        prompt: str,
        *,
        max_new_tokens: int = 64,
        template_args: TemplateArgs | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """As ``generate`` for one prompt, piece by piece as they come; closing the iterator ends the generation."""
        check_whole(self.model, "stream")
        settings = generation_options(self.tokenizer, max_new_tokens, options, streaming=True)
        new = settings["max_new_tokens"]
        inputs = self.prepare(contexts, prompt, max_new_tokens=new, template_args=template_args)
        return answer_pieces(self.model, self.tokenizer, inputs, settings)

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
        return int(num_positions * whole_depth(self.model) * per_layer)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _embed(self, ids: list[int]) -> Tensor:
        embeds: Tensor = self._inner.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device))
        return embeds
