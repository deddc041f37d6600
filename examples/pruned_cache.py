"""A text is read once into a pruned KV cache, kept in a file, and asked several questions.

    python examples/pruned_cache.py [FOLDER]

Without a folder the file lies in a temporary one. The second half does the same for `generate` as users of transformers
know it: inside `prune` its prefill is pruned, and nothing else changes.
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from condense_core.decoder.embedded import embedded_model_path
from condense_core.pruning import ExpectedAttention, PrunedCache, SnapKV, prune, text
from condense_core.tasks.demo import DEMO_FACTS, demo_text


def main(folder: Path) -> None:
    """Prune the demonstration's text to a quarter, ask, save, load, ask again."""
    model = AutoModelForCausalLM.from_pretrained(embedded_model_path())
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())

    cache = text.prefill(model, tokenizer, demo_text(), ExpectedAttention(keep=0.25))
    print(f"{cache.get_seq_length():,} tokens were read, {cache.nbytes / 2**20:.2f} MiB hold what was kept")
    question = DEMO_FACTS[0].question
    print(f"{question} {text.ask(model, tokenizer, cache, question)}")

    path = folder / "context.cache"
    cache.save(path)
    cache = PrunedCache.load(path)
    for fact in DEMO_FACTS[1:3]:
        print(f"{fact.question} {text.ask(model, tokenizer, cache, fact.question)}")

    # SnapKV keeps what the end of the prompt attends to: with the question in the prompt, what the question is about.
    messages = [{"role": "user", "content": f"{demo_text()}\n\n{question}"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with prune(model, SnapKV(keep=0.25)):
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    print(f"{question} {tokenizer.decode(out[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True).strip()}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
