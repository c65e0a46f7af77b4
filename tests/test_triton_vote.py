"""The Triton kernel of the vote against its reference: every field, exactly."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import target_of
from kernels.vote import VoteResult, _launch, vote, vote_ref
from tests.triton_device import DEVICE, counted, on_triton
from tests.vote_cases import META_CASES

pytestmark = on_triton

Batch = dict[str, Any]
META_VALUES = torch.tensor([0.0, -0.0, 0.25, 1.0, -1.0, math.inf, -math.inf, math.nan])


def draw(seed: int, rows: int, samples: int, width: int, k_meta: int | None) -> Batch:
    """Rows of any n, scores that often tie, some samples invalid: those hold rubbish."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    n = integers(1, min(width, 32) + 1, rows)
    # Every row's first n places hold a permutation of its n responses.
    key = torch.rand(rows, samples, width, generator=generator)
    padding = torch.arange(width) >= n[:, None, None]
    order = key.masked_fill(padding, 2).argsort(-1).masked_fill(padding, -1)
    share = torch.rand(rows, 1, generator=generator)
    valid = torch.rand(rows, samples, generator=generator) < share
    valid[4::5] = False
    scores = integers(-1, 2, rows, samples, width)
    # Beyond 32 bits, and beyond what float32 or float64 could add up.
    scores[1::7] *= 2**58 // samples + 1
    scores = torch.where(valid[..., None], scores, integers(-(2**62), 2**62, rows, samples, width))
    order = torch.where(valid[..., None], order, integers(-1, 2, rows, samples, 1) * 2**40)
    meta = META_VALUES[integers(0, len(META_VALUES), rows, samples)]
    return {
        "scores": scores,
        "order": order,
        "valid": valid,
        "n": n,
        "tie_uniform": torch.rand(rows, generator=generator),
        "meta": None if k_meta is None else meta,
        "k_meta": k_meta,
    }


