"""Scores and kept tokens against those of kvpress 0.5.5, recorded by tests/data/kvpress/record.py.

kvpress gives tokens that must stay the largest score plus one, this project +inf; both keep them.

Where kvpress is known to differ, the record avoids it: NonCausal lets what fills up the last chunk take part in its
softmax (all chunks are full); KVzip's softmax leaves the rest of a longer context out (one chunk); ChunkKV adds up a
layer's heads, lets a window's stand-in scores into the means and rounds the budget to whole chunks (one head, a window
of whole chunks, and their budget); LagKV's ranks of equal tokens are arbitrary (random keys do not tie). Batches,
padding and Q < N are not compared: kvpress knows none of them.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from condense_core.pruning.base import LayerContext, Method, ScoringPass
from condense_core.pruning.methods import METHODS, SnapKV
from condense_core.pruning.methods import compactor as compactor_module
from condense_core.pruning.methods import leverage as leverage_module
from condense_core.pruning.rotary import Rotary
from condense_core.pruning.wrappers import ChunkKV, CriticalKV

RECORD = Path(__file__).parents[1] / "data" / "kvpress" / "scores.safetensors"

# Both compute in float32 from the same numbers, but projections, sums and softmaxes in another order: logits of order
# 10 are off by some 1e-6. What is summed with both signs cancels: terms of order 1 in KeyDiff's cosine, of order 10 in
# QFilter's product; z-scores are differences over a deviation of about 1.
TOLERANCE = {"rtol": 5e-5, "atol": 1e-7}
TOLERANCES = {
    "keydiff": {"rtol": 5e-5, "atol": 1e-6},
    "qfilter": {"rtol": 5e-5, "atol": 1e-5},
    "leverage": {"rtol": 1e-4, "atol": 2e-5},
    "non_causal": {"rtol": 1e-4, "atol": 2e-5},
    "compactor": {"rtol": 1e-4, "atol": 2e-5},
}

COMPARED = [
    "streaming_llm",
    "knorm",
    "keydiff",
    "qfilter",
    "lagkv",
    "snapkv",
    "tova",
    "finch",
    "observed_attention",
    "expected_attention",
    "leverage",
    "non_causal",
    "compactor",
]


@cache
def recorded() -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(RECORD, framework="pt") as file:
        about = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
    return tensors, {**about, "layers": json.loads(about["layers"]), "settings": json.loads(about["settings"])}


class Layer:
    """A recorded layer: q ``[1, H, n, D]`` after RoPE, k, v ``[1, G, n, D]``, in float32."""

    def __init__(self, name: str) -> None:
        tensors, about = recorded()
        self.name, shape = name, about["layers"][name]
        self.settings, self.keep = about["settings"], float(about["keep"])
        self.scores = {key.partition("/")[2]: tensor for key, tensor in tensors.items() if key.startswith(name)}
        width = shape["head_dim"]
        hidden = self.scores["hidden"].float()
        inv_freq = float(about["rope_theta"]) ** -(torch.arange(0, width, 2).float() / width)
        angles = torch.arange(len(hidden)).float()[:, None] * inv_freq
        self.cos, self.sin = (torch.cat([t, t], -1).unsqueeze(0) for t in (angles.cos(), angles.sin()))
        q, k, self.v = (
            (hidden @ self.scores[key].float().T).unflatten(-1, (-1, width)).transpose(0, 1).unsqueeze(0)
            for key in ("q_proj", "k_proj", "v_proj")
        )
        self.q, self.k = (self.rotated(x) for x in (q, k))
        self.tokens = len(hidden)
        self.module = SimpleNamespace(o_proj=SimpleNamespace(weight=self.scores["o_proj"].float()))
        self.ctx = LayerContext(
            module=self.module,
            layer_idx=0,
            num_layers=1,
            budgets=(int(self.keep * self.tokens),),
            lengths=(self.tokens,),
            bounds=None,
            scale=width**-0.5,
            rotary=Rotary(inv_freq),
            cos=self.cos,
            sin=self.sin,
            hidden=hidden.unsqueeze(0),
        )

    def rotated(self, x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * self.cos + torch.cat([-high, low], -1) * self.sin

    def method(self, name: str) -> Method:
        settings = dict(self.settings[name])
        if name == "qfilter":
            settings["filters"] = self.scores["qfilter/filters"]
        return METHODS[name](keep=self.keep, **settings)

    def score(self, method: Method) -> Tensor:
        return method.score(self.module, self.q, self.k, self.v, self.ctx)[0]


@pytest.fixture(params=["32-8", "8-2"])
def layer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Layer:
    found = Layer(request.param)
    # The random numbers that kvpress drew, in place of this project's.
    for module in (leverage_module, compactor_module):
        monkeypatch.setattr(module, "projection", lambda *_: found.scores["phi"])
    return found


def check_kept(scores: Tensor, theirs: Tensor, budget: int, tolerance: dict[str, float]) -> None:
    """The same tokens, but for those whose scores are a rounding from the budget's edge."""
    for own, other in zip(scores, theirs, strict=True):
        ranked = other.sort(descending=True).values
        edge = float(ranked[budget - 1])
        slack = tolerance["atol"] + 2 * tolerance["rtol"] * abs(edge)
        kept = own.topk(budget).indices
        assert (other[kept] >= edge - slack).all()
        surely = (other > edge + slack).nonzero().flatten().tolist()
        assert set(surely) <= set(kept.tolist())
        # Few are at the edge: LagKV gives each rank once in each of its 5 chunks.
        assert ((other - edge).abs() <= slack).sum() <= 5


