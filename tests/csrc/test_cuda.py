"""The CUDA kernels in the emulation, under AddressSanitizer and ThreadSanitizer, against the specification; the proof
that these find errors; and, where there is an nvcc, what it makes of the kernels."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import AttentionPoolArgs, CompactArgs, RaggedAppendArgs
from condense_core.ops.cuda import attention_pool, compact, ragged_append

CHECKOUT = Path(__file__).resolve().parents[2]


def _load() -> ModuleType:
    specification = importlib.util.spec_from_file_location("emulation", Path(__file__).with_name("emulation.py"))
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["emulation"] = module
    specification.loader.exec_module(module)
    return module


emulation = _load()


@pytest.fixture(params=emulation.SANITIZERS)
def sanitizer(request: pytest.FixtureRequest) -> str:
    reason = emulation.missing(request.param)
    if reason:
        pytest.skip(reason)
    return str(request.param)


@pytest.mark.parametrize(
    ("error", "clean", "found_by", "report"),
    [
        ("race", "clean", "thread", "data race"),
        ("race_warp", "clean_warp", "thread", "data race"),
        ("beyond_shared", "clean", "address", "global-buffer-overflow"),
        ("beyond_dynamic", "clean_dynamic", "address", "heap-buffer-overflow"),
        ("beyond_global", "clean", "address", "heap-buffer-overflow"),
    ],
)
def test_a_planted_error_is_found_and_a_clean_kernel_passes(error: str, clean: str, found_by: str, report: str) -> None:
    if reason := emulation.missing(found_by):
        pytest.skip(reason)
    program = emulation.build(found_by, "tests/csrc/planted.cpp")
    passed = emulation.run(program, clean)
    assert passed.returncode == 0, passed.stderr
    planted = emulation.run(program, error)
    assert planted.returncode != 0
    assert report in planted.stderr


def test_the_emulation_computes_what_a_gpu_does(sanitizer: str) -> None:
    done = emulation.run(emulation.build(sanitizer, "tests/csrc/planted.cpp"), "primitives")
    assert done.returncode == 0, done.stderr


# --- attention_pool


def test_attention_pool(sanitizer: str, tmp_path: Path) -> None:
    cases: list[Any] = []
    checks: list[Any] = []
    generator = torch.Generator().manual_seed(0)
    # heads, head_dim, lengths, ratio, halo: chunks for one, two and four to a thread, not all of them whole.
    forms = [(3, 16, [13], 4, 0), (5, 128, [3, 0, 9], 7, 2), (7, 256, [5], 3, 0), (2, 8, [30], 30, 0)]
    for heads, head_dim, lengths, ratio, halo in forms if sanitizer == "address" else forms[:2]:
        for dtype, own in ((torch.bfloat16, False), (torch.float16, True)):
            d, offsets = heads * head_dim, torch.tensor([0, *lengths]).cumsum(0)
            rows = reference.window_offsets(offsets, ratio)
            x = torch.randn(sum(lengths), d, generator=generator).to(dtype)
            q = torch.randn(*((int(rows[-1]),) if own else ()), heads, head_dim, generator=generator)
            weight, bias = torch.rand(d, generator=generator), torch.randn(heads, ratio + 2 * halo, generator=generator)
            extras = (weight, bias) if own else (None, None)
            places = (offsets, rows) if len(lengths) > 1 else (None, None)
            out, lse = torch.full((int(rows[-1]), d), 7, dtype=dtype), torch.full((int(rows[-1]), heads), 7.0)
            arguments = [x, q, ratio, len(x), *places, halo, head_dim**-0.5, *extras, 1e-5, out, lse]
            cases.append(("attention_pool", arguments))
            doubles = (x.double(), q.double(), ratio, places[0], halo, head_dim**-0.5)
            wanted = reference.attention_pool_with_lse(
                *doubles, *(None if t is None else t.double() for t in extras), 1e-5
            )
            checks.append((out, lse, wanted))
    emulation.run_cases(sanitizer, cases, tmp_path)
    for out, lse, wanted in checks:
        torch.testing.assert_close(out.double(), wanted[0], rtol=8e-3, atol=1e-5)  # one rounding to 16 bits
        torch.testing.assert_close(lse.double(), wanted[1], rtol=1e-5, atol=1e-5)


@pytest.fixture
def launched(sanitizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the host functions launch runs in the emulation; the names of the kernels' functions."""
    names: list[str] = []

    def launch(function: str, _: torch.device, **arguments: Any) -> None:
        names.append(function)
        in_order = [arguments[name] for name in emulation.parameters(function)]
        emulation.run_cases(sanitizer, [(function, in_order)], tmp_path)

    for module in (attention_pool, compact, ragged_append):
        monkeypatch.setattr(module, "launch", launch)
    return names


