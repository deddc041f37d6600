"""ragged_append: the specification against the rows it should write, the public function, and its registration."""

from typing import Any

import pytest
import torch

from condense_core import ops

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st


def test_append_writes_behind_the_valid_rows_and_counts_what_found_no_room() -> None:
    k, v = torch.zeros(10, 4), torch.zeros(10, 4)
    offsets, lengths = torch.tensor([0, 4, 6, 6, 12]), torch.tensor([1, 2, 0, 3], dtype=torch.int32)
    k_new, v_new = torch.randn(2, 2, 2, 2, 4).unbind(0)
    ops.ragged_append(k, v, offsets, lengths, k_new, v_new)
    assert lengths.tolist() == [3, 4, 2, 5]
    expected = torch.zeros(10, 4)
    expected[1:3] = k_new[0, 0]
    expected[9] = k_new[1, 1, 0]  # row 10 lies beyond the end of k
    assert torch.equal(k, expected)
    assert torch.equal(v[1:3], v_new[0, 0])
    assert torch.equal(v[9], v_new[1, 1, 0])


@settings(max_examples=40, deadline=None)
@given(
    room=st.lists(st.integers(0, 5), min_size=2, max_size=2),
    lengths=st.lists(st.integers(-2, 7), min_size=2, max_size=2),
    added=st.integers(0, 4),
)
def test_any_room_and_lengths(room: list[int], lengths: list[int], added: int) -> None:
    """Every row of a head holds what it held, or a new one: row `length + j`, if the head has it, is the j-th new."""
    k = torch.arange(float(sum(room))).view(-1, 1)
    k_new = -1 - torch.arange(2.0 * added).view(1, 2, added, 1)
    expected = k.clone()
    for n, (start, rows) in enumerate(((0, room[0]), (room[0], room[1]))):
        for j in range(added):
            place = max(lengths[n], 0) + j
            if place < rows:
                expected[start + place] = k_new[0, n, j]
    v, after = k.clone(), torch.tensor(lengths)
    offsets = torch.tensor([0, room[0], sum(room)])
    ops.ragged_append(k, v, offsets, after, k_new, k_new.clone())
    assert torch.equal(k, expected)
    assert torch.equal(v, expected)
    assert after.tolist() == [length + added for length in lengths]


def good() -> dict[str, Any]:
    new = torch.ones(1, 2, 1, 4)
    rows = torch.zeros(12, 4)
    return {
        "k": rows,
        "v": rows.clone(),
        "cu_seqlens": torch.tensor([0, 6, 12]),
        "lengths": torch.tensor([2, 3]),
        "k_new": new,
        "v_new": new.clone(),
    }


ROWS = torch.zeros(12, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"k": ROWS[None]}, ValueError, r"k has shape \[1, 12, 4\], expected \[T, D\]", id="rank of k"),
        pytest.param(
            {"v": ROWS[1:]}, ValueError, r"v has shape \[11, 4\], expected \[12, 4\], as k has", id="rows of v"
        ),
        pytest.param(
            {"k_new": torch.ones(1, 2, 1, 3), "v_new": torch.ones(1, 2, 1, 3)},
            ValueError,
            r"k_new has shape \[1, 2, 1, 3\], expected \[B, G, t, D\] with D = 4",
            id="width of k_new",
        ),
        pytest.param(
            {"k_new": torch.ones(1, 2, 1, 4).half(), "v_new": torch.ones(1, 2, 1, 4).half()},
            TypeError,
            "k_new has dtype torch.float16, expected torch.float32, as k has",
            id="two dtypes",
        ),
        pytest.param(
            {"cu_seqlens": torch.tensor([0, 12])},
            ValueError,
            r"cu_seqlens has shape \[2\], expected \[B\*G\+1\] = \[3\]",
            id="offsets of one head",
        ),
        pytest.param({"lengths": torch.ones(2)}, TypeError, "lengths has dtype torch.float32", id="lengths of floats"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.ragged_append(**{**good(), **change})


@pytest.mark.parametrize(
    ("given", "other"), [("k_new", "k"), ("v", "k"), ("v_new", "v"), ("v_new", "k")], ids=lambda name: name
)
def test_buffers_that_overlap_are_refused(given: str, other: str) -> None:
    arguments = good()
    buffer = arguments[other]
    arguments[given] = buffer[:2].view(1, 2, 1, 4) if given.endswith("new") else buffer
    with pytest.raises(ValueError, match="overlap in memory, expected buffers apart"):
        ops.ragged_append(**arguments)
    assert not arguments[other].any()


def test_new_rows_may_be_one_row_for_all_heads() -> None:
    arguments = good()
    for name in ("k_new", "v_new"):
        arguments[name] = torch.ones(1, 1, 1, 4).expand(1, 2, 1, 4)
    ops.ragged_append(**arguments)
    assert arguments["k"].sum() == 8


def test_it_passes_opcheck() -> None:
    torch.library.opcheck(torch.ops.condense_core.ragged_append.default, tuple(good().values()))
