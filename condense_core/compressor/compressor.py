"""The trainable part of a compressor: packed token ids in, soft tokens out. Weights, but no text and no tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from condense_core.compressor import lora
from condense_core.compressor.config import WEIGHTS_NAME, CompressorConfig, exact_ratio, num_kept
from condense_core.compressor.encoder import Encoder
from condense_core.compressor.mixing import mix
from condense_core.compressor.pooler import MemoryTokens, Projection, ResidualProjection, TokenScorer, WindowPooler
from condense_core.compressor.selection import RUN, Passage, Selector, keep_sentences
from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.identity import model_digest
from condense_core.files.tensors import save_tensors


class Compressor(nn.Module):
    """``method`` of ``config`` over the first layers of ``model``, whose parameters it shares."""

    def __init__(self, model: PreTrainedModel, config: CompressorConfig) -> None:
        super().__init__()
        embed = decoder_parts(model).embed_tokens
        if embed.weight.shape[1] != config.d_model:
            raise ValueError(f"d_model: the compressor has {config.d_model}, the model {embed.weight.shape[1]}")
        # What a checkpoint of it is for, unless one says so already.
        self.config = config if config.model_digest else replace(config, model_digest=model_digest(model))
        self.embed_tokens = embed
        self.max_positions = int(model.config.max_position_embeddings)
        self.encoder = Encoder(model, config.encoder_layers, causal=config.causal)
        self._model = (model,)  # in a tuple, where torch does not see it: its parameters are not the compressor's
        self._selector: Selector | None = None
        # A meta model (shape checks of a 7B without its memory) has no norm to measure; any will do.
        norm = 1.0 if embed.weight.is_meta else embedding_norm(embed)
        trained = config.method != "select"
        self.pooler = WindowPooler(config) if config.method in ("pool", "mean", "mixed") else None
        self.memory = MemoryTokens(config, norm) if config.method == "memory" else None
        self.scorer = TokenScorer(config.d_model) if config.method == "mixed" else None
        project = ResidualProjection if config.residual else Projection
        self.projection = project(config.d_model, config.mlp_hidden, norm) if trained else None

    def own_modules(self) -> dict[str, nn.Module]:
        """The modules whose weights belong to the compressor, not to the decoder (adapters aside)."""
        modules = {
            "pooler": self.pooler,
            "memory": self.memory,
            "scorer": self.scorer,
            "projection": self.projection,
        }
        return {name: module for name, module in modules.items() if module is not None}

    def attach_lora(self) -> None:
        """Make the encoder's linears trainable through an adapter, as ``config`` says."""
        if self.config.lora_rank:
            lora.attach(self.encoder.layers, self.config.lora_rank, self.config.lora_alpha)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Own weights and attached adapters; the decoder's parameters are not among them."""
        own = [p for module in self.own_modules().values() for p in module.parameters() if p.requires_grad]
        adapters = [m for m in self.encoder.modules() if isinstance(m, lora.LoRALinear)]
        return own + [p for m in adapters for p in (m.lora_A, m.lora_B)]

    def offsets(self, lengths: list[int], ratio: float) -> list[int]:
        """Offsets ``[0, ..., T]`` of the segments that packed texts of ``lengths`` tokens are read in.

        A text beyond the encoder's positions becomes several segments, all but its last a multiple of ``ratio`` long,
        so that n tokens give ceil(n / ratio) soft tokens however they are cut. ``ValueError`` where a ratio has so many
        decimals that no integer up to the encoder's positions is a multiple of it.
        """
        limit = self.config.segment_tokens or self.max_positions
        if self.memory is not None:
            limit = int(self.max_positions * ratio // (ratio + 1))  # its slots take positions too
            limit = min(limit, self.config.segment_tokens or limit)
        unit = exact_ratio(ratio).numerator  # the smallest integer that is a multiple of it
        if unit > limit and unit != ratio and max(lengths, default=0) > limit:
            raise ValueError(f"ratio: got {ratio} for a text of {max(lengths):,} tokens, expected fewer decimals")
        segment = max(unit, limit // unit * unit)
        ends = [0]
        for length in lengths:
            start = ends[-1]
            ends += [start + min(at + segment, length) for at in range(0, length, segment)]
        return ends

    def forward(
        self, input_ids: Tensor, cu_seqlens: list[int], ratio: float, sentences: list[int] | None = None
    ) -> Tensor:
        """Soft tokens ``[K, d_model]`` of the packed ``input_ids [T]``; sequence s gives ceil(n_s / ratio) of them.

        Args:
            input_ids: of one text behind the other.
            cu_seqlens: what ``offsets`` gives.
            ratio: tokens per soft token.
            sentences: for each token the number of its sentence, ascending without gaps in each text, for ``mixed``;
                None: runs of tokens stand for sentences.
        """
        if self.config.method == "select":
            ids = input_ids.tolist()
            passages = [Passage(ids[a:b], [i // RUN for i in range(b - a)]) for a, b in pairwise(cu_seqlens)]
            kept = self.select(passages, [ratio] * len(passages))
            embeds, starts = self.embed_tokens(input_ids), cu_seqlens[:-1]
            return embeds[torch.cat([start + i for start, i in zip(starts, kept, strict=True)]).to(embeds.device)]
        if self.memory is not None:
            assert isinstance(ratio, int), f"ratio {ratio} for {self.config.method}"
            embeds = self.embed_tokens(input_ids)
            slotted, ends, rows = self.memory.append(embeds, cu_seqlens, ratio)
            return self._project(self.memory.read(self.encoder(slotted, ends)[0], rows), embeds, cu_seqlens, ratio)
        return self._reduce(*self._read(input_ids, [cu_seqlens]), cu_seqlens, ratio, sentences)[0]

    @property
    def selector(self) -> Selector:
        """What scores tokens for ``select``; ``ValueError`` for an encoder without layers."""
        if self._selector is None:
            self._selector = Selector(self._model[0], self.encoder, self.config.segment_tokens or self.max_positions)
        return self._selector

    def select(self, passages: list[Passage], ratios: Sequence[float]) -> list[Tensor]:
        """For each passage of n tokens the ascending indices of the ceil(n / ratio) that ``select`` keeps, on the CPU.

        ``ValueError`` for an encoder without layers, or a question too long to be read with a text.
        """
        return [
            keep_sentences(scores, torch.tensor(passage.sentences, dtype=torch.long), num_kept(len(scores), ratio))
            for passage, scores, ratio in zip(passages, self.selector.scores(passages), ratios, strict=True)
        ]

    def compress_pack(
        self, contexts: Sequence[list[int]], ratios: Sequence[float], sentences: Sequence[list[int]] | None = None
    ) -> list[Tensor]:
        """Soft tokens ``[ceil(n / ratio), d_model]`` of each of several texts of n token ids, read in one pack.

        ratios: one for each text. ``memory`` reads texts of one ratio in a pack of their own, since its slots are a
        part of it. sentences: of each text, as ``forward`` takes them.
        """
        device = self.embed_tokens.weight.device
        groups: dict[float, list[int]] = {}
        for i, ratio in enumerate(ratios):
            groups.setdefault(ratio, []).append(i)
        ends = {ratio: self.offsets([len(contexts[i]) for i in group], ratio) for ratio, group in groups.items()}
        order = [i for group in groups.values() for i in group]  # texts of one ratio stand side by side
        ids = torch.tensor([t for i in order for t in contexts[i]], dtype=torch.long, device=device)
        numbers = None if sentences is None else [n for i in order for n in sentences[i]]
        found: dict[int, Tensor] = {}
        start = 0
        shared = None if self.memory is not None or self.config.method == "select" else self._read(ids, ends.values())
        for ratio, group in groups.items():
            stop = start + ends[ratio][-1]
            own = None if numbers is None else numbers[start:stop]
            if shared is None:
                soft = self(ids[start:stop], ends[ratio], ratio, own)
            else:
                soft = self._reduce(shared[0][start:stop], shared[1][start:stop], ends[ratio], ratio, own)[0]
            found |= zip(group, soft.split([num_kept(len(contexts[i]), ratio) for i in group]), strict=True)
            start = stop
        return [found[i] for i in range(len(contexts))]

    def _read(self, input_ids: Tensor, offsets: Iterable[list[int]]) -> tuple[Tensor, Tensor]:
        """Hidden states and embeddings ``[T, d]`` of a pack of packs, each with its own offsets."""
        ends = [0]
        for own in offsets:
            ends += [ends[-1] + end for end in own[1:]]
        embeds = self.embed_tokens(input_ids)
        return self.encoder(embeds, ends)[0], embeds

    def mixed(
        self, input_ids: Tensor, cu_seqlens: list[int], ratio: float, sentences: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``forward``, for the method ``mixed``; and the scores ``[T]`` by which it kept tokens exact."""
        soft, scores = self._reduce(*self._read(input_ids, [cu_seqlens]), cu_seqlens, ratio, sentences)
        assert scores is not None
        return soft, scores

    def _reduce(
        self, hidden: Tensor, embeds: Tensor, cu_seqlens: list[int], ratio: float, sentences: list[int] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Soft tokens of what was read, and for ``mixed`` the scores of its tokens."""
        assert self.pooler is not None
        assert self.projection is not None
        if self.scorer is None:
            assert isinstance(ratio, int), f"ratio {ratio} for {self.config.method}"
            # On the host, where ops checks them; None for one sequence, so that shapes alone decide (meta tensors).
            offsets = torch.tensor(cu_seqlens) if len(cu_seqlens) > 2 else None
            return self._project(self.pooler(hidden, offsets, ratio), embeds, cu_seqlens, ratio), None
        window = self.config.window
        scores = self.scorer(hidden.detach())
        made = mix(scores, cu_seqlens, ratio, window, sentences)
        exact, pooled = made.exact.to(embeds.device), made.pooled.to(embeds.device)
        rows = embeds[exact]
        if len(pooled):
            soft = self.pooler(hidden[pooled], torch.tensor(made.cu_seqlens), window)
            rows = torch.cat([rows, self._project(soft, embeds[pooled], made.cu_seqlens, window)])
        return rows[made.order.to(embeds.device)], scores

    def _project(self, pooled: Tensor, embeds: Tensor, cu_seqlens: list[int], ratio: int) -> Tensor:
        """Pooled rows ``[K, d]`` as soft tokens; embeds, cu_seqlens: what they were pooled from."""
        assert self.projection is not None
        if not isinstance(self.projection, ResidualProjection):
            return self.projection(pooled).to(embeds.dtype)
        return self.projection(pooled, embeds, window_lengths(cu_seqlens, ratio, embeds.device)).to(embeds.dtype)

    def start_from(self, folder: Path) -> None:
        """Begin with the weights of another checkpoint, of any method, as far as there are such with the same names.

        Its adapter is taken over as one, to be trained on: ``attach_lora`` goes first.

        Raises:
            ValueError: there is no checkpoint, it has another width or depth, or a weight or adapter of another shape.
        """
        other = CompressorConfig.load(folder)
        for name in ("d_model", "encoder_layers", "mlp_hidden", "residual", "lora_rank", "lora_alpha"):
            if getattr(other, name) != getattr(self.config, name):
                expected = getattr(self.config, name)
                raise ValueError(f"{name}: the checkpoint {folder} has {getattr(other, name)}, expected {expected}")
        tensors = load_file(folder / WEIGHTS_NAME)
        for prefix, module in self.own_modules().items():
            state = module.state_dict()
            own = {k: v for k in state if (v := tensors.get(f"{prefix}.{k}")) is not None}
            if wrong := [k for k, v in own.items() if v.shape != state[k].shape]:
                raise ValueError(f"{folder}: {prefix}.{wrong[0]} is {list(own[wrong[0]].shape)}, another shape")
            module.load_state_dict(state | own)
        if other.lora_rank:
            lora.load(self.encoder.layers, folder)

    def save(self, folder: Path) -> None:
        """Write config, own weights (bf16, scalars fp32) and, where attached, the adapter in peft's format."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{prefix}.{name}": t.detach().to(torch.bfloat16 if t.dim() else torch.float32).contiguous()
            for prefix, module in self.own_modules().items()
            for name, t in module.state_dict().items()
        }
        save_tensors(tensors, folder / WEIGHTS_NAME)
        self.config.save(folder)
        if self.config.lora_rank:
            rank, alpha = self.config.lora_rank, self.config.lora_alpha
            lora.save(self.encoder.layers, folder, rank=rank, alpha=alpha, base_model=self.config.model_id)

    def load_weights(self, folder: Path) -> None:
        """Read what ``save`` wrote and merge the adapter; ``ValueError`` where it does not fit."""
        path = folder / WEIGHTS_NAME
        try:
            tensors = load_file(path)
            for prefix, module in self.own_modules().items():
                own = {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
                module.load_state_dict(own)
        except FileNotFoundError:
            raise ValueError(f"{folder}: no {WEIGHTS_NAME} here; expected a compressor checkpoint folder") from None
        except Exception as error:
            raise ValueError(
                f"{path}: weights do not fit {self.config.method!r} as its config says ({' '.join(str(error).split())})"
            ) from error
        if self.config.lora_rank:
            lora.merge(self.encoder.layers, folder)


def window_lengths(cu_seqlens: list[int], ratio: int, device: torch.device) -> Tensor:
    """int64 ``[K]``: tokens of each window of ``ratio`` tokens; the last one of a sequence may be short."""
    lengths = [min(ratio, stop - at) for start, stop in pairwise(cu_seqlens) for at in range(start, stop, ratio)]
    return torch.tensor(lengths, dtype=torch.long, device=device)


@torch.no_grad()
def embedding_norm(embed: nn.Module) -> float:
    """Mean norm of a token's embedding, as the model sees it: a scale that the module applies is counted."""
    weight: Tensor = embed.weight.detach()  # type: ignore[operator]
    some = torch.arange(min(len(weight), 256), device=weight.device)
    scale = embed(some).float().norm() / weight[some].float().norm().clamp_min(1e-30)
    return float(weight.float().norm(dim=-1).mean() * scale)
