"""Merging partial attention results, against one softmax over all keys in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.merge_states import merge_states, merge_states_ref

INF = float("inf")


def random_partials(
    rng: np.random.Generator, count: int, heads: int, width: int, empty: float
) -> tuple[Tensor, Tensor]:
    """float64 partials, a share of whose heads is empty; log-sum-exps far apart and close."""
    o = torch.from_numpy(rng.standard_normal((count, heads, width)))
    lse = torch.from_numpy(rng.standard_normal((count, heads)) * rng.choice([0.1, 5, 60]))
    lse[torch.from_numpy(rng.random((count, heads)) < empty)] = -INF
    return o, lse


def random_index(rng: np.random.Generator, rows: int, columns: int, count: int) -> Tensor:
    """Distinct partials in each row, -1 in between."""
    index = np.full((rows, columns), -1)
    for row in index:
        named = rng.permutation(count)[: rng.integers(0, min(columns, count) + 1)]
        row[np.sort(rng.permutation(columns)[: len(named)])] = named
    return torch.from_numpy(index)


def merged_by_hand(o: Tensor, lse: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """exp(lse) is the sum of a partial's weights, o times that their weighted sum; float64."""
    out = torch.zeros(len(index), *o.shape[1:], dtype=torch.float64)
    out_lse = torch.full((len(index), o.shape[1]), -INF, dtype=torch.float64)
    for r, row in enumerate(index.tolist()):
        for h in range(o.shape[1]):
            mine = [j for j in row if j >= 0 and lse[j, h] > -INF]
            if mine:
                top = max(float(lse[j, h]) for j in mine)
                weights = [np.exp(float(lse[j, h]) - top) for j in mine]
                total = sum(weights)
                parts = [w * o[j, h].double() for w, j in zip(weights, mine, strict=True)]
                out[r, h] = torch.stack(parts).sum(0) / total
                out_lse[r, h] = top + np.log(total)
    return out, out_lse


CASES = st.tuples(
    st.integers(0, 2**32),
    st.integers(0, 9),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 6),
    st.integers(0, 8),
    st.sampled_from([0.0, 0.3, 1.0]),
)


@given(CASES, st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=80)
def test_equals_float64(
    case: tuple[int, int, int, int, int, int, float], dtype: torch.dtype
) -> None:
    """Within 4 times the error of the reference in the same dtype."""
    seed, count, heads, width, rows, columns, empty = case
    rng = np.random.default_rng(seed)
    o, lse = (x.to(dtype) for x in random_partials(rng, count, heads, width, empty))
    index = random_index(rng, rows, columns, count)
    results = merge_states(o, lse, index)
    reference = merge_states_ref(o, lse, index)
    for got, plain, exact in zip(results, reference, merged_by_hand(o, lse, index), strict=True):
        assert got.dtype == dtype and got.shape == exact.shape
        nothing = exact == -INF
        assert got.isneginf().equal(nothing) and plain.isneginf().equal(nothing)
        exact, got, plain = (x.double().masked_fill(nothing, 0) for x in (exact, got, plain))
        if exact.numel():
            error, plain_error = ((x - exact).abs().max().item() for x in (got, plain))
            unit = torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())
            assert error <= max(4 * plain_error, 2 * unit)
            # Weights are exp(lse - top), whose argument is rounded once; |lse| is below 300.
            assert plain_error <= 300 * unit


@given(CASES, st.lists(st.integers(0, 8), max_size=5))
@settings(max_examples=50)
def test_absent_and_empty_partials_change_no_bit(
    case: tuple[int, int, int, int, int, int, float], places: list[int]
) -> None:
    """Columns of -1, and partials that saw no key, at any place and whatever finite they hold."""
    seed, count, heads, width, rows, columns, empty = case
    rng = np.random.default_rng(seed)
    o, lse = (x.float() for x in random_partials(rng, count, heads, width, empty))
    index = random_index(rng, rows, columns, count)
    o = torch.cat([o, torch.full((1, heads, width), 3e38), torch.full((1, heads, width), -1e-40)])
    lse = torch.cat([lse, torch.full((2, heads), -INF)])
    expected = merge_states(o, lse, index)
    for filler in (-1, count, count + 1):
        wider = index
        for place in places:
            column = torch.full((rows, 1), filler)
            wider = torch.cat([wider[:, :place], column, wider[:, place:]], 1)
        for got, wanted in zip(merge_states(o, lse, wider), expected, strict=True):
            assert got.equal(wanted)


