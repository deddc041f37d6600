"""A pruning method of one's own: a class with a name and a score, usable wherever the built-in ones are.

    python examples/new_method.py

The method keeps tokens whose values have a large norm. It is compared with two others by what the embedded model still
answers from a quarter of a text's keys and values.
"""

from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from condense_core.decoder.embedded import embedded_model_path
from condense_core.pruning import LayerContext, ScoringMethod, text
from condense_core.pruning.build import build
from condense_core.tasks.demo import DEMO_FACTS, demo_text


class ValueNorm(ScoringMethod):
    """``score_i = ||v_i||_2``, the norm of the token's value in each KV head."""

    name = "value_norm"
    summary = "tokens whose values have a large norm"

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        """Scores ``[B, G, N]`` of values ``[B, G, N, D]``; ``protect`` gives padding the score -inf."""
        return ctx.protect(v.float().norm(dim=-1))


def main() -> None:
    """Prune the demonstration's text to a quarter by each method, and count right answers."""
    model = AutoModelForCausalLM.from_pretrained(embedded_model_path())
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    print(f"right answers of {len(DEMO_FACTS)} from a quarter of {len(demo_text()):,} characters:")
    for name in ("value_norm", "chunkkv(value_norm)", "random", "expected_attention"):
        cache = text.prefill(model, tokenizer, demo_text(), build(name, keep=0.25))
        answers = [text.ask(model, tokenizer, cache, fact.question) for fact in DEMO_FACTS]
        right = sum(fact.answer in answer for fact, answer in zip(DEMO_FACTS, answers, strict=True))
        print(f"{name}: {right}")


if __name__ == "__main__":
    main()
