"""Time an op of the working tree beside the same op of another commit, in turns: is it faster, and still right?

    python -m bench.compare --case window_scores [--base main] [--dtype fp32] [--rounds 40]

`--base` is checked out into a worktree of its own and built there if its sources differ. The op's tests run in both.
If both pass, two processes take turns, round by round (A B A B), with the cases of the working tree, so that the base
is measured with the same shapes, inputs and clock. Printed are the medians and, of the ratios of neighbouring rounds,
median and quartiles: where 1 lies between the quartiles, there is no difference to speak of.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ROUND_SECONDS = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Test, measure and print; 1 if the tests of either side fail."""
    from bench.cases import OPS

    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--case", required=True, choices=OPS, metavar="OP", help=f"one of {', '.join(OPS)}")
    parser.add_argument("--base", default="main", help="commit or branch to compare with (default: main)")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="of the tensors (default: fp32)")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of each side and case (default: 40)")
    parser.add_argument("--smoke", action="store_true", help="small sizes, to test this program")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        work(options)
        return 0
    with worktree(options.base) as base, tempfile.TemporaryDirectory() as links:
        sides = {"base": base, "working tree": CHECKOUT}
        environments = {}
        for name, checkout in sides.items():
            build(checkout)
            environments[name] = environment(checkout, Path(links) / name.replace(" ", "-"))
            if failed := test(options.case, checkout, environments[name]):
                print(f"error: the tests of {options.case} fail in the {name}\n{failed[-3000:]}", file=sys.stderr)
                return 1
        report(take_turns(environments, options))
    return 0


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A checkout of `commit` in a temporary folder, removed afterwards."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "base"
        git = ["git", "-C", str(CHECKOUT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def build(checkout: Path) -> None:
    """Bring the compiled extension up to date; without a compiler both sides run what they have."""
    if checkout != CHECKOUT and same_sources(checkout):
        for library in (CHECKOUT / "condense_core").glob("_C*.so"):
            (checkout / "condense_core" / library.name).symlink_to(library)
        return
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    cuda = {} if Path("/dev/nvidia0").exists() else {"CONDENSE_CUDA": "0"}
    subprocess.run(command, cwd=checkout, check=True, env={**os.environ, **cuda})


def same_sources(checkout: Path) -> bool:
    """Whether what the extension is compiled from is the working tree's."""

    def sources(root: Path) -> dict[str, bytes]:
        files = [root / "setup.py", *(path for path in (root / "csrc").rglob("*") if path.is_file())]
        return {str(path.relative_to(root)): path.read_bytes() for path in files}

    return sources(checkout) == sources(CHECKOUT)


def environment(checkout: Path, links: Path) -> dict[str, str]:
    """Variables under which Python imports the package of `checkout`, laid out by links, and this `bench`."""
    package = links / "condense_core"
    package.mkdir(parents=True)
    for entry in (checkout / "condense_core").iterdir():
        (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(checkout / "kernels")
    (package / "_models").symlink_to(checkout / "models")
    (links / "bench").symlink_to(CHECKOUT / "bench")
    return {**os.environ, "PYTHONPATH": str(links), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}


def test(op: str, checkout: Path, variables: dict[str, str]) -> str:
    """What the op's tests print if they fail, else nothing."""
    files = [f"tests/{folder}/test_{op}.py" for folder in ("ops", "kernels", "csrc")]
    found = [file for file in files if (checkout / file).exists()] or ["tests/ops", "tests/csrc", "-k", op]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *found]
    done = subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""


def take_turns(
    environments: dict[str, dict[str, str]], options: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Case -> side -> microseconds a call, round by round; side and side alternate within each round."""
    command = [sys.executable, "-m", "bench.compare", "--worker", "--case", options.case, "--dtype", options.dtype]
    command += ["--smoke"] * options.smoke
    workers = {
        name: subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name, variables in environments.items()
    }
    times: dict[str, dict[str, list[float]]] = {}
    try:
        while len(names := {_ask(worker, "next") for worker in workers.values()}) == 1 and "" not in names:
            (case,) = names
            times[case] = {name: [] for name in workers}
            for _ in range(options.rounds):
                for name, worker in workers.items():
                    times[case][name].append(float(_ask(worker, "round")))
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.wait()
    return times


def _ask(worker: Any, word: str) -> str:
    worker.stdin.write(word + "\n")
    worker.stdin.flush()
    answer: str = worker.stdout.readline()
    if not answer:
        raise RuntimeError(f"a worker ended with exit code {worker.wait()}; its messages are above")
    return answer.strip()


def work(options: argparse.Namespace) -> None:
    """Answer on standard output: `next` with the name of the next case or an empty line, `round` with microseconds."""
    import torch

    from bench.case import OURS, Setting
    from bench.cases import cases
    from bench.cpu import SHAPES
    from bench.gpu import SMOKE

    cuda = torch.cuda.is_available()
    changes: dict[str, Any] = {**SMOKE, "packs": (1,)} if options.smoke else {} if cuda else SHAPES
    setting = Setting(torch.device("cuda" if cuda else "cpu"), getattr(torch, DTYPES[options.dtype]), **changes)
    wait = torch.cuda.synchronize if cuda else lambda: None
    remaining = cases(setting, (options.case,))
    calls = 1

    def call() -> None:
        """Stands where `next` puts the call of a case."""

    def timed() -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        return (time.perf_counter() - start) / calls

    for word in sys.stdin:
        if word == "next\n":
            case = next(remaining, None)
            if case is not None:
                inputs = case.inputs(0)
                variant = case.variants[OURS]
                call, calls = partial(variant, *inputs), 1
                timed()
                calls = max(1, int(ROUND_SECONDS / timed()))
            print("" if case is None else case.name, flush=True)
        else:
            print(1e6 * timed(), flush=True)


def report(times: dict[str, dict[str, list[float]]]) -> None:
    """A line for each case."""
    for case, sides in times.items():
        base, ours = (sides[name] for name in ("base", "working tree"))
        ratios = [a / b for a, b in zip(base, ours, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        print(
            f"{case:42} base {statistics.median(base):10.1f} us, working tree {statistics.median(ours):10.1f} us: "
            f"{middle:.3f}x as fast ({low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    sys.exit(main())
