"""Plant faults in a copy of the checkout, one at a time, and see whether the tests catch them.

    python tools/mutants.py [--root CHECKOUT] [--only NAME,...] [--list]

When tests are moved, merged or made faster, the same faults must be caught before and after: run this on both commits
(a git worktree of the older one as `--root`, with its extension built). A mutant is found by its text, in whichever
file of its folders that stands now; only the tests that it names are run. Verdicts are `caught`, `SURVIVED`, and
`NOT FOUND` where the text stands nowhere or more than once; the exit code is 1 unless all are caught. Nothing in the
checkout is changed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: what is wrong then.
        where: glob patterns of the files in which the text may stand.
        old: the text as it is, found once in these files. Where the code has changed, the same place in both forms,
            separated by `OR`.
        new: what takes its place, in as many forms.
        tests: arguments of pytest; patterns are expanded, those that match nothing are left out.
    """

    name: str
    where: tuple[str, ...]
    old: str
    new: str
    tests: tuple[str, ...]


OR = "\n<or>\n"
OPS, KERNELS = ("condense_core/ops/**/*.py",), ("kernels/*.py",)
PRUNING, COMPRESSOR = ("condense_core/pruning/**/*.py",), ("condense_core/compressor/*.py",)

MUTANTS = (
    Mutant(
        "select of the reference fills up with 0 instead of -1",
        OPS,
        "indices = places.masked_fill(beyond, -1)",
        "indices = places.masked_fill(beyond, 0)",
        ("tests/ops/test_select*.py", "tests/csrc/test_select.py"),
    ),
    Mutant(
        "lag_scores of the reference ranks from the other end",
        OPS,
        "rank = lag_size - 1 - order.argsort(dim=-1)",
        "rank = order.argsort(dim=-1)",
        ("tests/ops/test_lag_scores.py", "tests/ops/test_cache_scores.py", "tests/ops/test_reference.py"),
    ),
    Mutant(
        "window_scores of the reference lets a query see the key after it",
        OPS,
        "(i <= position.unsqueeze(-1))  # [B, w, N]",
        "(i <= position.unsqueeze(-1) + 1)  # [B, w, N]",
        ("tests/ops/test_window_scores.py", "tests/ops/test_query_scores.py", "tests/ops/test_reference.py"),
    ),
    Mutant(
        "key_norm in Triton takes the first padding token for a real one",
        ("kernels/key_norm.py",),
        "real = (token >= start) & (token < stop)",
        "real = (token >= start) & (token < stop - 1)",
        ("tests/kernels/test_key_norm.py",),
    ),
    Mutant(
        "ragged_decode_attention in Triton forgets to rescale the sum when the maximum grows",
        ("kernels/ragged_decode_attention.py",),
        "norm = norm * alpha + tl.sum(p, 1)",
        "norm = norm + tl.sum(p, 1)",
        ("tests/kernels/test_ragged_decode_attention.py",),
    ),
    Mutant(
        "select on the CPU keeps too many equal scores",
        ("csrc/cpu/kernels/select.h",),
        "    equal -= tied;\n",
        "",
        ("tests/csrc/test_select.py",),
    ),
    Mutant(
        "key_norm on the CPU forces one token less at the end",
        ("csrc/cpu/kernels/key_norm.h",),
        "real.stop - i <= window",
        "real.stop - i < window",
        ("tests/csrc/test_key_norm.py",),
    ),
    Mutant(
        "ragged_append in CUDA writes lengths before other threads have read them",
        ("csrc/cuda/ragged_append.cu",),
        "  __syncthreads();\n  if (threadIdx.x == 0) {",
        "  if (threadIdx.x == 0) {",
        ("tests/csrc/test_cuda.py", "tests/csrc/cuda"),
    ),
    Mutant(
        "SnapKV forgets the window between chunks",
        ("condense_core/pruning/methods/snapkv.py",),
        "return scores if queries.shape[2] == self.window else ctx.protect(scores, window=self.window)",
        "return scores",
        ("tests/pruning/test_methods*.py", "tests/pruning/methods"),
    ),
    Mutant(
        "AdaKV takes the places of tokens that a head must keep",
        PRUNING,
        "min(self.protected, budget))",
        "0)",
        ("tests/pruning/test_wrappers*.py", "tests/pruning/wrappers"),
    ),
    Mutant(
        "StreamingLLM counts padding as the first tokens",
        PRUNING,
        "place = place - ctx.bounds[:, :1, None]",
        "place = place - 0",
        ("tests/pruning/test_methods*.py", "tests/pruning/methods"),
    ),
    Mutant(
        "a cache file's header is not compared with its digest",
        PRUNING,
        'if metadata["sha256"] != digest(metadata["cache"], content):',
        "if False:",
        ("tests/pruning/test_storage*.py",),
    ),
    Mutant(
        "soft tokens are read without a look at their digest",
        COMPRESSOR,
        'if hashlib.sha256(payload).hexdigest() != metadata["payload_sha256"]:',
        "if False:",
        ("tests/compressor/test_soft_tokens*.py",),
    ),
    Mutant(
        "positions of packed sequences run on",
        COMPRESSOR,
        "torch.cat([torch.arange(n, device=embeds.device) for n in packing.lengths]).unsqueeze(0)",
        "torch.arange(sum(packing.lengths), device=embeds.device).unsqueeze(0)",
        ("tests/compressor/test_encoder.py", "tests/compressor/test_compressor.py"),
    ),
    Mutant(
        "an adapter is merged with the scale of plain LoRA where rsLoRA was trained",
        COMPRESSOR,
        '(math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])',
        'config["r"]',
        ("tests/compressor/test_lora.py",),
    ),
    Mutant(
        "an answer's loss is taken one position too late",
        ("condense_core/training/*.py",),
        "before = hidden[:, -batch.tail.shape[1] - 1 : -1]",
        "before = hidden[:, -batch.tail.shape[1] :]",
        ("tests/training",),
    ),
    Mutant(
        "distillation averages over nothing",
        ("condense_core/training/*.py",),
        'log_target=True, reduction="batchmean")',
        'log_target=True, reduction="sum")',
        ("tests/training",),
    ),
    Mutant(
        "control tokens spelled out in a text act",
        ("condense_core/prompt.py", "condense_core/decoder/*.py"),
        f"split_special_tokens=True{OR}return encode_spans(tokenizer, [Span(text, False)])",
        f"split_special_tokens=False{OR}return encode_spans(tokenizer, [Span(text, True)])",
        ("tests/test_prompt.py", "tests/decoder/test_[ps]*.py", "tests/compressor/test_condenser.py"),
    ),
    Mutant(
        "a header may name a key twice",
        ("condense_core/files.py", "condense_core/files/*.py"),
        "if len(result) != len(pairs):",
        "if False:",
        ("tests/compressor/test_soft_tokens*.py", "tests/pruning/test_storage*.py", "tests/files"),
    ),
    Mutant(
        "bad input ends with the exit code 1",
        ("condense_core/terminal.py", "condense_core/cli/terminal.py"),
        "return EXIT_BAD_INPUT",
        "return 1",
        ("tests/test_cli*.py", "tests/cli/test_bad_input.py"),
    ),
)


