"""Log-probs, entropies and log-sum-exps from hidden states and a head's weight, and their
gradients. They are for training: there is no C++ of them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.logprob import LogProbs, linear_logprob, linear_logprob_ref
from kernels.logprob import torch_impl as module
from tests.implementations import HALVES, Implementation, gradients
from tests.logits import check_gradients, draw_head, rows_computed

pytestmark = pytest.mark.implementations("torch", "triton")

# Tokens, vocabulary, whether one token has nearly all the mass, options: several Triton tiles and
# one, rows that fill no tile or chunk.
CASES: list[tuple[int, int, bool, dict[str, float]]] = [
    (37, 611, False, {}),
    (37, 600, True, {"softcap": 5.0, "temperature": 0.6}),
    (1, 90, False, {"softcap": 5.0}),
    (16, 65, True, {"temperature": 0.6}),
]


def of(target: Tensor, op: Callable[..., LogProbs] = linear_logprob, **options: Any) -> Any:
    """The operation as a function of hidden states and of the weight in two parts, of which the
    second is that of tokens that no target names: its gradient is small, and held by itself."""

    def of_parts(hidden: Tensor, named: Tensor, other: Tensor) -> LogProbs:
        return op(hidden, torch.cat([named, other]), target.to(hidden.device), **options)

    return of_parts


def problem(
    on: Implementation, tokens: int, hidden: int, vocab: int, peaked: bool, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Hidden states and the weight in two parts, targets, and gradients of all three results, with
    none for every third token."""
    x, weight, target = draw_head(on, tokens, hidden, vocab, peaked, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    grads = [on.draw(tokens, dtype=wide, seed=seed) for seed in (7, 8, 9)]
    for grad in grads:
        grad[::3] = 0
    half = vocab // 2
    return [x, weight[:half], weight[half:]], target % half, grads


def test_reference_is_the_formula() -> None:
    x, weight = torch.randn(3, 4).double(), 3 * torch.randn(7, 4).double()
    for softcap, temperature in ((None, 1.0), (5.0, 0.6)):
        found = linear_logprob_ref(x, weight, torch.tensor([6, 0, 3]), softcap, temperature)
        for i, target in enumerate([6, 0, 3]):
            z = [math.fsum((x[i] * row).tolist()) for row in weight]
            if softcap is not None:
                z = [softcap * math.tanh(each / softcap) for each in z]
            z = [each / temperature for each in z]
            lse = math.log(math.fsum(map(math.exp, z)))
            entropy = -math.fsum(math.exp(each - lse) * (each - lse) for each in z)
            expected = z[target] - lse, entropy, lse
            assert [float(each[i]) for each in found] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("tokens", "vocab", "peaked", "options"), CASES)
def test_values_and_gradients(
    on: Implementation, dtype: torch.dtype, tokens: int, vocab: int, peaked: bool, options: Any
) -> None:
    """In chunks, the last one ragged. Results are float32 at least, gradients of their inputs'
    dtypes."""
    inputs, target, grads = problem(on, tokens, 24, vocab, peaked, dtype)
    reference = of(target, linear_logprob_ref, **options)
    op = of(target, partial(linear_logprob, chunk_size=32), **options)
    assert isinstance(on.check(op, reference, *inputs), LogProbs)
    counts = check_gradients(on, op, reference, inputs, grads)
    if on.name == "triton":
        chunks = 2 if tokens > 32 else 1
        assert counts["_logits_kernel"] == counts["_join_kernel"] == 2 * chunks
        assert counts["_hidden_gradient_kernel"] == counts["_weight_gradient_kernel"] == chunks