@pytest.mark.parametrize("name", COMPARED)
def test_scores_and_kept_tokens(name: str, layer: Layer) -> None:
    method = layer.method(name)
    scores, theirs = layer.score(method), layer.scores[name]
    tolerance = TOLERANCES.get(name, TOLERANCE)
    finite = scores.isfinite()
    if name == "streaming_llm":  # theirs say in or out
        for own, other in zip(scores, theirs, strict=True):
            assert set(own.topk(layer.ctx.budget).indices.tolist()) == set(other.nonzero().flatten().tolist())
        return
    # What this project forces, kvpress ranks at the top.
    assert (theirs[~finite].view(len(theirs), -1) >= theirs.amax(-1, keepdim=True)).all()
    if name != "lagkv":
        assert (~finite).sum() == method.protected * len(theirs)
    torch.testing.assert_close(scores[finite], theirs[finite], **tolerance)
    check_kept(scores, theirs, layer.ctx.budget, tolerance)


def test_kvzip(layer: Layer) -> None:
    context = int(recorded()[1]["context"])
    again = slice(context, None)
    method = layer.method("kvzip")
    fields = {**vars(layer.ctx), "cos": layer.cos[:, again], "sin": layer.sin[:, again]}
    ctx = LayerContext(**{**fields, "scoring_pass": ScoringPass((), 0, context)})
    scores = method.score(layer.module, layer.q[:, :, again], layer.k, layer.v, ctx)[0, :, :context]
    theirs, sink = layer.scores["kvzip"], layer.settings["kvzip"]["sink"]
    assert (scores[:, :sink] == math.inf).all()  # theirs are set when the context has been read
    torch.testing.assert_close(scores[:, sink:], theirs[:, sink:], **TOLERANCE)


def test_criticalkv(layer: Layer) -> None:
    settings = layer.settings["criticalkv"]
    method = CriticalKV(layer.method("snapkv"), settings["epsilon"], settings["first_share"])
    scores, theirs = layer.score(method), layer.scores["criticalkv"]
    finite = scores.isfinite()
    first = int(settings["first_share"] * layer.ctx.budget)
    assert ((~finite).sum(-1) == first).all()
    assert torch.equal(theirs == torch.finfo(torch.float32).max, ~finite)
    torch.testing.assert_close(scores[finite], theirs[finite], **TOLERANCE)
    check_kept(scores, theirs, layer.ctx.budget, TOLERANCE)


def test_chunkkv() -> None:
    layer = Layer("4-1")
    settings, kept = layer.settings["chunkkv"], layer.scores["chunkkv/kept"]
    method = ChunkKV(SnapKV(keep=settings["keep"], window=settings["window"]), settings["chunk"])
    scores = layer.score(method)
    # Whole chunks make up the budget: which they are is not a question of rounding.
    chunks = scores.view(1, -1, settings["chunk"]).mean(-1).sort(descending=True).values[0]
    edge = kept.shape[1] // settings["chunk"]
    assert chunks[edge - 1] > chunks[edge] * (1 + 1e-3)
    assert set(scores[0].topk(kept.shape[1]).indices.tolist()) == set(kept[0].tolist())


def test_the_record_is_of_the_version_that_is_named() -> None:
    about = recorded()[1]
    assert about["kvpress"] == "0.5.5"
    assert RECORD.stat().st_size < 300_000
