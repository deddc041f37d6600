"""A session leaves no hooks, caches or tensors behind, and works where a model is spread over devices."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from condense_core.pruning.session import prune
from condense_core.pruning.wrappers import AdaKV
from condense_testing.pruning.session_state import state
from condense_testing.pruning.sessions import (
    HALF,
    NUM_TOKENS,
    Build,
    generate_ids,
    tokens,
)


@pytest.mark.slow
def test_sessions_leak_nothing(build_model: Build) -> None:
    """Objects, hooks and tensors after 200 cycles are those after 20."""
    model = build_model(num_hidden_layers=1, max_position_embeddings=512)
    ids = tokens(1, 40)
    before = state(model)

    def cycle() -> weakref.ref[Any]:
        with prune(model, AdaKV(HALF)) as session:
            generate_ids(model, ids, count=3)
        return weakref.ref(session)

    def alive() -> tuple[int, int]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) is Tensor]
        return len(gc.get_objects()), len(tensors)

    for _ in range(20):
        cycle()
    objects, tensors = alive()
    sessions = [cycle() for _ in range(180)]
    objects_after, tensors_after = alive()
    assert all(session() is None for session in sessions)
    assert tensors_after <= tensors
    assert objects_after - objects < 360, "less than two objects a cycle, of which the weak references are one"
    assert state(model) == before
    names = [name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if name.startswith("condense_pruning|")]
    assert len(names) == len(set(names)) <= 4


def test_a_model_that_accelerate_dispatched(build_model: Build, tmp_path: Path) -> None:
    """One layer's weights are loaded for each call from the disk, one's from the CPU's state: hooks around modules."""
    accelerate = pytest.importorskip("accelerate")
    plain, model = build_model("llama", max_position_embeddings=512), build_model("llama", max_position_embeddings=512)
    ids = tokens(1, NUM_TOKENS)
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    model = accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert model.model.layers[1].self_attn.o_proj.weight.device.type == "meta"
    for method in (HALF, AdaKV(HALF)):
        with prune(plain, method):
            expected = generate_ids(plain, ids)
        with prune(model, method):
            assert generate_ids(model, ids).tolist() == expected.tolist()
