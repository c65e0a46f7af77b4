"""Votes, in plain torch on any device: the paper's, written cases, and a brute force."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.vote import Rule, VoteResult, points_of, unpermute, vote, vote_ref

# Meta scores of three samples, how many may vote, and who does.
META_CASES = [
    ([math.nan, 0.0, 1.0], 1, [False, False, True]),
    ([math.nan, math.nan, math.nan], 2, [False, False, False]),
    ([0.5, 0.5, 0.5], 2, [True, True, False]),
    ([0.1, 0.2, 0.3], 9, [True, True, True]),
    ([-math.inf, math.nan, -math.inf], 3, [True, False, True]),
    ([math.nan, -math.inf, math.inf], 2, [False, True, True]),
    ([-0.0, 0.0, -1.0], 1, [True, False, False]),
]
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
def test_an_invalid_sample_has_no_vote_and_is_not_zero(op: Vote) -> None:
    result = one_row(op, [[9, 1], [9, 1]], valid=[False, False])
    assert (result.best.item(), result.votes.item(), result.tie.item()) == (-1, 0, False)
    assert result.total.tolist() == [[0, 0]] and result.mean.isnan().all()
    result = one_row(op, [[-5, -3], [1000, 1000]], valid=[True, False])
    assert result.total.tolist() == [[-5, -3]] and result.mean.tolist() == [[-5.0, -3.0]]
    assert result.best.item() == 1


@both
@pytest.mark.parametrize(("meta", "k_meta", "voted"), META_CASES)
def test_meta_scores_choose_the_voters(
    op: Vote, meta: list[float], k_meta: int, voted: list[bool]
) -> None:
    result = one_row(op, [[1, 2], [3, 4], [5, 6]], meta=meta, k_meta=k_meta)
    assert result.voted.tolist() == [voted]
    assert (result.best.item() == -1) == (not any(voted))


@both
def test_ties_are_drawn_evenly_and_flagged(op: Vote) -> None:
    for i in range(300):
        result = one_row(op, [[4, 9, 1, 9, 9]], uniform=(i + 0.5) / 300)
        assert result.tie.item() and result.best.item() == (1, 3, 4)[i // 100]


@both
def test_largest_uniform_stays_among_the_tied(op: Vote) -> None:
    for count in range(1, 21):
        result = one_row(op, [[3] * count], uniform=1 - 2**-24)
        assert result.best.item() == count - 1
        assert result.tie.item() == (count > 1)


@both
def test_uniforms_below_a_boundary_stay_below_it(op: Vote) -> None:
    """Where the product with the number of the tied, rounded to float32, would reach it."""
    pairs = torch.tensor([(n, i) for n in range(2, 33) for i in range(1, n)])
    n, boundary = pairs.unbind(1)
    uniform = (boundary.double() / n).float()
    below = uniform.nextafter(torch.zeros(()))
    uniform = torch.where(uniform.double() * n < boundary, uniform, below)
    chosen = (uniform * n == boundary).nonzero()[::4, 0]
    assert len(chosen) > 20
    for count, place, u in zip(*(x[chosen].tolist() for x in (n, boundary, uniform)), strict=True):
        assert one_row(op, [[3] * count], uniform=u).best.item() == place - 1


@both
def test_totals_are_exact_integers(op: Vote) -> None:
    """Beyond 2^53, where float64 is not; and scores of an invalid sample are not added."""
    scores = [[2**60, 2**60 + 1], [1, 1], [2**62, -(2**62)]]
    result = one_row(op, scores, valid=[True, True, False])
    assert result.total.tolist() == [[2**60 + 1, 2**60 + 2]]
    assert (result.best.item(), result.tie.item()) == (1, False)


def test_takes_slices_and_expanded_rows() -> None:
    generator = torch.Generator().manual_seed(5)
    scores = torch.randint(-1, 2, (9, 9, 7), generator=generator)[:, 3:, 1:-2]
    order = torch.tensor([2, 0, 3, 1]).expand(9, 6, 4)
    valid = (torch.rand(9, 9, generator=generator) < 0.7)[:, 2:-1]
    meta = torch.randn(9, 8, generator=generator)[:, 1:-1]
    arguments = (scores, order, valid, torch.full((9,), 4), torch.rand(9, generator=generator))
    assert not any(x.is_contiguous() for x in (scores, order, valid, meta))
    assert_same(vote(*arguments, meta, 3), vote_ref(*arguments, meta, 3))


@st.composite
def batches(draw: st.DrawFn) -> dict[str, torch.Tensor | int | str | None]:
    rows, samples, width = draw(st.integers(0, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 5))

    def several(values: st.SearchStrategy, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape)
        numbers = draw(st.lists(values, min_size=size, max_size=size))
        return torch.tensor(numbers, dtype=dtype).reshape(shape)

    n = several(st.integers(1, width), rows, dtype=torch.int64)
    order = [
        [draw(st.permutations(range(count))) + [-1] * (width - count) for _ in range(samples)]
        for count in n.tolist()
    ]
    quality = st.sampled_from([0.0, 0.25, 1.0, -1.0, math.inf, -math.inf, math.nan])
    uniform = st.floats(0, 1, exclude_max=True, width=32)
    with_meta = draw(st.booleans())
    return {
        "scores": several(st.integers(-3, 3), rows, samples, width, dtype=torch.int64),
        "order": torch.tensor(order, dtype=torch.int64).reshape(rows, samples, width),
        "valid": several(st.booleans(), rows, samples, dtype=torch.bool),
        "n": n,
        "tie_uniform": several(uniform, rows, dtype=torch.float32),
        "meta": several(quality, rows, samples, dtype=torch.float32) if with_meta else None,
        "k_meta": draw(st.none() | st.integers(1, 8)) if with_meta else None,
        "rule": draw(st.sampled_from(["sum", "standardised", "borda"])),
    }


def test_deviations_are_rounded_as_ieee_says() -> None:
    """Where a library's square root is off in the last bit, on this processor or another."""
    for low in range(-40, 41):
        result = one_row(vote, [[0, 1, -3, low]], rule="standardised")
        assert result.total.tolist() == [points_of([0, 1, -3, low], "standardised")]


