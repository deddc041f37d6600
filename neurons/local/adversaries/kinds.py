"""All kinds of adversaries, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from condense_core.neurons.local.adversaries import signatures
from condense_core.neurons.local.adversaries.bodies import BODIES, Replayer, Spoiler
from condense_core.neurons.local.adversaries.choosing import choosing
from condense_core.neurons.local.adversaries.copying import CHANGES, Coarsener, Copier, Mixer
from condense_core.neurons.local.adversaries.means import Adversary, Means
from condense_core.neurons.local.adversaries.relaying import relaying
from condense_core.neurons.local.adversaries.vectors import ROWS, MadeUp, Optimised, Rows
from condense_core.neurons.local.adversaries.wire import WIRE, misbehaving
from condense_core.neurons.mining.app import create_miner_app
from condense_core.serving.http.guard import App


@dataclass(frozen=True)
class Kind:
    """A kind of adversary.

    Attributes:
        about: what it does, in one line. made: it, of its means. app: how it is served.
        robs: it lives off another miner's answers: it compresses nothing, but what it sends may be good.
    """

    about: str
    made: Callable[[Means], Adversary]
    app: Callable[[Adversary], App] = create_miner_app
    robs: bool = False


def _made_up(means: Means, rows: Rows) -> Adversary:
    return Adversary(means, MadeUp(means.condenser, rows))


_ABOUT = {
    "zeros": "zeros",
    "noise": "random vectors, as large as embeddings",
    "first-tokens": "the embeddings of the first tokens",
    "last-tokens": "the embeddings of the last tokens",
    "any-tokens": "the embeddings of tokens drawn by chance",
    "likely-sentences": "the embeddings of sentences with names and numbers, which are likely to be asked about",
    "likely-words": "the embeddings of names and numbers, and of what stands beside them",
    "no-common-words": "the embeddings of the first words that say something",
    "means": "means of the embeddings of neighbours, which nobody has trained",
    "injection": "an instruction to the LLM, as embeddings",
    "injection-and-text": "an instruction to the LLM, and the text's first tokens",
    "too-few-rows": "one soft token",
    "too-many-rows": "twice as many soft tokens as its ratio gives",
    "lower-ratio": "as many soft tokens as tokens",
    "longer-context": "twice the soft tokens, of a context said to be twice as long",
    "nan": "a value that is no number",
    "infinite": "an infinite value",
    "huge": "the largest numbers",
    "one-huge-row": "a good answer with a row of the largest numbers",
    "another-width": "rows that are too short",
    "another-dtype": "doubles",
    "another-model": "soft tokens that say they are another model's",
    "claims-memory": "a header that asks for terabytes",
    "cut-short": "a file without its end",
    "no-file": "a text to the validator",
    "copy-noise": "another's answer with little noise",
    "copy-more-noise": "another's answer with half as much noise as there is in it",
    "copy-most-noise": "another's answer with as much noise as there is in it",
    "copy-scaled": "another's answer, larger",
    "copy-shifted": "another's answer, all rows moved alike",
    "copy-permuted": "another's answer in another order",
    "late": "an answer behind the timeout",
    "drip": "a byte now and then",
    "endless": "bytes without end",
    "bomb": "a small body that unpacks to much",
    "crash": "half of an answer",
    "redirect": "the address of another miner",
}

ADVERSARIES: dict[str, Kind] = {
    **{name: Kind(_ABOUT[name], partial(_made_up, rows=rows)) for name, rows in ROWS.items()},
    "optimised": Kind(
        "vectors for which right answers to other challenges are likely",
        lambda means: Adversary(means, Optimised(means.condenser, means.tiers, seconds=means.seconds)),
    ),
    **{name: Kind(_ABOUT[name], partial(Spoiler, spoil=spoil)) for name, spoil in BODIES.items()},
    "replay": Kind("its first answer again and again, signed anew", Replayer),
    "replay-signed": Kind("its first answer again and again, with its old signature", signatures.Repeater),
    "unsigned": Kind("good answers that nobody has signed", signatures.Unsigned),
    "forged-signature": Kind("good answers that another key has signed", signatures.Forger),
    "forged-receiver": Kind("good answers that are signed for another receiver", signatures.Misdirector),
    **{name: Kind(_ABOUT[name], Adversary, partial(misbehaving, misbehaves=how)) for name, how in WIRE.items()},
    "relay": Kind("the validator's request, passed on to another miner", Adversary, relaying),
    "proxy": Kind("another's answer, asked for under its own hotkey", Copier, robs=True),
    **{name: Kind(_ABOUT[name], partial(Copier, change=change), robs=True) for name, change in CHANGES.items()},
    "copy-coarser": Kind("means of another's neighbouring rows, at twice the ratio", Coarsener, robs=True),
    "mix-rows": Kind("every second row of another's, the others its own", partial(Mixer, blend=False), robs=True),
    "mix-means": Kind("the mean of another's answer and its own", partial(Mixer, blend=True), robs=True),
    "sibling": Kind("several hotkeys behind one backend", Adversary, robs=True),
    "choosing": Kind("good answers to what looks like a challenge, and to nothing else", choosing),
}
"""By name."""


def create(name: str, means: Means) -> tuple[Adversary, App]:
    """An adversary, and the application that serves it; ``ValueError`` for a name that is none."""
    kind = ADVERSARIES.get(name)
    if kind is None:
        raise ValueError(f"kind: got {name!r:.60}, expected one of {', '.join(ADVERSARIES)}")
    if means.victim is None and (kind.robs or name == "relay") and name != "sibling":
        raise ValueError(f"kind: {name!r} takes another miner's answers, expected --victim")
    adversary = kind.made(means)
    return adversary, kind.app(adversary)