def main() -> int:
    """Plant and test each chosen mutant."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--root", type=Path, default=CHECKOUT, help="the checkout to copy (default: this one)")
    parser.add_argument("--only", default="", help="comma-separated parts of names, or numbers")
    parser.add_argument("--list", action="store_true", help="say where each stands, and plant none")
    options = parser.parse_args()
    words = [word for word in options.only.split(",") if word]
    chosen = [
        (number, mutant)
        for number, mutant in enumerate(MUTANTS, 1)
        if not words or any(word == str(number) or (not word.isdigit() and word in mutant.name) for word in words)
    ]
    root, survivors = options.root.resolve(), 0
    if options.list:
        for number, mutant in chosen:
            place = locate(mutant, root)
            print(f"{number:2} {'NOT FOUND' if place is None else place[0].relative_to(root)}: {mutant.name}")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "checkout"
        variables = copied(root, copy, Path(temporary) / "links")
        for number, mutant in chosen:
            started = time.monotonic()
            verdict = plant(mutant, copy, variables)
            survivors += verdict != "caught"
            print(f"{number:2} {verdict:9} {time.monotonic() - started:5.0f} s  {mutant.name}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught")
    return int(survivors > 0)


def locate(mutant: Mutant, root: Path) -> tuple[Path, str, str] | None:
    """The file and the pair of texts that stands in it; None unless exactly one file has one, once."""
    found = []
    for old, new in zip(mutant.old.split(OR), mutant.new.split(OR), strict=True):
        for path in sorted({path for pattern in mutant.where for path in root.glob(pattern)}):
            found += [(path, old, new)] * path.read_text().count(old)
    return found[0] if len(found) == 1 else None


def copied(root: Path, copy: Path, links: Path) -> dict[str, str]:
    """Copy what git knows of, and the compiled extension; the variables under which Python imports the copy."""
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=True)
    for name in [*listed.stdout.split("\0")[:-1], *(str(p.relative_to(root)) for p in root.glob("condense_core/_C*"))]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if (root / name).is_file():  # else it was removed and not committed yet
            shutil.copy2(root / name, copy / name)
    package = links / "condense_core"
    package.mkdir(parents=True)
    for entry in (copy / "condense_core").iterdir():
        (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(copy / "kernels")
    (package / "_models").symlink_to(copy / "models")
    return {**os.environ, "PYTHONPATH": str(links), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def plant(mutant: Mutant, copy: Path, variables: dict[str, str]) -> str:
    """Change the copy, run the tests, change it back."""
    place = locate(mutant, copy)
    if place is None:
        return "NOT FOUND"
    path, old, new = place
    before = path.read_text()
    tests = [str(found) for pattern in mutant.tests for found in sorted(copy.glob(pattern))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    libraries = {library: library.read_bytes() for library in (copy / "condense_core").glob("_C*")}
    try:
        path.write_text(before.replace(old, new))
        if path.is_relative_to(copy / "csrc" / "cpu"):
            build(copy, variables)
        done = subprocess.run(command, cwd=copy, env=variables, capture_output=True, text=True)
    finally:
        path.write_text(before)
        for library, content in libraries.items():
            library.write_bytes(content)
    if done.returncode not in (0, 1):  # neither passed nor failed: the mutant, or a name among its tests, is wrong
        print((done.stdout + done.stderr)[-3000:], file=sys.stderr)
        return "BROKEN"
    return "caught" if done.returncode else "SURVIVED"


def build(copy: Path, variables: dict[str, str]) -> None:
    """Compile the CPU half of the extension in the copy; what is there is replaced, never written over."""
    for library in (copy / "condense_core").glob("_C*"):
        library.unlink()
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    clean = {key: value for key, value in variables.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    subprocess.run(command, cwd=copy, env=clean | {"CONDENSE_CUDA": "0"}, check=True, capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