@settings(max_examples=200, deadline=None)
@given(batches())
def test_votes_equal_brute_force_and_reference(batch: dict) -> None:
    result = vote(**batch)
    assert_same(result, vote_ref(**batch))
    k_meta, meta, width = batch["k_meta"], batch["meta"], batch["scores"].shape[2]
    for r, count in enumerate(batch["n"].tolist()):
        candidates = [k for k, ok in enumerate(batch["valid"][r].tolist()) if ok]
        if meta is not None:
            quality = meta[r].tolist()
            candidates = [k for k in candidates if quality[k] == quality[k]]
            while k_meta is not None and len(candidates) > k_meta:
                worst = min(quality[k] for k in candidates)
                candidates.remove(max(k for k in candidates if quality[k] == worst))
        assert result.voted[r].nonzero()[:, 0].tolist() == candidates
        assert result.votes[r].item() == len(candidates)
        weighs = meta is not None and k_meta is None
        if batch["rule"] != "sum" or weighs:
            assert result.total.dtype == torch.float64
            check_weighed(batch, result, r, candidates)
            continue
        given_to = {i: 0 for i in range(count)}
        for k in candidates:
            shown = batch["order"][r, k].tolist()
            for i in given_to:
                given_to[i] += batch["scores"][r, k, shown.index(i)].item()
        assert result.total[r].tolist() == [given_to.get(i, 0) for i in range(width)]
        if not candidates:
            assert result.best[r] == -1 and not result.tie[r]
            continue
        tied = [i for i in given_to if given_to[i] == max(given_to.values())]
        place = math.floor(Fraction(batch["tie_uniform"][r].item()) * len(tied))
        assert result.best[r].item() == tied[place]
        assert result.tie[r].item() == (len(tied) > 1)


def check_weighed(batch: dict, result: VoteResult, r: int, candidates: list[int]) -> None:
    """Against numpy's mean and deviation, and ranks by sorting; totals to rounding."""
    count, rule, meta = int(batch["n"][r]), batch["rule"], batch["meta"]
    totals, weights = np.zeros(count), 0.0
    for k in candidates:
        shown = batch["order"][r, k].tolist()
        scores = np.array([batch["scores"][r, k, shown.index(i)].item() for i in range(count)])
        points = scores.astype(float)
        if count > 1 and rule == "standardised":
            points = (scores - scores.mean()) / (scores.std() or math.inf)
        elif count > 1 and rule == "borda":
            ordered = np.sort(scores)  # the mean of the first and the last place of its equals
            points = np.array(
                [np.flatnonzero(ordered == score)[[0, -1]].mean() for score in scores]
            )
        weight = 1.0
        if meta is not None and batch["k_meta"] is None:
            top = max(meta[r, each].item() for each in candidates)
            weight = 1.0 if meta[r, k] == top else math.exp(meta[r, k].item() - top)
        totals, weights = totals + weight * points, weights + weight
    torch.testing.assert_close(result.total[r, :count].numpy(), totals, rtol=1e-6, atol=1e-6)
    assert result.votes[r].item() == len(candidates)
    if candidates:
        mean = result.mean[r, :count].numpy()
        torch.testing.assert_close(mean, totals / weights, rtol=1e-6, atol=1e-6)
        best = int(result.best[r])
        assert result.total[r, best] == result.total[r, :count].max()
    else:
        assert result.best[r] == -1


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
