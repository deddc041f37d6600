"""What a training run will need, before it starts: parameters and memory, from the model's shapes alone.

The memory of activations and logits is not estimated by a formula: a training step runs on tensors that have shapes but
no values, forward and backward, by the same code as a real one, and the bytes that would live at once are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.config import CompressorConfig
from condense_core.decoder.catalog import model_path
from condense_core.training.config import TrainConfig
from condense_core.training.data import QUOTE_LENGTH, Batch
from condense_core.training.live_bytes import LiveBytes
from condense_core.training.trainer import Distillation, checkpoint_activations

#: Published shapes of models that the plan can be made for where no hub can be reached.
KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-Instruct-v0.2": {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
}


def meta_model(name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model's modules on the meta device: exact shapes, no memory, no weights.

    Args:
        name: folder, hub id or name (``catalog.model_path``); its config is read, or taken from ``KNOWN_CONFIGS`` where
            that cannot be done.
        dtype: of the weights; None: the checkpoint's own, bfloat16 where the config has none.

    Raises:
        ValueError: there is no such config.
    """
    name = model_path(name)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if name not in KNOWN_CONFIGS:
            raise ValueError(f"model: cannot read the config of {name!r} ({str(error).splitlines()[0]})") from error
        known = dict(KNOWN_CONFIGS[name])
        config = AutoConfig.for_model(known.pop("model_type"), **known)
    if dtype is None:
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.name_or_path = name
    return model


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one training process, and the parameter counts behind them.

    Attributes:
        decoder_parameters: of the frozen decoder.
        encoder_parameters: of its first layers, which are shared and take no memory of their own.
        trainable_parameters: of adapter, pooler and projection.
        weights: bytes of decoder and trained parameters.
        gradients_and_optimizer: bytes of the gradients and the two moments of AdamW, in fp32.
        step: the most bytes of activations, logits and their gradients that live at once in a step.
        dtype: of the decoder's weights.
    """

    decoder_parameters: int
    encoder_parameters: int
    trainable_parameters: int
    weights: int
    gradients_and_optimizer: int
    step: int
    dtype: str

    @property
    def total(self) -> int:
        """Bytes at the peak of a step."""
        return self.weights + self.gradients_and_optimizer + self.step

    def as_dict(self) -> dict[str, int | str]:
        """JSON-ready."""
        return {**asdict(self), "total": self.total}

    def lines(self) -> list[str]:
        """For a terminal."""
        gib = 2**30
        return [
            f"decoder            {self.decoder_parameters / 1e6:10,.1f} M parameters, frozen, {self.dtype}",
            f"encoder (shared)   {self.encoder_parameters / 1e6:10,.1f} M parameters, frozen",
            f"trained            {self.trainable_parameters / 1e6:10,.1f} M parameters (adapter, pooler, projection)",
            f"weights            {self.weights / gib:10.2f} GiB",
            f"gradients + AdamW  {self.gradients_and_optimizer / gib:10.2f} GiB",
            f"a step             {self.step / gib:10.2f} GiB (activations and logits at their peak)",
            f"total              {self.total / gib:10.2f} GiB per process",
        ]


def memory_plan(model: PreTrainedModel, config: CompressorConfig, train: TrainConfig, *, autocast: bool) -> MemoryPlan:
    """The memory of a process that trains a compressor for ``model``.

    Args:
        model: of the meta device, as ``meta_model`` gives it.
        config: of the compressor.
        train: how it is trained. The largest of its batches decides.
        autocast: whether the forward passes are autocast to bfloat16.
    """
    if config.method == "mixed":
        # What is kept exact decides on values, which there are none of here. Pooling all tokens at the next lower ratio
        # takes no less: there are as many rows behind as many hidden states.
        ratios = tuple(int(ratio) for ratio in config.ratios)
        config = replace(config, method="pool", window=0, ratios=ratios)
    with torch.device("meta"):
        compressor = Compressor(model, config)
        compressor.attach_lora()
    model.requires_grad_(False)
    trained = compressor.trainable_parameters()
    for parameter in trained:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    count = sum(p.numel() for p in trained)
    decoder = sum(p.numel() for p in model.parameters())
    encoder = sum(p.numel() for n, p in compressor.encoder.layers.named_parameters() if "lora_" not in n)
    module = Distillation(model, compressor, train.kl_weight, train.ce_weight)
    if train.gradient_checkpointing:
        checkpoint_activations(model, compressor)
    return MemoryPlan(
        decoder_parameters=decoder,
        encoder_parameters=encoder,
        trainable_parameters=count,
        weights=decoder * model.dtype.itemsize + count * 4,
        gradients_and_optimizer=count * 12,
        # Gradients of the trained parameters are among what lives, and counted already.
        step=max(0, step_bytes(module, largest_batch(config, train, len(model.model.layers)), autocast) - count * 4),
        dtype=str(model.dtype).removeprefix("torch."),
    )


#: Tokens of a chat template before a context, of an instruction, of a question and of an answer; tokenizers differ.
_PREFIX, _INSTRUCTION, _QUESTION, _ANSWER, _QUOTED = 4, 8, 14, 6, 30


def largest_batch(config: CompressorConfig, train: TrainConfig, decoder_layers: int) -> Batch:
    """The batch that takes most among those that ``trainer.draw`` makes for the smallest ratio; its ids are all 0.

    Activations are kept of every position in every layer: of the context in the encoder, and of soft tokens and tail in
    the decoder. That product decides.
    """
    ratio, candidates = int(min(config.ratios)), []
    for context in _contexts(train):
        context -= context % ratio
        for drawn, tail, answers in _tails(train, context):
            rows = max(1, train.tokens // (context + drawn))
            positions = config.encoder_layers * context + decoder_layers * (context // ratio + tail)
            candidates.append((rows * positions, rows, context, tail, answers))
    _, rows, context, tail, answers = max(candidates)
    mask = torch.zeros(rows, tail, dtype=torch.bool)
    mask[:, tail - answers :] = True
    ids = torch.zeros(1, dtype=torch.long)
    return Batch(ids.expand(_PREFIX), ids.expand(rows, context), ids.expand(rows, tail), mask, "plan")


def _contexts(train: TrainConfig) -> list[int]:
    """Lengths from the shortest to the longest, close enough to meet those that fill a batch."""
    low, high = train.min_context, train.max_context
    return sorted({*range(low, high + 1, max(1, (high - low) // 500)), high})


def _tails(train: TrainConfig, context: int) -> Iterator[tuple[int, int, int]]:
    """(tokens that ``draw`` counts for a tail, those that it has, those of its answers), for each kind of batch."""
    if train.reconstruction + train.continuation > 0:
        length = min(128, context)
        yield length, _INSTRUCTION + length, length
    if train.reconstruction + train.continuation + train.quotes + train.told < 1:
        turns = min(train.turns, max(2, context // 30))
        yield 20 * turns, (_QUESTION + _ANSWER) * turns, _ANSWER * turns
    if train.quotes + train.told > 0:
        quotes = min(train.turns, max(1, context // 40))
        yield 40 * quotes, (_QUOTED + QUOTE_LENGTH) * quotes, QUOTE_LENGTH * quotes


def step_bytes(module: Distillation, batch: Batch, autocast: bool) -> int:
    """The most bytes of tensors that live at once in a forward and backward pass, beside the weights.

    Args:
        module: on the meta device; its tensors become fake ones, which have shapes and no values.
        batch: only its shapes matter.
        autocast: whether the forward pass is autocast to bfloat16.
    """
    ratio = min(module.compressor.config.ratios)
    if module.compressor.pooler is not None:
        # Where a batch's sequences end decides on values, which there are none of. All are whole windows long, so that
        # one sequence of all of them takes the same.
        module.compressor.pooler.register_forward_pre_hook(lambda _, args: (args[0], None, args[2]))
    with FakeTensorMode() as fake:
        _without_values(module)
        batch = batch.map(fake.from_tensor)
        with LiveBytes() as memory:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss, _, _ = module(batch, ratio)
            loss.backward()
    return memory.peak


def _without_values(module: nn.Module) -> None:
    """Give every parameter, buffer and tensor of ``module`` a fake one of its shape; what was shared is shared."""
    made: dict[int, Tensor] = {}
    originals = []  # an id may not be used again before the end
    for part in module.modules():
        own = {**dict(part.named_parameters(recurse=False)), **dict(part.named_buffers(recurse=False)), **vars(part)}
        for name, tensor in own.items():
            if not isinstance(tensor, Tensor):
                continue
            if id(tensor) not in made:
                originals.append(tensor)
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if parameter else fake
            setattr(part, name, made[id(tensor)])
