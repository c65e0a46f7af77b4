"""`linear_logprob` against float64 logits and autograd, and what it holds in memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import linear_logprob as module
from kernels.linear_logprob import LogProbs, linear_logprob, linear_logprob_ref


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


@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("tokens", [0, 1, 16, 37])
def test_values_and_gradients_are_those_of_the_definition(
    tokens: int, softcap: float | None, temperature: float, peaked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In float64 to its last digits; in float32 as far as its rounding reaches, by relative norm,
    which sees a wrong magnitude as well as a wrong direction. Several chunks, the last one ragged.
    """
    monkeypatch.setattr(module, "_MAX_LOGITS", 16 * 211)
    x, w, t = problem(tokens, 24, 211, peaked)
    expected = gradients(linear_logprob_ref, x, w, t, softcap, temperature)
    for found, exact in zip(
        gradients(linear_logprob, x, w, t, softcap, temperature), expected, strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)
    narrow = gradients(linear_logprob, x.float(), w.float(), t, softcap, temperature)
    for found, exact in zip(narrow, expected, strict=True):
        assert found.dtype == torch.float32
        error = (found.double() - exact).norm()
        assert error <= 2e-5 * exact.norm() + 1e-6, (error, exact.norm())
    if tokens:
        other = torch.ones(211, dtype=torch.bool)
        other[t] = False  # rows of the weight that no target names
        found, exact = narrow[-1][other].double(), expected[-1][other]
        assert (found - exact).norm() <= 2e-5 * exact.norm() + 1e-6


def test_a_rows_results_do_not_depend_on_its_company(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, t = problem(90, 32, 300, peaked=False)
    x, w = x.float(), w.float()
    whole = gradients(linear_logprob, x, w, t, None, 0.7)
    again = gradients(linear_logprob, x, w, t, None, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    monkeypatch.setattr(module, "_MAX_LOGITS", 32 * 300)
    cut = gradients(linear_logprob, x, w, t, None, 0.7)
    for a, b in zip(whole[:4], cut[:4], strict=True):  # all but the weight's, a sum over chunks
        assert torch.equal(a, b)
    few = linear_logprob(x[5:9], w, t[5:9], None, 0.7)
    for a, b in zip(few, whole, strict=False):
        assert torch.equal(a, b[5:9])


def test_logits_of_all_tokens_are_never_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most rows of logits at a time, forward and backward."""
    monkeypatch.setattr(module, "_MAX_LOGITS", 48 * 64)
    rows: list[int] = []
    made = module.scaled_logits

    def counted(padded: Tensor, *arguments: Any) -> Tensor:
        rows.append(len(padded))
        return made(padded, *arguments)

    monkeypatch.setattr(module, "scaled_logits", counted)
    x, w, t = problem(200, 8, 64, peaked=False)
    with torch.no_grad():
        linear_logprob(x, w, t)
    assert rows == [48] * 4 + [16]  # one product a chunk
    rows.clear()
    gradients(linear_logprob, x, w, t)
    assert rows == 2 * ([48] * 4 + [16])


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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, "must be"),
        ({"weight": torch.zeros(9, 4).half()}, "of one dtype"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"target must be \(3,\) int64"),
        ({"target": torch.tensor([0, 9, 1])}, r"targets must be in \[0, 9\)"),
        ({"target": torch.tensor([0, -1, 1])}, r"targets must be in \[0, 9\)"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
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
