"""Votes, in plain torch on any device: the paper's, written cases, and a brute force."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.vote import Rule, VoteResult, points_of, unpermute, vote, vote_ref

PAPER = [[1, 5], [5, 6], [4, 8], [7, 6]]
Vote = Callable[..., VoteResult]
both = pytest.mark.parametrize("op", [vote, vote_ref])


def assert_same(result: VoteResult, reference: VoteResult) -> None:
    for name, value in vars(reference).items():
        torch.testing.assert_close(
            getattr(result, name), value, rtol=0, atol=0, equal_nan=True, msg=name
        )


def one_row(
    op: Vote,
    scores: list[list[int]],
    orders: list[list[int]] | None = None,
    valid: list[bool] | None = None,
    uniform: float = 0.5,
    meta: list[float] | None = None,
    k_meta: int | None = None,
    rule: Rule = "sum",
) -> VoteResult:
    orders = orders or [list(range(len(scores[0])))] * len(scores)
    return op(
        torch.tensor([scores]),
        torch.tensor([orders]),
        torch.tensor([valid or [True] * len(scores)]),
        torch.tensor([len(scores[0])]),
        torch.tensor([uniform]),
        None if meta is None else torch.tensor([meta]),
        k_meta,
        rule,
    )


@both
def test_votes_of_the_paper(op: Vote) -> None:
    """Samples sum; meta scores keep samples 1 and 3; scores given in reversed order are turned."""
    result = one_row(op, PAPER)
    assert result.total.tolist() == [[17, 25]] and result.mean.tolist() == [[4.25, 6.25]]
    assert (result.best.item(), result.votes.item(), result.tie.item()) == (1, 4, False)
    result = one_row(op, PAPER, meta=[0.9, 0.1, 0.8, 0.2], k_meta=2)
    assert result.total.tolist() == [[5, 13]] and result.votes.item() == 2
    assert result.voted.tolist() == [[True, False, True, False]]
    result = one_row(op, [[8, 8], [9, 5], [10, 7]], orders=[[0, 1], [1, 0], [1, 0]])
    assert result.total.tolist() == [[20, 27]] and result.best.item() == 1


@both
def test_other_rules_and_weights_of_the_paper(op: Vote) -> None:
    """Of two responses a judgement sets one a deviation above, the other one below."""
    result = one_row(op, PAPER, rule="standardised")
    assert result.total.tolist() == [[-2.0, 2.0]] and result.mean.tolist() == [[-0.5, 0.5]]
    result = one_row(op, PAPER, rule="borda")
    assert result.total.tolist() == [[1.0, 3.0]] and result.best.item() == 1
    meta = [math.log(2.0), math.nan, 0.0, math.log(4.0)]  # weights 1/2, none, 1/4, 1
    result = one_row(op, PAPER, meta=meta)
    assert result.total.tolist() == [pytest.approx([8.5, 10.5], rel=1e-7)]
    assert result.mean.tolist() == [pytest.approx([8.5 / 1.75, 6.0], rel=1e-7)]
    assert result.voted.tolist() == [[True, False, True, True]] and result.votes.item() == 3
    result = one_row(op, PAPER, meta=[-math.inf, 3.0, -math.inf, -40.0])
    assert result.total.tolist() == [[5.0, 6.0]] and result.votes.item() == 4
    result = one_row(op, PAPER, meta=[-math.inf] * 4)
    assert result.total.tolist() == [[17.0, 25.0]]


def test_points_of_a_judgement() -> None:
    assert points_of([3, 9, 3, 1], "sum") == [3, 9, 3, 1]
    assert points_of([3, 9, 3, 1], "borda") == [1.5, 3.0, 1.5, 0.0]
    assert (
        points_of([7, 7], "standardised") == [0.0, 0.0] and points_of([7, 7], "borda") == [0.5] * 2
    )
    found = points_of([3, 9, 3, 1], "standardised")
    assert found == pytest.approx([-1 / math.sqrt(9), 5 / 3, -1 / 3, -1.0])
    for rule in ("sum", "standardised", "borda"):
        assert points_of([-4], rule) == [-4]


def test_unpermute_puts_each_score_at_its_response() -> None:
    scores, order = torch.tensor([[7, 8, 9, 99]]), torch.tensor([[2, 0, 1, -1]])
    assert unpermute(scores, order).tolist() == [[8, 9, 7, 0]]
    with pytest.raises(ValueError, match="differ in shape"):
        unpermute(scores, order[:, :3])


@both
def test_uniforms_below_a_boundary_stay_below_it(op: Vote) -> None:
    """Where the product with the number of the tied, rounded to float32, would reach it, or the
    boundary is 1."""
    pairs = torch.tensor([(n, i) for n in range(1, 33) for i in range(1, n + 1)])
    n, boundary = pairs.unbind(1)
    uniform = (boundary.double() / n).float()
    below = uniform.nextafter(torch.zeros(()))
    uniform = torch.where(uniform.double() * n < boundary, uniform, below)
    reached, last = (x.nonzero()[:, 0] for x in (uniform * n == boundary, boundary == n))
    assert len(reached) > 80
    chosen = torch.cat([reached[::4], last])
    for count, place, u in zip(*(x[chosen].tolist() for x in (n, boundary, uniform)), strict=True):
        result = one_row(op, [[3] * count], uniform=u)
        assert result.best.item() == place - 1 and result.tie.item() == (count > 1)


@both
def test_totals_are_exact_integers(op: Vote) -> None:
    """Beyond 2^53, where float64 is not; and scores of an invalid sample are not added."""
    scores = [[2**60, 2**60 + 1], [1, 1], [2**62, -(2**62)]]
    result = one_row(op, scores, valid=[True, True, False])
    assert result.total.tolist() == [[2**60 + 1, 2**60 + 2]]
    assert (result.best.item(), result.tie.item()) == (1, False)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, torch.Tensor | int | str | None]:
    """All but the orders are slices of wider tensors."""
    rows, samples, width = draw(st.integers(0, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 5))

    def several(values: st.SearchStrategy, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape)
        numbers = draw(st.lists(values, min_size=size, max_size=size))
        inner = torch.tensor(numbers, dtype=dtype).reshape(shape)
        return F.pad(inner, (0, 1) * len(shape))[tuple(map(slice, shape))]

    n = several(st.integers(1, width), rows, dtype=torch.int64)
    order = [
        [draw(st.permutations(range(count))) + [-1] * (width - count) for _ in range(samples)]
        for count in n.tolist()
    ]
    quality = st.sampled_from([0.0, -0.0, 0.25, math.inf, -math.inf, math.nan])
    uniform = st.floats(0, 1, exclude_max=True, width=32)
    with_meta = draw(st.sampled_from([True, True, False]))
    return {
        "scores": several(st.integers(-3, 3), rows, samples, width, dtype=torch.int64),
        "order": torch.tensor(order, dtype=torch.int64).reshape(rows, samples, width),
        "valid": several(st.sampled_from([True, True, False]), rows, samples, dtype=torch.bool),
        "n": n,
        "tie_uniform": several(uniform, rows, dtype=torch.float32),
        "meta": several(quality, rows, samples, dtype=torch.float32) if with_meta else None,
        "k_meta": draw(st.sampled_from([None, 1, 2, samples + 1])) if with_meta else None,
        "rule": draw(st.sampled_from(["sum", "standardised", "borda"])),
    }


def test_deviations_are_rounded_as_ieee_says() -> None:
    """Where a library's square root is off in the last bit, on this processor or another."""
    for low in range(-40, 41):
        result = one_row(vote, [[0, 1, -3, low]], rule="standardised")
        assert result.total.tolist() == [points_of([0, 1, -3, low], "standardised")]