@pytest.mark.parametrize("offsets", [None, [0, 5, 10], [0, 3, 3, 10], [0, 0, 0], [0]], ids=str)
def test_packs_of_one_length_need_no_offsets(offsets: list[int] | None, launched: list[str]) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10 if offsets is None else offsets[-1], 32, generator=generator).half()
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    arguments = (torch.randn(2, 16, generator=generator), 3, cu_seqlens, 1, 0.25, None, None, 1e-5)
    actual, wanted = (
        attention_pool.attention_pool(AttentionPoolArgs(x, *arguments)),
        reference.attention_pool_with_lse(x.float(), *arguments),
    )
    torch.testing.assert_close(actual[0].float(), wanted[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(actual[1], wanted[1], rtol=1e-5, atol=1e-5)
    assert launched == ["attention_pool"]


@pytest.mark.parametrize("shut", [0, 3, 4, 6])
@pytest.mark.usefixtures("launched")
def test_a_bias_may_shut_places_out(shut: int) -> None:
    x, q = torch.randn(14, 32, generator=torch.Generator().manual_seed(2)).half(), torch.zeros(2, 16)
    bias = torch.zeros(2, 7)
    bias[:, :shut] = float("-inf")
    arguments = (q, 7, None, 0, 1.0, None, bias, 1e-5)
    wanted = reference.attention_pool_with_lse(x.float(), *arguments)
    for actual, correct in zip(attention_pool.attention_pool(AttentionPoolArgs(x, *arguments)), wanted, strict=True):
        torch.testing.assert_close(actual.float(), correct, rtol=1e-3, atol=1e-4)


# --- select


def scores(*shape: int, seed: int = 0) -> Tensor:
    """Few distinct values, so that ties matter, with NaN, infinities and padding."""
    x = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(seed)).float() / 7
    x[..., 5::17], x[..., 3::29], x[..., 1::31], x[..., 2::37] = float("nan"), float("-inf"), float("inf"), -0.0
    return x


def test_select(sanitizer: str, tmp_path: Path) -> None:
    cases, expected = [], []
    lengths = [0, 1, 31, 33, 300] if sanitizer == "thread" else [0, 1, 31, 33, 300, 1_000]
    for tokens in lengths:
        x = scores(2, 3, tokens) if tokens != 33 else scores(2, tokens, 3).transpose(1, 2)
        ranges = torch.tensor([[[0, 2], [tokens - 3, tokens + 5]], [[7, 3], [-4, 1]]])
        for budget, protect in ((0, None), (1, ranges.int()), (tokens // 3, ranges[:1]), (tokens, None)):
            for across in (0, 1):
                budget = min(budget, tokens)
                wanted = reference.select(x, budget, bool(across), protect)
                outputs = [torch.full_like(t, 77) for t in wanted]
                cases.append(("select", [x, budget, across, protect, *outputs]))
                expected.append((outputs, wanted))
    emulation.run_cases(sanitizer, cases, tmp_path)
    for outputs, wanted in expected:
        for actual, correct in zip(outputs, wanted, strict=True):
            assert torch.equal(actual, correct)


# --- compact


def layers(dim: int, dtype: torch.dtype, tokens: int = 37, *, odd: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of two layers, [2, 3, N, dim], the second of another length; `odd`: at odd addresses, strided."""
    generator = torch.Generator().manual_seed(0)

    def one(n: int) -> Tensor:
        wide = torch.randn(2, n, 3, dim + odd, generator=generator).to(dtype)
        return wide[..., odd:].transpose(1, 2) if odd else wide.transpose(1, 2).contiguous()

    return [one(tokens), one(tokens + 5)], [one(tokens), one(tokens + 5)]


def lists(kept: int, tokens: int = 37) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """For two layers: indices [2, 3, kept], -1 behind some; as one list, and its offsets."""
    uniform, flat, offsets = [], [], []
    for layer in range(2):
        noise = torch.rand(2, 3, tokens, generator=torch.Generator().manual_seed(layer))
        noise[1, 1] = float("-inf")
        noise[0, 2, 4:] = float("-inf")
        uniform.append(reference.select(noise, kept)[0])
        indices, counts = reference.select(noise, kept, True)
        flat.append(indices.flatten())
        starts = torch.arange(2)[:, None] * indices.shape[1] + counts.cumsum(1) - counts
        offsets.append(torch.cat([starts.flatten(), torch.tensor([indices.numel()])]))
    return uniform, flat, offsets


FORMS = [(torch.float32, 8, False), (torch.bfloat16, 64, False), (torch.float16, 6, True), (torch.bfloat16, 5, True)]


def test_compact_in_all_layouts(sanitizer: str, tmp_path: Path) -> None:
    cases: list[Any] = []
    checks: list[Any] = []
    uniform, flat, offsets = lists(10)
    for dtype, dim, odd in FORMS if sanitizer == "address" else FORMS[1:3]:
        ks, vs = layers(dim, dtype, odd=odd)
        rows = [[x.reshape(-1, dim) for x in xs] for xs in (ks, vs)]
        rooms = [torch.arange(7) * x.shape[2] for x in ks]
        angles = torch.arange(40)[:, None] * torch.rand(dim // 2, generator=torch.Generator().manual_seed(3))
        turn = (angles.cos(), angles.sin(), torch.tensor([0, 0, 0, 0, 0, 0]))
        for rotation in ((None, None, None), turn) if dim % 2 == 0 else ((None, None, None),):
            for source in ((ks, vs, []), (*rows, rooms)):
                for kept in ((uniform, []), (flat, [o.int() for o in offsets])):
                    wanted = reference.compact(*source, *kept, *rotation)
                    outputs = [[torch.full_like(t, 7) for t in part] for part in wanted]
                    cases.append(("compact", [*source, *kept, *rotation, *outputs]))
                    checks.append((dtype, outputs, wanted))
                    places = [[x.clone() for x in part] for part in source[:2]]
                    after = [[x.clone() for x in part] for part in source[:2]]
                    reference.compact_(*after, source[2], *kept, *rotation)
                    cases.append(("compact_", [*places, source[2], *kept, *rotation]))
                    checks.append((dtype, places, after))
    emulation.run_cases(sanitizer, cases, tmp_path)
    for dtype, actual, wanted in checks:
        for mine, theirs in zip([*actual[0], *actual[1]], [*wanted[0], *wanted[1]], strict=True):
            # Without rotation bits are moved; with it the sum of two products is rounded once or twice.
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6 if dtype == torch.float32 else 2e-2)


def test_an_index_out_of_range_makes_zeros_and_reads_nothing(sanitizer: str, tmp_path: Path) -> None:
    ks, vs = layers(64, torch.bfloat16)
    indices = torch.tensor([0, 37, 10**12, -5, 36, -1]).expand(2, 3, 6).contiguous()
    outputs = [[torch.full((2, 3, 6, 64), 7, dtype=torch.bfloat16) for _ in range(2)] for _ in range(2)]
    emulation.run_cases(
        sanitizer,
        [("compact", [ks[:1] * 2, vs[:1] * 2, [], [indices, indices], [], None, None, None, *outputs])],
        tmp_path,
    )
    for x, out in ((ks[0], outputs[0][1]), (vs[0], outputs[1][0])):
        assert torch.equal(out[:, :, [0, 4]], x[:, :, [0, 36]])
        assert not out[:, :, [1, 2, 3, 5]].any()


def cache(tokens: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, tokens, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kept_of(counts: list[int], tokens: list[int]) -> list[Tensor]:
    """For each layer [2, 3, count] of so many tokens, ascending."""
    noise = [torch.rand(2, 3, n, generator=torch.Generator().manual_seed(n)) for n in tokens]
    return [x.topk(count).indices.sort().values for x, count in zip(noise, counts, strict=True)]


def check_compaction(arguments: list[Any]) -> None:
    """compact and, on copies, compact_ as their host functions call them: bits, or nearly with rotation."""
    wanted = reference.compact(*arguments)
    close = {"rtol": 0.0, "atol": 0.0 if arguments[5] is None else 2e-2}
    for mine, theirs in zip(compact.compact(CompactArgs(*arguments)), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, **close)
    # Copies with the strides of the originals, gaps included.
    actual, after = (
        [[_like(x) for x in xs] for xs in arguments[:2]],
        [[x.clone() for x in xs] for xs in arguments[:2]],
    )
    compact.compact_(CompactArgs(*actual, *arguments[2:]))
    reference.compact_(*after, *arguments[2:])
    for mine, theirs in zip(actual, after, strict=True):
        torch.testing.assert_close(mine, theirs, **close)


def _like(x: Tensor) -> Tensor:
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return torch.zeros(length, dtype=x.dtype).as_strided(x.shape, x.stride()).copy_(x) if x.numel() else x.clone()


@pytest.mark.parametrize(
    ("dim", "element"),
    # One element, odd, whole units with halves of parts of one, of one and several; rows wider than a block's share.
    [(1, torch.float16), (5, torch.float32), (80, torch.bfloat16), (128, torch.bfloat16), (300, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("counts", [[9, 5, 1], [5, 9, 0], [0, 0, 1]], ids=str)
def test_layers_may_differ_in_every_length(
    dim: int, element: torch.dtype, counts: list[int], launched: list[str]
) -> None:
    tokens = [20, 31, 2]
    ks, vs = ([cache(n, dim, element, seed) for n in tokens] for seed in (0, 1))
    check_compaction([ks, vs, [], kept_of(counts, tokens), [], None, None, None])
    if dim % 2 == 0 and counts[0]:
        angles = torch.arange(31)[:, None] * torch.rand(dim // 2, generator=torch.Generator().manual_seed(3))
        kept = [i.int() for i in kept_of(counts, tokens)]
        check_compaction([ks, vs, [], kept, [], angles.cos(), angles.sin(), None])
    assert set(launched) == {"compact", "compact_"}


@pytest.mark.usefixtures("launched")
def test_keys_behind_padding_count_positions_from_its_end() -> None:
    ks, vs, first = (
        [cache(30, 64, torch.bfloat16)],
        [cache(30, 64, torch.bfloat16, 1)],
        torch.tensor([0, 0, 0, 4, 4, 4]),
    )
    indices = kept_of([7], [26])[0] + first.view(2, 3, 1)
    angles = torch.arange(40)[:, None] * torch.rand(32, generator=torch.Generator().manual_seed(3))
    for of_32_bits in (False, True):
        integers = [t.int() if of_32_bits else t for t in (indices, first)]
        check_compaction([ks, vs, [], [integers[0]], [], angles.cos(), angles.sin(), integers[1]])


@pytest.mark.usefixtures("launched")
def test_offsets_of_any_width_and_strides() -> None:
    ks, vs = (
        [torch.randn(20, 8, generator=torch.Generator().manual_seed(n)) for n in seeds] for seeds in ((0, 1), (2, 3))
    )
    rooms = [torch.tensor([0, 8, 20]), torch.tensor([-3, 12, 50])]
    # Rows 4 and 5 of the second list belong to no head.
    starts, lists_ = [torch.tensor([0, 3, 5]), torch.tensor([0, 1, 4])], [[0, 4, 7, 1, 2], [0, 1, 3, 7, 9, 9]]
    indices = [torch.tensor(values) for values in lists_]

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x - 99], 1)[:, 0]

    forms = ([lambda x: x] * 2, [strided] * 2, [lambda x: x, Tensor.int], [Tensor.int, strided])
    for form in forms:
        described = [[make(x) for make, x in zip(form, xs, strict=True)] for xs in (rooms, indices, starts)]
        check_compaction([ks, vs, *described, None, None, None])


@pytest.mark.usefixtures("launched")
def test_caches_of_any_strides_are_compacted_in_place() -> None:
    kept = kept_of([7], [20])
    for form in (cache(8, 20).transpose(2, 3), cache(20, 16)[..., ::2], cache(20, 17)[..., 1:], cache(20, 1).mT.mT):
        check_compaction([[form], [form.clone()], [], kept, [], None, None, None])


def test_a_cache_of_more_layers_than_a_launch_takes(launched: list[str]) -> None:
    tokens = [n % 7 for n in range(67)]
    ks, vs = ([cache(n, 8, torch.bfloat16, seed) for n in tokens] for seed in (0, 1))
    check_compaction([ks, vs, [], kept_of([n // 2 for n in tokens], tokens), [], None, None, None])
    assert launched == ["compact", "compact_"]


@pytest.mark.usefixtures("launched")
def test_append_to_caches_of_any_strides() -> None:
    for make in (torch.zeros(20, 8).clone, lambda: torch.zeros(8, 20).t(), lambda: torch.zeros(20, 9)[:, 1:]):
        offsets, lengths = torch.tensor([[0, 1], [10, 1], [20, 1]])[:, 0], torch.tensor([1, 9], dtype=torch.int32)
        new = torch.randn(2, 1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
        after = [make(), make(), offsets, lengths.clone(), new[0], new[1]]
        reference.ragged_append(*after)
        actual = [make(), make(), offsets, lengths.clone(), new[0].mT.contiguous().mT, new[1]]
        ragged_append.ragged_append(RaggedAppendArgs(*actual))
        for mine, theirs in zip(actual[:4], after[:4], strict=True):
            assert torch.equal(mine, theirs)


def test_ragged_append(sanitizer: str, tmp_path: Path) -> None:
    cases, checks = [], []
    for dtype, dim, added in ((torch.float32, 5, 1), (torch.bfloat16, 64, 3)):
        k, v = torch.zeros(2, 20, dim, dtype=dtype).unbind(0)
        offsets = torch.tensor([0, 4, 6, 6, 22], dtype=torch.int32)
        lengths = torch.tensor([1, 2, 0, 11])
        k_new, v_new = torch.randn(2, 2, added, 2, dim).to(dtype).transpose(2, 3).unbind(0)
        arguments = [k, v, offsets, lengths, k_new, v_new]
        after = [t.clone() for t in arguments]
        reference.ragged_append(*after)
        cases.append(("ragged_append", arguments))
        checks.append((arguments[:4], after))
    emulation.run_cases(sanitizer, cases, tmp_path)
    for actual, wanted in checks:
        for mine, theirs in zip(actual, wanted, strict=False):
            assert torch.equal(mine, theirs)


# --- nvcc


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("source", sorted((CHECKOUT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.name)
def test_nvcc_spills_nothing_and_a_block_fits(source: Path, tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in (80, 86, 89, 90, 100, 120)]
    command = ["nvcc", "-std=c++20", "-O3", "-DNDEBUG", f"-I{CHECKOUT / 'csrc'}", *targets, "--threads=0", "-Xptxas=-v"]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(tmp_path / "out.o")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(spills) == 2 * len(registers) > 0
    assert set(spills) == {"0"}
    threads = max(int(number) for number in re.findall(r"kThreads = CONDENSE_BLOCK\((\d+)\)", source.read_text()))
    # How many blocks a multiprocessor should hold is in each kernel's launch bounds, which ptxas keeps or spills.
    assert max(registers) * threads <= 65_536
