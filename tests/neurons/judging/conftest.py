"""The embedded model, and facts in a text that it is asked about."""

from __future__ import annotations

import random

import pytest

from condense_core.compressor.condenser import Condenser
from condense_core.decoder.embedded import embedded_model_path
from condense_core.neurons.protocol.messages import Ask
from condense_core.tasks.facts import draw_facts
from condense_core.tasks.generators import Turn, insert_facts, running_text
from condense_core.tasks.sources import open_source

Asked = tuple[Ask, tuple[Turn, ...]]


@pytest.fixture(scope="package")
def condenser() -> Condenser:
    return Condenser.from_pretrained(embedded_model_path(), method="pool", device="cpu")


@pytest.fixture(scope="package")
def asked() -> Asked:
    """What miners are sent, and the questions that are drawn."""
    rng = random.Random(5)
    facts = draw_facts(14, rng, split="eval")  # more than a compression that needs no work can keep
    own = 1600 - sum(len(fact.statement) + 1 for fact in facts)
    text = insert_facts(running_text(open_source(None), rng, own), facts, rng)
    return Ask(tier="research", text=text, ratio=4.0), tuple(Turn(f.question, f.answer, f.kind) for f in facts[:4])