def points_by_numpy(scores: np.ndarray, rule: Rule) -> np.ndarray:
    if rule == "standardised" and len(scores) > 1:
        return (scores - scores.mean()) / (scores.std() or math.inf)
    if rule == "borda" and len(scores) > 1:
        ordered = np.sort(scores)  # the mean of the first and the last place of its equals
        return np.array([np.flatnonzero(ordered == score)[[0, -1]].mean() for score in scores])
    return scores.astype(float)


@settings(max_examples=200, deadline=None)
@given(batches())
def test_votes_equal_brute_force_and_reference(batch: dict) -> None:
    """Voters one by one, and numpy's mean and deviation; totals to rounding, if not whole."""
    assert len(batch["scores"]) < 2 or not batch["scores"].is_contiguous()
    result = vote(**batch)
    assert_same(result, vote_ref(**batch))
    k_meta, meta, width = batch["k_meta"], batch["meta"], batch["scores"].shape[2]
    weighs = meta is not None and k_meta is None
    is_whole = batch["rule"] == "sum" and not weighs
    assert result.total.dtype == (torch.int64 if is_whole else torch.float64)
    for r, count in enumerate(batch["n"].tolist()):
        voters = [k for k, ok in enumerate(batch["valid"][r].tolist()) if ok]
        quality = [0.0] * len(batch["valid"][r]) if meta is None else meta[r].tolist()
        voters = [k for k in voters if not math.isnan(quality[k])]
        while k_meta is not None and len(voters) > k_meta:
            worst = min(quality[k] for k in voters)
            voters.remove(max(k for k in voters if quality[k] == worst))
        assert result.voted[r].nonzero()[:, 0].tolist() == voters
        assert result.votes[r].item() == len(voters)
        totals, weights = np.zeros(width), 0.0
        top = max((quality[k] for k in voters), default=0.0)
        for k in voters:
            shown = batch["order"][r, k, :count].argsort()
            points = points_by_numpy(batch["scores"][r, k, shown].numpy(), batch["rule"])
            weight = math.exp(quality[k] - top) if weighs and quality[k] != top else 1.0
            totals[:count] += weight * points
            weights += weight
        error = 0 if is_whole else 1e-6
        means = np.where(np.arange(width) < count, totals, math.nan) / (weights or math.nan)
        np.testing.assert_allclose(result.total[r], totals, rtol=error, atol=error)
        np.testing.assert_allclose(result.mean[r], means, rtol=1e-6, atol=1e-6)
        if not voters:
            assert result.best[r] == -1 and not result.tie[r]
            continue
        tied = np.flatnonzero(result.total[r, :count] == result.total[r, :count].max())
        place = math.floor(Fraction(batch["tie_uniform"][r].item()) * len(tied))
        assert result.best[r].item() == tied[place]
        assert result.tie[r].item() == (len(tied) > 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(2, 3)}, r"scores must be \(R, K, N\)"),
        ({"scores": torch.zeros(2, 3, 4)}, "scores must be .* torch.int64, got .*float32"),
        ({"order": torch.zeros(2, 3, 3, dtype=torch.int64)}, "order must be"),
        ({"valid": torch.zeros(2, 3)}, "valid must be .* torch.bool"),
        ({"n": torch.zeros(3, dtype=torch.int64)}, "n must be"),
        ({"tie_uniform": torch.zeros(2, dtype=torch.float64)}, "tie_uniform must be"),
        ({"k_meta": 2}, "k_meta = 2 needs meta scores"),
        ({"rule": "mean"}, "rule 'mean' is not sum, standardised or borda"),
        ({"meta": torch.zeros(2, 3), "k_meta": 0}, "at least 1, got 0"),
        ({"meta": torch.zeros(2, 4), "k_meta": 1}, "meta must be"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {
        "scores": torch.zeros(2, 3, 4, dtype=torch.int64),
        "order": torch.arange(4).expand(2, 3, 4),
        "valid": torch.ones(2, 3, dtype=torch.bool),
        "n": torch.full((2,), 4),
        "tie_uniform": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=message):
        vote(**(arguments | change))