def test_a_row_depends_on_its_own_partials_alone() -> None:
    """Bit for bit, whatever other rows there are; also when another's partials are not finite."""
    rng = np.random.default_rng(3)
    o, lse = (x.float() for x in random_partials(rng, 40, 5, 19, 0.2))
    index = random_index(rng, 30, 6, 40)
    out, out_lse = merge_states(o, lse, index)
    assert out.isfinite().all() and not out_lse.isnan().any()
    for r in range(30):
        named = index[r : r + 1]
        alone, alone_lse = merge_states(o, lse, named)
        assert alone[0].equal(out[r]) and alone_lse[0].equal(out_lse[r])
        mine = named[named >= 0]
        only = torch.full_like(o, float("nan")), torch.full_like(lse, float("nan"))
        only[0][mine], only[1][mine] = o[mine], lse[mine]
        alone, alone_lse = merge_states(*only, named)
        assert alone[0].equal(out[r]) and alone_lse[0].equal(out_lse[r])


def test_nan_of_a_partial_is_not_hidden() -> None:
    o, lse = torch.ones(3, 2, 4), torch.zeros(3, 2)
    o[1, 0, 2] = float("nan")
    out, _ = merge_states(o, lse, torch.tensor([[0, 1], [0, 2]]))
    assert out.isnan().nonzero().tolist() == [[0, 0, 2]]
    lse[1, 1] = float("nan")
    out, out_lse = merge_states(o, lse, torch.tensor([[0, 1], [0, 2]]))
    assert out_lse.isnan().nonzero().tolist() == [[0, 1]] and out[0, 1].isnan().all()


def test_nothing_to_merge() -> None:
    for partials, index in (
        ((0, 2, 3), [[-1, -1]]),
        ((4, 2, 3), [[-1], [-1]]),
        ((4, 2, 3), [[], []]),
        ((4, 2, 3), [[2, -1, 3]]),
    ):
        o, lse = torch.full(partials, 5.0), torch.full(partials[:2], -INF)
        out, out_lse = merge_states(o, lse, torch.tensor(index, dtype=torch.int64))
        assert out.shape == (len(index), 2, 3) and out.eq(0).all()
        assert out_lse.shape == (len(index), 2) and out_lse.isneginf().all()


def test_one_partial_is_returned_as_it_is() -> None:
    o, lse = torch.randn(3, 2, 4), torch.randn(3, 2) * 50
    out, out_lse = merge_states(o, lse, torch.tensor([[-1, 2], [0, -1]]))
    assert out.equal(o[[2, 0]]) and out_lse.equal(lse[[2, 0]])


def test_far_apart_log_sum_exps_do_not_overflow() -> None:
    o = torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    lse = torch.tensor([-3e38, 1e4, -1e4])[:, None]
    out, out_lse = merge_states(o, lse, torch.tensor([[0, 1, 2], [0, -1, -1]]))
    assert out.flatten().tolist() == [2.0, 1.0]
    assert out_lse.flatten().tolist() == [1e4, pytest.approx(-3e38)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"o": torch.zeros(4, 2)}, r"o \(4, 2\)"),
        ({"lse": torch.zeros(2, 4)}, r"lse \(2, 4\)"),
        ({"lse": torch.zeros(4, 2, 1)}, r"lse \(4, 2, 1\)"),
        ({"index": torch.zeros(3).long()}, r"index \(3,\)"),
        ({"o": torch.zeros(4, 2, 3).half(), "lse": torch.zeros(4, 2).half()}, "o torch.float16"),
        ({"lse": torch.zeros(4, 2).double()}, "lse torch.float64"),
        ({"index": torch.zeros(3, 2).int()}, "got torch.int32"),
        ({"index": torch.tensor([[1, 4]])}, "index 4, there are 4 partials"),
        ({"o": torch.zeros(0, 2, 3), "lse": torch.zeros(0, 2)}, "index 0, there are 0 partials"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {
        "o": torch.zeros(4, 2, 3),
        "lse": torch.zeros(4, 2),
        "index": torch.zeros(3, 2).long(),
    }
    with pytest.raises(ValueError, match=message):
        merge_states(**(arguments | changes))
