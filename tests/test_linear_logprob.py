"""`linear_logprob` against float64 logits and autograd, and what it holds in memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.logprob import linear_logprob, linear_logprob_ref
from kernels.logprob import torch_impl as module
from kernels.logprob.torch_impl import LogProbs, TorchLogitHead


def problem(
    tokens: int, hidden: int, vocab: int, peaked: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets in float64; peaked: one token has nearly all the mass."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scale = 6.0 if peaked else 0.3
    target = torch.randint(vocab, (tokens,), generator=generator)
    return randn(tokens, hidden), scale * randn(vocab, hidden) / hidden**0.5, target


def gradients(operation: Any, x: Tensor, w: Tensor, t: Tensor, *options: Any) -> list[Tensor]:
    """All outputs, and the gradients of a sum of them with uneven factors."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    found = operation(x, w, t, *options)
    generator = torch.Generator().manual_seed(7)
    total = x.new_zeros(())
    for each in found:
        factor = torch.randn(len(each), generator=generator, dtype=torch.float64).to(each.dtype)
        factor[::3] = 0  # tokens without loss
        total = total + (factor * each).sum()
    total.backward()
    assert x.grad is not None and w.grad is not None
    return [*(each.detach() for each in found), x.grad, w.grad]


def assert_as_near(
    found: Sequence[Tensor],
    plain: Sequence[Tensor],
    exact: Sequence[Tensor],
    target: Tensor,
    least: float = 2**-21,
) -> None:
    """Whether what was found is as near to the exact values, in the norm of all elements, as 4
    times the plain computation in its dtype is, or as `least` of their own norm; the last, the
    weight's gradient, in the rows that no target names by themselves too."""
    other = torch.ones(len(exact[-1]), dtype=torch.bool)
    other[target.cpu()] = False
    lists = ([*each, each[-1].cpu()[other]] for each in (found, plain, exact))
    for ours, theirs, value in zip(*lists, strict=True):
        ours, theirs = ours.double().cpu(), theirs.double()
        error, plain_error = (ours - value).norm(), (theirs - value).norm()
        assert error <= 4 * plain_error + least * value.norm(), (error, plain_error, value.norm())


@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("tokens", [0, 1, 16, 37])
def test_values_and_gradients_are_those_of_the_definition(
    tokens: int, softcap: float | None, temperature: float, peaked: bool
) -> None:
    """In float64 to its last digits; in float32 as far as its rounding reaches, by relative norm,
    which sees a wrong magnitude as well as a wrong direction. Several chunks, the last one ragged.
    """
    in_chunks = partial(linear_logprob, chunk_size=16)
    x, w, t = problem(tokens, 24, 211, peaked)
    expected = gradients(linear_logprob_ref, x, w, t, softcap, temperature)
    for found, exact in zip(
        gradients(in_chunks, x, w, t, softcap, temperature), expected, strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)
    short = x.float(), w.float(), t, softcap, temperature
    narrow, plain = gradients(in_chunks, *short), gradients(linear_logprob_ref, *short)
    assert_as_near(narrow[3:], plain[3:], expected[3:], t)
    if tokens:  # values are differences of numbers as large as the log-sum-exp
        unit = 2**-23 * expected[2].abs().max()
        for values in zip(narrow[:3], plain, expected, strict=False):
            error, plain_error = ((x - values[2]).abs().max() for x in values[:2])
            assert error <= 4 * plain_error + unit


