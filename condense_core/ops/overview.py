"""What docs/ops.md says: `python -m condense_core.ops.overview > docs/ops.md`, in the checkout, writes it anew.

A section for each op: its formula, where everything of it lies, and which backends it has. An op has one stem in all
folders; `compact_` shares that of `compact`, and the gradients of an op are registered in its public module.
"""

from dataclasses import dataclass, field
from pathlib import Path

from condense_core.ops.backends import REGISTRY

FORMULAS = {
    "attention_pool": "out[j, h] = sum_i softmax_i(scale * <q[j, h], r_h[i]> + window_bias[h, i]) r_h[i] over the "
    "tokens i of window j, r = rms_norm(x)",
    "attention_pool_backward": "the gradients of attention_pool: dp = <g, r>, ds = p * (dp - sum(p * dp)), "
    "dr = p g + scale ds q, dq = scale ds r",
    "cross_pool": "out[j, h] = sum_i softmax_i(scale * <q[j, h], r_h[i]>) r_h[i] over the tokens i of j's sequence",
    "cross_pool_backward": "the gradients of cross_pool, as for attention_pool",
    "window_scores": "score_i = mean over heads and queries t of the window of softmax_i(scale * <q_t, k_i>), averaged "
    "over kernel_size neighbours",
    "non_causal_chunks": "score_j = mean over heads of the sum over the queries i of j's chunk of "
    "softmax_j(scale * <q_i, k_j>)",
    "query_moments": "mu = mean(p_i), cov = mean((p_i - mu)(p_i - mu)^T), p the queries with their rotation undone",
    "expected_attention": "score_i = mean_h softmax_i(scale * k_i^T R mu_h + scale^2 / 2 * k_i^T R cov_h R^T k_i) "
    "* ||v_i||_2",
    "key_norm": "score_i = -||k_i||_2",
    "key_similarity": "score_i = -cos(k_i, mean_j k_j / ||k_j||)",
    "lag_scores": "score_i = rank in its chunk of std_c((x_ic - low_c) / (high_c - low_c)), low and high over the next "
    "chunk",
    "value_projection_norm": "score_i = mean_h ||W_h v_i||_1",
    "select": "the budget highest scores, as indices in ascending order; of equal ones the earlier",
    "compact": "out[j] = x[indices[j]] in every head, keys turned back by indices[j] - first - j positions",
    "compact_": "the same in place",
    "ragged_append": "x[cu_seqlens[n] + lengths[n] + j] = x_new[n, j], lengths[n] += t",
    "ragged_decode_attention": "out[b, h] = sum_i softmax_i(scale * <q[b, h], k[i]>) v[i] over the rows i of h's head",
}
"""One line of mathematics for each op; the whole of it is in `condense_core.ops.reference`."""

_TITLE = """# The ops

Written by `python -m condense_core.ops.overview`: run it again when an op, a kernel or a test is added.

An op has one stem. What it computes is its specification, plain PyTorch; the public function checks arguments, and its
docstring gives shapes, units and errors; backends run it, the first of the list that can. Speeds are in
[kernels.md](kernels.md) (GPU) and [native.md](native.md) (CPU).
"""


@dataclass(frozen=True)
class Stem:
    """Everything of one op, or of `compact` and `compact_`, which share their files.

    Attributes:
        name: the stem.
        ops: the names in the registry.
        files: what lies where, by what it is; paths from the root of the checkout.
        tests: paths likewise.
        benchmark: likewise.
    """

    name: str
    ops: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    tests: list[str] = field(default_factory=list)
    benchmark: str = ""


def stems(root: Path) -> list[Stem]:
    """All ops of the registry with their files.

    Args:
        root: of the checkout: kernels, tests and benchmarks are found on disk.
    """
    found: dict[str, Stem] = {}
    for op in REGISTRY.ops:
        name = op.rstrip("_")
        if name not in found:
            found[name] = _stem(name, root)
        found[name].ops.append(op)
    return list(found.values())


def _stem(name: str, root: Path) -> Stem:
    forward = name.removesuffix("_backward")
    files = {
        "public function": f"condense_core/ops/{forward}.py",
        "specification": f"condense_core/ops/reference/{name}.py",
        "Triton kernel": f"kernels/{name}.py",
        "CPU backend": f"condense_core/ops/cpu/{name}.py",
        "CPU kernel": f"csrc/cpu/kernels/{name}.h",
        "CUDA backend": f"condense_core/ops/cuda/{name}.py",
        "CUDA kernel": f"csrc/cuda/{name}.cu",
    }
    required = ("public function", "specification")
    files = {kind: path for kind, path in files.items() if kind in required or (root / path).exists()}
    tests = []
    for folder in ("tests/ops", "tests/kernels", "tests/csrc", "tests/csrc/cuda"):
        # Gradients may be tested in a file of their own, or in that of the op.
        candidates = (f"{folder}/test_{stem}.py" for stem in (name, forward))
        tests += [path for path in candidates if (root / path).exists()][:1]
    return Stem(name, [], files, tests, f"bench/cases/{forward}.py")


def document(root: Path) -> str:
    """The text of docs/ops.md."""
    return "\n".join([_TITLE, *map(_section, stems(root))])


def _section(stem: Stem) -> str:
    lines = [f"## {', '.join(f'`{op}`' for op in stem.ops)}", ""]
    lines += [f"    {FORMULAS[op]}" for op in stem.ops]
    lines += ["", f"Backends: {', '.join(REGISTRY.backends(stem.ops[0]))}.", ""]
    lines += [f"- {kind}: {_link(path)}" for kind, path in stem.files.items()]
    lines += [f"- tests: {', '.join(map(_link, stem.tests))}", f"- benchmark: {_link(stem.benchmark)}", ""]
    return "\n".join(lines)


def _link(path: str) -> str:
    return f"[{path}](../{path})"


if __name__ == "__main__":
    print(document(Path.cwd()), end="")