def test_the_gradient_of_likely_tokens(on: Implementation, dtype: torch.dtype) -> None:
    """It is 1 - p, which is lost where p is rounded to half precision."""
    x, weight, _ = draw_head(on, 120, 24, 90, True, dtype)
    weight = (1.5 * weight).to(dtype)
    target = (x.double() @ weight.double().T).argmax(1)
    p = linear_logprob_ref(x.double(), weight.double(), target).logp.exp()
    likely = (p > 0.99) & (p < 1 - 1e-3)
    target = target[likely]
    assert len(target) >= 3

    def logp(op: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: op(x, weight.to(x), target.to(x.device)).logp

    grad = torch.ones_like(target, dtype=torch.promote_types(dtype, torch.float32))
    op, reference = logp(linear_logprob), logp(linear_logprob_ref)
    check_gradients(on, op, reference, [x[likely]], [grad])


@pytest.mark.usefixtures("products_in_order")
def test_bits_depend_on_nothing_but_the_row(on: Implementation, dtype: torch.dtype) -> None:
    # Several Triton tiles either way, which are larger in half precision.
    tokens, vocab = (70, 130) if dtype == torch.float32 else (130, 280)
    inputs, target, grads = problem(on, tokens, 16, vocab, False, dtype)

    def all_of(**options: Any) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        results = of(target, **options)(*leaves)
        return *results, *torch.autograd.grad(results, leaves, grads)

    whole, again = all_of(temperature=0.7), all_of(temperature=0.7)
    assert all(a.equal(b) for a, b in zip(whole, again, strict=True))
    cut = all_of(temperature=0.7, chunk_size=48)
    # The weight's gradient is a sum over chunks; float16 has units of the chunk in Triton.
    same = 3 if dtype == torch.float16 else 4
    assert all(a.equal(b) for a, b in zip(whole[:same], cut[:same], strict=True))
    few = of(target[5:9], temperature=0.7)(inputs[0][5:9], *inputs[1:])
    assert all(a.equal(b[5:9]) for a, b in zip(few, whole, strict=False))


def test_slices(on: Implementation) -> None:
    """Nothing beside them is read."""
    inputs = [on.poisoned(20, 24), on.poisoned(90, 24, seed=1)]
    target = torch.arange(20) * 4

    def logp(op: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, weight: op(x, weight, target.to(x.device)).logp

    op, reference = logp(linear_logprob), logp(linear_logprob_ref)
    on.check(op, reference, *inputs)
    on.check_gradients(op, reference, inputs, [on.draw(20, seed=2)])


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_only_the_gradient_that_is_asked_for(on: Implementation, wanted: str) -> None:
    x, w, t = draw_head(on, 20, 8, 50, False)
    (x if wanted == "hidden" else w).requires_grad_()
    with on.counted() as counts:
        linear_logprob(x, w, t).logp.sum().backward()
    assert (x.grad is None) == (wanted != "hidden") and (w.grad is None) == (wanted != "weight")
    if on.name == "triton":
        assert counts["_hidden_gradient_kernel"] == (wanted == "hidden")
        assert counts["_weight_gradient_kernel"] == (wanted == "weight")


def test_no_tokens(on: Implementation) -> None:
    inputs, target, grads = problem(on, 0, 24, 90, False, torch.float32)
    assert on.run(of(target), *inputs).logp.shape == (0,)
    with on.counted() as counts:
        found = gradients(of(target), inputs, grads)
    assert not counts and not any(grad.any() for grad in found)


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
def test_bad_arguments(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(9, 4)}
    given |= {"target": torch.zeros(3, dtype=torch.int64)} | changed
    with pytest.raises(ValueError, match=message):
        linear_logprob(**given)


# -- torch alone -----------------------------------------------------------------------------------


@pytest.mark.implementations("torch")
def test_logits_of_all_tokens_are_never_there(
    on: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most rows of logits at a time, forward and backward; without gradients there is one
    product a chunk. Rows without a gradient are not made again."""
    monkeypatch.setattr(module, "_MAX_LOGITS", 48 * 64)
    inputs, target, grads = problem(on, 200, 8, 64, False, torch.float32)
    with rows_computed() as rows:
        of(target)(*inputs)
        assert rows == [48] * 4 + [8]
        of(target, chunk_size=64)(*inputs)
        assert rows[5:] == [64] * 3 + [8]
        rows.clear()
        gradients(of(target), inputs, grads)  # of 200 - 67 rows
        assert rows == [48] * 4 + [8] + [48] * 2 + [37]


@pytest.mark.implementations("torch")
@pytest.mark.parametrize("half", HALVES)
def test_the_weights_gradient_is_added_up_in_float32_and_rounded_once(
    on: Implementation, half: torch.dtype
) -> None:
    """Over 64 chunks; a sum in half precision would lose what is small beside it."""
    inputs, target, grads = problem(on, 1024, 16, 40, False, half)
    exact = gradients(
        of(target, linear_logprob_ref),
        [x.double() for x in inputs],
        [grad.double() for grad in grads],
    )
    found = gradients(of(target, chunk_size=16), inputs, grads)
    for ours, right in zip(found[1:], exact[1:], strict=True):
        rounding = (right.to(half).double() - right).norm()
        assert (ours.double() - right).norm() <= 1.1 * rounding


# -- Triton alone ----------------------------------------------------------------------------------


class _OnDevice(Tensor):
    """A tensor that does not say that it is on CPU."""

    is_cpu = False


@pytest.mark.implementations("triton")
def test_a_target_out_of_range_shows_on_a_gpu(on: Implementation) -> None:
    """Where to refuse it would be to wait for the device."""
    x, w, t = draw_head(on, 8, 24, 90, False)
    t[2], t[5] = 90, -1
    found = linear_logprob(x, w, t if x.is_cuda else t.as_subclass(_OnDevice))
    odd = torch.tensor([i in (2, 5) for i in range(8)])
    assert found.logp.cpu().isnan().equal(odd) and found.lse.isfinite().all()


@pytest.mark.implementations("triton")
def test_float64_is_refused(on: Implementation) -> None:
    with pytest.raises(ValueError, match="float64 runs on CPU only"):
        linear_logprob(*draw_head(on, 4, 24, 90, False, torch.float64))
