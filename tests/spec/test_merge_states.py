"""Merging partial attention results, against one softmax over all keys."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import cpp
from kernels.merge_states import merge_states, merge_states_ref
from tests.implementations import DTYPES, HALVES, Implementation, assert_exact, check_refused

INF, NAN = math.inf, math.nan
# Rows, columns and partials: a Triton program in part and full, several of them, nothing to merge.
SIZES = [(1, 1, 9), (5, 3, 9), (43, 8, 9), (129, 2, 9), (4, 0, 9), (0, 3, 9), (2, 3, 0)]


def merge(
    on: Implementation, o: Tensor, lse: Tensor, index: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The operation; in C++, which has it within attention alone, that function."""
    if on.name != "cpp" or not len(index):
        return merge_states(o, lse, index, dtype)
    (rows, columns), (_, heads, width) = index.shape, o.shape
    out = torch.empty(rows, heads, width, dtype=dtype)
    out_lse = torch.empty(rows, heads)
    cpp.call("merge", out.dtype, o, lse, index, rows, columns, heads, width, out, out_lse)
    return out, out_lse


def draw(
    on: Implementation, seed: int, rows: int, columns: int, count: int = 9
) -> tuple[Tensor, Tensor, Tensor]:
    """Partials, near and far from each other; some heads are empty, and then NaN in o. Each row
    names distinct ones, with gaps in between."""
    rng = np.random.default_rng(seed)
    heads, width = 1 + seed % 3, (20, 5, 33)[seed % 3]
    o = rng.standard_normal((count, heads, width), dtype=np.float32)
    lse = rng.standard_normal((count, heads), dtype=np.float32) * rng.choice([0.1, 5, 60])
    empty = rng.random((count, heads)) < rng.choice([0, 0.3])
    o[empty], lse[empty] = NAN if on.name != "torch" else 3e38, -INF
    index = np.full((rows, columns), -1)
    for row in index:
        named = rng.permutation(count)[: rng.integers(0, min(columns, count) + 1)]
        row[np.sort(rng.permutation(columns)[: len(named)])] = named
    a, b, c = (torch.from_numpy(x).to(on.device) for x in (o, lse.astype(np.float32), index))
    return a, b, c