def moved(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def check(batch: Batch) -> VoteResult:
    """The kernel's result, on CPU, after comparing it with the reference's."""
    with counted() as counts:
        result = vote(**moved(batch, DEVICE))
    assert counts["_vote_kernel"] == (len(batch["n"]) > 0)
    result = VoteResult(**{name: value.cpu() for name, value in vars(result).items()})
    for name, value in vars(vote_ref(**moved(batch, torch.device("cpu")))).items():
        torch.testing.assert_close(
            getattr(result, name), value, rtol=0, atol=0, equal_nan=True, msg=name
        )
    return result


# Rows, samples, responses, k_meta.
SIZES = [
    (0, 3, 2, None),
    (40, 1, 1, None),
    (40, 5, 4, None),
    (30, 63, 3, None),
    (10, 64, 2, None),
    (10, 129, 7, None),
    (2, 300, 32, None),
    (4, 20, 300, None),
    (0, 3, 2, 1),
    (40, 1, 1, 1),
    (40, 5, 4, 2),
    (30, 63, 3, 9),
    (10, 64, 2, 64),
    (10, 129, 7, 20),
    (2, 300, 32, 40),
    (2, 7, 3, 2**40),
]


@pytest.mark.parametrize(("rows", "samples", "width", "k_meta"), SIZES)
def test_equals_the_reference(rows: int, samples: int, width: int, k_meta: int | None) -> None:
    check(draw(rows + samples + width, rows, samples, width, k_meta))


def test_drawn_rows_meet_every_case() -> None:
    """Else the comparison above would prove less than it says."""
    batch = draw(0, 60, 6, 4, 2)
    result, n = check(batch), batch["n"]
    tie, votes = result.tie, result.votes
    assert 0 < tie.sum() < len(tie)
    assert set(votes.tolist()) == {0, 1, 2}
    assert (result.best[votes == 0] == -1).all() and (n < 4).any()
    eligible = batch["valid"] & ~batch["meta"].isnan()
    assert (batch["valid"].sum(1) > eligible.sum(1)).any() and (eligible.sum(1) > votes).any()
    # Samples that do not vote, though their score equals one that does.
    left = eligible & ~result.voted
    equal = batch["meta"][:, :, None] == batch["meta"][:, None, :]
    assert (equal & left[:, :, None] & result.voted[:, None, :]).any()
    assert (result.total.abs() > 2**53).any()


def test_samples_are_read_in_several_blocks() -> None:
    target = target_of(torch.empty(0, device=DEVICE))
    for samples, width in ((129, 7), (300, 32), (20, 300)):
        assert samples > 2 * _launch(samples, width, target)["SAMPLES"]


def test_most_samples_and_responses() -> None:
    result = check(draw(3, 1, 1024, 32, 100))
    assert result.votes.tolist() == [100]


def one_row(
    scores: list[list[int]],
    orders: list[list[int]] | None = None,
    valid: list[bool] | None = None,
    uniform: float = 0.5,
    meta: list[float] | None = None,
    k_meta: int | None = None,
) -> VoteResult:
    return check(
        {
            "scores": torch.tensor([scores]),
            "order": torch.tensor([orders or [list(range(len(scores[0])))] * len(scores)]),
            "valid": torch.tensor([valid or [True] * len(scores)]),
            "n": torch.tensor([len(scores[0])]),
            "tie_uniform": torch.tensor([uniform]),
            "meta": None if meta is None else torch.tensor([meta]),
            "k_meta": k_meta,
        }
    )


def test_paper_votes() -> None:
    result = one_row([[1, 5], [5, 6], [4, 8], [7, 6]])
    assert result.total.tolist() == [[17, 25]] and result.mean.tolist() == [[4.25, 6.25]]
    assert (result.best.item(), result.votes.item(), result.tie.item()) == (1, 4, False)

    result = one_row([[1, 5], [5, 6], [4, 8], [7, 6]], meta=[0.9, 0.1, 0.8, 0.2], k_meta=2)
    assert result.total.tolist() == [[5, 13]]
    assert result.voted.tolist() == [[True, False, True, False]]

    result = one_row([[8, 8], [9, 5], [10, 7]], orders=[[0, 1], [1, 0], [1, 0]])
    assert result.total.tolist() == [[20, 27]] and result.best.item() == 1


def test_invalid_samples_have_no_vote() -> None:
    result = one_row([[9, 1], [9, 1]], valid=[False, False])
    assert (result.best.item(), result.votes.item(), result.tie.item()) == (-1, 0, False)
    assert result.total.tolist() == [[0, 0]] and result.mean.isnan().all()
    result = one_row([[-5, -3], [1000, 1000]], valid=[True, False])
    assert result.mean.tolist() == [[-5.0, -3.0]] and result.best.item() == 1


@pytest.mark.parametrize(
    ("meta", "k_meta", "voted"),
    META_CASES,
)
def test_meta_scores_choose_the_voters(meta: list[float], k_meta: int, voted: list[bool]) -> None:
    result = one_row([[1, 2], [3, 4], [5, 6]], meta=meta, k_meta=k_meta)
    assert result.voted.tolist() == [voted]
    assert (result.best.item() == -1) == (not any(voted))


def tied(n: Tensor, uniform: Tensor) -> VoteResult:
    """Rows of one sample that scores all its n responses alike."""
    rows, width = len(n), int(n.max())
    response = torch.arange(width)
    return check(
        {
            "scores": torch.full((rows, 1, width), 3),
            "order": torch.where(response < n[:, None], response, -1)[:, None],
            "valid": torch.ones(rows, 1, dtype=torch.bool),
            "n": n,
            "tie_uniform": uniform,
        }
    )


def test_ties_are_drawn_evenly_and_flagged() -> None:
    result = tied(torch.full((60,), 3), (torch.arange(60) + 0.5) / 60)
    assert result.best.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert result.tie.all()


def test_largest_uniform_stays_among_the_tied() -> None:
    n = torch.arange(1, 33)
    result = tied(n, torch.full((32,), 1 - 2**-24))
    assert result.best.equal(n - 1) and result.tie.equal(n > 1)


def test_uniforms_below_a_boundary_stay_below_it() -> None:
    """Where the product with the number of the tied, rounded to float32, would reach it."""
    pairs = torch.tensor([(n, i) for n in range(2, 33) for i in range(1, n)])
    n, boundary = pairs.unbind(1)
    uniform = (boundary.double() / n).float()
    below = uniform.nextafter(torch.zeros(()))
    uniform = torch.where(uniform.double() * n < boundary, uniform, below)
    chosen = (uniform * n == boundary).nonzero()[::4, 0]
    n, boundary, uniform = n[chosen], boundary[chosen], uniform[chosen]
    assert len(n) > 20
    assert tied(n, uniform).best.equal(boundary - 1)


def test_takes_slices_and_expanded_rows() -> None:
    batch = moved(draw(5, 9, 6, 4, 3), DEVICE)
    batch["n"][:] = 4
    slices = {
        "scores": F.pad(batch["scores"], (1, 2, 3, 0), value=99)[:, 3:, 1:-2],
        "order": torch.tensor([2, 0, 3, 1], device=DEVICE).expand(9, 6, 4),
        "valid": F.pad(batch["valid"], (2, 1), value=True)[:, 2:-1],
        "meta": F.pad(batch["meta"], (1, 1), value=9.0)[:, 1:-1],
    }
    assert not any(x.is_contiguous() for x in slices.values())
    check(batch | slices)


def test_refuses_what_it_cannot_read() -> None:
    batch = moved(draw(6, 4, 6, 4, 3), DEVICE)
    for name in ("scores", "order", "valid", "meta"):
        value = batch[name].mT.contiguous().mT
        with pytest.raises(ValueError, match="last dimension must be contiguous, got shape"):
            vote(**(batch | {name: value}))
    for name in ("n", "tie_uniform"):
        value = batch[name].repeat_interleave(2)[::2]
        with pytest.raises(ValueError, match=r"got shape \(4,\) with strides \(2,\)"):
            vote(**(batch | {name: value}))