def test_a_rows_results_do_not_depend_on_its_company() -> None:
    x, w, t = problem(90, 32, 300, peaked=False)
    x, w = x.float(), w.float()
    whole = gradients(linear_logprob, x, w, t, None, 0.7)
    again = gradients(linear_logprob, x, w, t, None, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    cut = gradients(partial(linear_logprob, chunk_size=32), x, w, t, None, 0.7)
    for a, b in zip(whole[:4], cut[:4], strict=True):  # all but the weight's, a sum over chunks
        assert torch.equal(a, b)
    few = linear_logprob(x[5:9], w, t[5:9], None, 0.7)
    for a, b in zip(few, whole, strict=False):
        assert torch.equal(a, b[5:9])


@contextmanager
def rows_computed() -> Iterator[list[int]]:
    """How many rows of logits are made, each time that some are."""
    rows: list[int] = []
    made = TorchLogitHead.log_probs

    def counted(head: TorchLogitHead, hidden: Tensor, *more: Any, **named: Any) -> LogProbs:
        rows.append(len(hidden))
        return made(head, hidden, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchLogitHead, "log_probs", counted)
        yield rows


def test_logits_of_all_tokens_are_never_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most rows of logits at a time, forward and backward; without gradients there is one
    product a chunk. Rows without a gradient are not made again."""
    monkeypatch.setattr(module, "_MAX_LOGITS", 48 * 64)
    x, w, t = problem(200, 8, 64, peaked=False)
    with rows_computed() as rows:
        with torch.no_grad():
            linear_logprob(x, w, t)
        assert rows == [48] * 4 + [8]
        linear_logprob(x, w, t, chunk_size=64)
        assert rows[5:] == [64] * 3 + [8]
        rows.clear()
        gradients(linear_logprob, x, w, t)  # of 200 - 67 rows
        assert rows == [48] * 4 + [8] + [48] * 2 + [37]


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_only_the_gradient_that_is_asked_for(wanted: str) -> None:
    x, w, t = problem(20, 8, 50, peaked=False)
    (x if wanted == "hidden" else w).requires_grad_()
    linear_logprob(x, w, t).logp.sum().backward()
    assert (x.grad is None) == (wanted != "hidden") and (w.grad is None) == (wanted != "weight")


def test_bfloat16_is_computed_in_float32() -> None:
    x, w, t = problem(40, 16, 90, peaked=True)
    x, w = x.bfloat16(), w.bfloat16()
    expected = gradients(linear_logprob_ref, x.double(), w.double(), t)
    found = gradients(linear_logprob, x, w, t)
    assert [f.dtype for f in found] == [torch.float32] * 3 + [torch.bfloat16] * 2
    for f, e in zip(found[:3], expected, strict=False):
        assert (f.double() - e).abs().max() < 1e-4
    for f, e in zip(found[3:], expected[3:], strict=True):
        assert (f.double() - e).norm() <= 3e-3 * e.norm()


def test_the_weights_gradient_is_added_up_in_float32_and_rounded_once() -> None:
    """Over 64 chunks; a bfloat16 sum would lose what is small beside it."""
    x, w, t = problem(1024, 16, 40, peaked=False)
    x, w = x.bfloat16(), w.bfloat16()
    exact = gradients(linear_logprob_ref, x.double(), w.double(), t)[-1]
    found = gradients(partial(linear_logprob, chunk_size=16), x, w, t)[-1]
    rounded = (exact.bfloat16().double() - exact).norm()
    assert (found.double() - exact).norm() <= 1.1 * rounded


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, "must be"),
        ({"weight": torch.zeros(9, 4).half()}, "of one dtype"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"target must be \(3,\) torch.int64"),
        ({"target": torch.tensor([0, 9, 1])}, r"targets must be in \[0, 9\)"),
        ({"target": torch.tensor([0, -1, 1])}, r"targets must be in \[0, 9\)"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"chunk_size": 15}, "chunk_size must be 16 or more"),
    ],
)
def test_wrong_input(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(9, 4),
        "target": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments | changed)


def test_the_fields_are_named() -> None:
    x, w, t = problem(5, 8, 20, peaked=False)
    found = linear_logprob(x, w, t)
    assert isinstance(found, LogProbs)
    uniform = linear_logprob(torch.zeros(5, 8), torch.zeros(20, 8), t)
    torch.testing.assert_close(uniform.entropy, torch.full((5,), 20.0).log())
    torch.testing.assert_close(uniform.logp, -uniform.lse)
