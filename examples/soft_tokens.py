"""A text becomes soft tokens, in a file, and the unmodified decoder answers from them.

    python examples/soft_tokens.py [FOLDER]

Without a folder the file lies in a temporary one. The embedded model answers questions in the style of its training
(`condense_core/tasks/facts.py`); with another model, name its folder or hub id in `from_pretrained`.
"""

import sys
import tempfile
from pathlib import Path

from condense_core import Condenser, SoftTokens
from condense_core.decoder.embedded import embedded_model_path
from condense_core.tasks.demo import DEMO_FACTS, demo_text


def main(folder: Path) -> None:
    """Compress the demonstration's text, save it, load it, ask."""
    condenser = Condenser.from_pretrained(embedded_model_path())
    text = demo_text()

    # Vectors in the model's input-embedding space, [k, d_model], k = ceil(n / ratio).
    soft = condenser.compress(text, ratio=4)
    print(f"{len(text):,} characters became {len(soft)} soft tokens")

    path = folder / "context.safetensors"
    soft.save(path)
    soft = SoftTokens.load(path)
    for fact in DEMO_FACTS[:3]:
        print(f"{fact.question} {condenser.generate(soft, fact.question)}")

    # The same through transformers alone: `prepare` gives what `generate` takes.
    question = DEMO_FACTS[0].question
    out = condenser.model.generate(**condenser.prepare(soft, question), max_new_tokens=24)
    print(f"{question} {condenser.tokenizer.decode(out[0], skip_special_tokens=True).strip()}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