def by_hand(o: Tensor, lse: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """exp(lse) is the sum of a partial's weights, o times that their weighted sum."""
    out = o.new_zeros(len(index), *o.shape[1:])
    out_lse = lse.new_full((len(index), lse.shape[1]), -INF)
    for r, row in enumerate(index.tolist()):
        for h in range(o.shape[1]):
            mine = [j for j in row if j >= 0 and lse[j, h] > -INF]
            if mine:
                top = max(float(lse[j, h]) for j in mine)
                weights = [math.exp(float(lse[j, h]) - top) for j in mine]
                weighted = sum(w * o[j, h] for w, j in zip(weights, mine, strict=True))
                out[r, h] = weighted / sum(weights)
                out_lse[r, h] = top + math.log(sum(weights))
    return out, out_lse


@pytest.mark.parametrize("size", SIZES)
def test_reference_is_the_definition(size: tuple[int, int, int]) -> None:
    for seed in range(6):
        o, lse, index = draw(Implementation("torch"), seed, *size)
        arguments = o.double(), lse.double(), index
        # Weights are exp(lse - top), whose argument is rounded once; |lse| is below 300.
        for found, expected in zip(merge_states_ref(*arguments), by_hand(*arguments), strict=True):
            torch.testing.assert_close(found, expected, rtol=300 * 2.0**-52, atol=300 * 2.0**-52)


@pytest.mark.parametrize("size", SIZES)
def test_values(on: Implementation, size: tuple[int, int, int]) -> None:
    """A row with nothing to merge is 0."""
    for seed in range(6):
        o, lse, index = draw(on, seed, *size)
        results = on.run(lambda *given: merge(on, *given), o, lse, index)
        assert_exact(results, merge_states_ref, o.nan_to_num(), lse, index)
        assert results[0][results[1].isneginf()].eq(0).all()


@pytest.mark.implementations("torch")
def test_float64(on: Implementation) -> None:
    o, lse, index = draw(on, 0, 43, 8)
    on.check(merge_states, merge_states_ref, o.double(), lse.double(), index)


def test_absent_and_empty_partials_change_no_bit(on: Implementation) -> None:
    """Columns of -1, and partials that saw no key, at any place and whatever finite they hold."""
    for seed in range(6):
        o, lse, index = draw(on, seed, 6, 5)
        empty = torch.full_like(o[:2], 3e38)
        empty[1] = -1e-40
        o, lse = torch.cat([o, empty]), torch.cat([lse, torch.full_like(lse[:2], -INF)])
        expected = merge(on, o, lse, index)
        for filler in (-1, 9, 10):
            column = torch.full_like(index[:, :1], filler)
            a, b = index[:, : seed % 6], index[:, seed % 6 :]
            wider = torch.cat([a, column, b, column], 1)
            for found, wanted in zip(merge(on, o, lse, wider), expected, strict=True):
                assert found.equal(wanted)


def test_a_row_depends_on_its_own_partials_alone(on: Implementation) -> None:
    """Bit for bit, whatever other rows there are; also where all other partials are NaN."""
    o, lse, index = draw(on, 3, 30, 6, count=40)
    out, out_lse = merge(on, o, lse, index)
    assert out.isfinite().all() and not out_lse.isnan().any()
    for r in range(0, 30, 3):
        named = index[r : r + 1]
        mine = named[named >= 0]
        only = torch.full_like(o, NAN), torch.full_like(lse, NAN)
        only[0][mine], only[1][mine] = o[mine], lse[mine]
        for partials in ((o, lse), only):
            alone, alone_lse = merge(on, *partials, named)
            assert alone[0].equal(out[r]) and alone_lse[0].equal(out_lse[r])


def test_nan_shows_in_the_rows_that_name_it(on: Implementation) -> None:
    """In o in its own head and channel; in a log-sum-exp in all of its head."""
    o, lse = torch.ones(4, 2, 4, device=on.device), torch.zeros(4, 2, device=on.device)
    o[1, 0, 2] = lse[2, 1] = NAN
    index = torch.tensor([[0, 1], [0, 3], [2, 3], [-1, 0]], device=on.device)
    out, out_lse = merge(on, o, lse, index)
    channels = [[2, 1, channel] for channel in range(4)]
    assert out.isnan().nonzero().tolist() == [[0, 0, 2], *channels]
    assert out_lse.isnan().nonzero().tolist() == [[2, 1]]


def test_one_partial_stays_as_it_is(on: Implementation) -> None:
    o, lse = on.draw(3, 2, 4), 50 * on.draw(3, 2, seed=1)
    out, out_lse = merge(on, o, lse, torch.tensor([[-1, 2], [0, -1]], device=on.device))
    assert out.equal(o[[2, 0]]) and out_lse.equal(lse[[2, 0]])


def test_far_apart_log_sum_exps_do_not_overflow(on: Implementation) -> None:
    o = torch.tensor([1.0, 2.0, 3.0], device=on.device)[:, None, None]
    lse = torch.tensor([-3e38, 1e4, -1e4], device=on.device)[:, None]
    index = torch.tensor([[0, 1, 2], [0, -1, -1]], device=on.device)
    out, out_lse = merge(on, o, lse, index)
    assert out.flatten().tolist() == [2.0, 1.0]
    assert out_lse.flatten().tolist() == [1e4, pytest.approx(-3e38)]


def test_the_output_is_rounded_once(on: Implementation) -> None:
    o, lse, index = draw(on, 1, 7, 4)
    wide, wide_lse = merge(on, o, lse, index)
    for dtype in set(HALVES) & set(DTYPES[on.name]):
        out, out_lse = merge(on, o, lse, index, dtype)
        assert out.equal(wide.to(dtype)) and out_lse.equal(wide_lse)


def test_bad_arguments() -> None:
    check_refused(
        merge_states,
        {"o": torch.zeros(4, 2, 3), "lse": torch.zeros(4, 2), "index": torch.zeros(3, 2).long()},
        ({"o": torch.zeros(4, 2)}, r"o \(4, 2\)"),
        ({"lse": torch.zeros(2, 4)}, r"lse \(2, 4\)"),
        ({"lse": torch.zeros(4, 2, 1)}, r"lse \(4, 2, 1\)"),
        ({"index": torch.zeros(3).long()}, r"index \(3,\)"),
        ({"o": torch.zeros(4, 2, 3).half(), "lse": torch.zeros(4, 2).half()}, "o torch.float16"),
        ({"lse": torch.zeros(4, 2).double()}, "lse torch.float64"),
        ({"index": torch.zeros(3, 2).int()}, "got torch.int32"),
        ({"index": torch.tensor([[1, 4]])}, "index 4, there are 4 partials"),
        ({"o": torch.zeros(0, 2, 3), "lse": torch.zeros(0, 2)}, "index 0, there are 0 partials"),
    )
