"""Pruned caches in files: what comes back is what was saved, bit for bit."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from condense_core.pruning import AdaKV, PrunedCache, PyramidKV, Random, Rerotate
from condense_core.pruning.extras import Extras
from condense_core.pruning.layers import UniformLayer
from condense_core.pruning.ragged import RaggedLayer
from condense_core.pruning.rotary import Rotary
from condense_testing.pruning.cache_files import (
    KINDS,
    SEEN,
    B,
    D,
    G,
    contents,
    made_of,
    ragged,
    uniform,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ctx.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_bit_for_bit(kind: str, path: Path) -> None:
    cache = made_of(*KINDS[kind]())
    cache.save(path)
    back = PrunedCache.load(path)
    assert contents(back) == contents(cache)
    before = path.read_bytes()
    back.save(path)  # over the file that it is mapped from
    assert path.read_bytes() == before
    assert contents(back) == contents(cache)


def test_it_is_plain_safetensors_without_room(path: Path) -> None:
    grown = ragged(added=1)
    assert len(grown.keys) > int(grown.lengths.sum())
    cache = made_of(grown, uniform(added=1))
    cache.save(path)
    tensors = load_file(path)
    assert len(tensors["0.keys"]) == int(grown.lengths.sum())
    assert tensors["1.keys"].shape == (B, G, 8, D)
    assert path.stat().st_size < sum(t.nbytes for t in tensors.values()) + 4096


def test_memory_is_mapped_and_the_file_stays_as_it_is(path: Path) -> None:
    made_of(uniform(), ragged()).save(path)
    before = path.read_bytes()
    cache = PrunedCache.load(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    for layer in cache.layers:
        layer.keys[:] = 0.0
    assert path.read_bytes() == before
    assert cache.nbytes < len(before)  # not the whole file for every tensor


def test_a_loaded_cache_grows_and_forgets(path: Path) -> None:
    for name, layers in KINDS.items():
        cache = made_of(*layers())
        cache.save(path)
        back = PrunedCache.load(path)
        new = torch.randn(B, G, 2, D).to(cache.layers[0].dtype)
        for one in (cache, back):
            for layer in one.layers:
                if isinstance(layer, RaggedLayer):
                    layer.attend(new.repeat(1, 2, 1, 1), new, new, None, Extras(1.0))
                else:
                    layer.update(new, new)
        assert contents(back) == contents(cache), name
        for one in (cache, back):
            one.rewind()
        assert contents(back) == contents(cache), name
        assert {layer.since for layer in back.layers} == {0}, name


@pytest.mark.parametrize(
    "method",
    [
        Random(keep=1.0),
        Random(keep=0.3),
        AdaKV(Random(keep=0.3)),
        PyramidKV(Random(keep=0.3)),
        Rerotate(Random(keep=0.3)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("padded", [False, True], ids=["one", "padded"])
def test_a_model_reads_on_as_if_nothing_had_happened(
    method: Any, padded: bool, build_model: Callable[..., PreTrainedModel], path: Path
) -> None:
    model = build_model()
    ids = torch.randint(0, 400, (2 if padded else 1, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[-1, :9] = 0 if padded else 1
    cache = PrunedCache.prefill(model, ids, method, attention_mask=mask)
    cache.save(path)
    back = PrunedCache.load(path)
    assert contents(back) == contents(cache)
    question = torch.randint(0, 400, (len(ids), 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), cache.attached(model):
        expected = model(**cache.inputs(question)).logits
    with torch.no_grad(), back.attached(model):
        assert torch.equal(model(**back.inputs(question)).logits, expected)


def test_a_cache_of_another_model_is_refused(build_model: Callable[..., PreTrainedModel], path: Path) -> None:
    model, other = build_model(), build_model(num_hidden_layers=2)
    PrunedCache.prefill(model, torch.arange(20)[None], Random(keep=0.5)).save(path)
    with pytest.raises(ValueError, match="it has 3 layers, expected 2"):
        PrunedCache.load(path).attached(other)
    made_of(uniform()).save(path)
    with pytest.raises(ValueError, match="it has 1 layers, expected 3, as the model has"):
        PrunedCache.load(path).attached(model)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (lambda: made_of(UniformLayer()), "layer 0 is an empty UniformLayer"),
        (lambda: made_of(uniform(), lengths=[SEEN + 1, 1]), "have seen 20 tokens, expected at least the 21"),
        (lambda: made_of(uniform(), model_id="two\nlines"), "model_id is"),
        (lambda: made_of(uniform(), ragged(dtype=torch.float16)), r"'1\.keys' has dtype F16, expected F32"),
        (lambda: made_of(uniform(), rotary=[Rotary(torch.rand(3))]), "layer 0 turns 6 channels of heads of 4"),
    ],
    ids=["empty", "cropped", "name", "dtypes", "rotary"],
)
def test_what_could_not_be_loaded_is_not_saved(cache: Callable[[], PrunedCache], message: str, path: Path) -> None:
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match=message):
        cache().save(path)
    assert path.read_bytes() == b"before"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_save_leaves_everything_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"cannot write a pruned cache to {path}: No space left"):
        made_of(uniform()).save(path)
    assert path.read_bytes() == b"before"
    assert list(path.parent.iterdir()) == [path]
