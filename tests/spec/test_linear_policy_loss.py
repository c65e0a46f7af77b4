"""The policy loss from hidden states and a head's weight, with its gradients. It is for training:
there is no C++ of it."""

import math
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.logprob import linear_logprob_ref
from kernels.logprob.linear_policy_loss import (
    LinearPolicyLoss,
    linear_policy_loss,
    linear_policy_loss_ref,
)
from kernels.logprob.policy_loss import (
    LOSSES,
    PolicyLossOptions,
    policy_loss,
    token_weights,
)
from kernels.logprob.torch_impl import LogProbGradients, TorchLogitHead
from kernels.logprob.triton_impl import _launch
from kernels.target import target_of
from tests.implementations import HALVES, Implementation, assert_exact, gradients
from tests.logits import check_gradients, draw_head, rows_computed

pytestmark = pytest.mark.implementations("torch", "triton")

# Tokens of four sequences, their advantages, and Dr. GRPO's constant.
LENGTHS, ADVANTAGES, MAX_TOKENS = [7, 1, 20, 13], torch.tensor([1.0, -0.5, 0.0, 2.0]), 25
N, H, V = 41, 24, 150


class Case(NamedTuple):
    kind: str = "grpo"
    beta: float = 0.1
    on_policy: bool = False
    peaked: bool = False
    capped: bool = False

    @property
    def more(self) -> dict[str, Any]:
        return {"softcap": 10.0, "temperature": 0.6} if self.capped else {}


# Every two of their choices together.
CASES = [
    Case(kind, 0.1 * (i & 1), i > 1, (i ^ j >> 1) & 1 == 1, (i ^ i >> 1 ^ j) & 1 == 1)
    for j, kind in enumerate(LOSSES)
    for i in range(4)
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
each_loss = pytest.mark.parametrize("kind", LOSSES)


def problem(
    on: Implementation, case: Case, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], dict[str, Any]]:
    """Hidden states and weight, and the other arguments, which are float32; ratios are past the
    clip."""
    x, weight, target = draw_head(on, N, H, V, case.peaked, dtype)
    logp = linear_logprob_ref(x.double(), weight.double(), target, **case.more).logp.float()
    lengths = torch.tensor(LENGTHS, device=on.device)
    sizes = {"num_sequences": 4, "num_tokens": N, "max_tokens": MAX_TOKENS}
    level = "sequence" if case.kind == "gspo" else "token"
    return [x, weight], {
        "target": target,
        "advantage": ADVANTAGES.to(on.device).repeat_interleave(lengths),
        "token_weight": token_weights(case.kind, lengths, **sizes),
        "options": PolicyLossOptions(beta=case.beta, level=level),
        "old_logp": None if case.on_policy else logp + 0.3 * on.draw(N, seed=3),
        "ref_logp": logp + 0.5 * on.draw(N, seed=4),
        "lengths": lengths,
    }


Op = Callable[[Tensor, Tensor], LinearPolicyLoss]


def of(given: dict[str, Any], op: Any = linear_policy_loss, **more: Any) -> Op:
    """The operation as a function of hidden states and weight, of any dtype on any device."""

    def of_inputs(x: Tensor, weight: Tensor) -> LinearPolicyLoss:
        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            wide = torch.promote_types(x.dtype, torch.float32)
            return value.to(x.device, wide if value.is_floating_point() else value.dtype)

        return op(x, weight, **{name: move(value) for name, value in given.items()}, **more)

    return of_inputs


def loss_of(op: Op) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: op(x, weight).loss


def differentiate(op: Op, inputs: list[Tensor]) -> tuple[LinearPolicyLoss, Tensor, Tensor]:
    """The results, and the gradients of 3 times the loss."""
    x, weight = (each.detach().requires_grad_() for each in inputs)
    found = op(x, weight)
    d_x, d_weight = torch.autograd.grad(3 * found.loss, (x, weight))
    return found, d_x, d_weight


@each_case
def test_values_and_gradients(on: Implementation, dtype: torch.dtype, case: Case) -> None:
    """In chunks, the last one ragged."""
    inputs, given = problem(on, case, dtype)
    reference = of(given, linear_policy_loss_ref, **case.more)
    results: list[LinearPolicyLoss] = []

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        results.append(of(given, chunk_size=32, **case.more)(x, weight))
        return results[-1].loss

    wide = torch.promote_types(dtype, torch.float32)
    three = torch.tensor(3.0, dtype=wide, device=on.device)
    counts = check_gradients(on, loss, loss_of(reference), inputs, [three])
    if on.name == "triton":
        assert counts["_hidden_gradient_kernel"] == counts["_weight_gradient_kernel"] == 2
        assert counts["_logits_kernel"] == (4 if case.kind == "gspo" else 2)
    (found,), specified = results, reference(*inputs)
    torch.testing.assert_close(specified.loss, specified.terms.loss)

    def log_probs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        out = reference(x, weight)
        return out.logp, out.entropy

    assert_exact((found.logp, found.entropy), log_probs, *inputs)
    # The loss, its coefficients and metrics are those of these log-probs.
    terms = policy_loss(
        found.logp, given["advantage"], given["token_weight"], given["options"],
        old_logp=given["old_logp"], ref_logp=given["ref_logp"], lengths=given["lengths"],
    )  # fmt: skip
    assert all(a.equal(b) for a, b in zip(astuple(found.terms), astuple(terms), strict=True))
    assert found.loss.detach().equal(terms.loss)


@each_loss
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_tokens_of_weight_0_are_as_if_they_were_not_there(on: Implementation, kind: str) -> None:
    """Whatever is given of them; they are not computed, and have no part in a sequence's mean. In
    Triton some lie in a tile of their own."""
    inputs, given = problem(on, Case(kind))
    kept = torch.arange(N + 100, device=on.device) % 3 != 1
    kept[N:] = False
    lengths = [int(part.sum()) for part in kept[:N].split(LENGTHS)]
    assert lengths == [5, 0, 14, 8]
    few, many, counted = dict(given), dict(given), kept[:N]
    junk = {"token_weight": 0, "target": 0, "advantage": 7, "old_logp": -math.inf}

    def among(value: Tensor, other: float = math.nan) -> Tensor:
        whole = value.new_full((len(kept), *value.shape[1:]), other)
        whole[kept] = value[counted]
        return whole

    for name in {*junk, "ref_logp"}:
        few[name], many[name] = given[name][counted], among(given[name], junk.get(name, math.nan))
    few["lengths"] = torch.tensor(lengths, device=on.device)
    many["lengths"] = torch.tensor([*LENGTHS, 100], device=on.device)
    expected, d_x, d_weight = differentiate(of(few), [inputs[0][counted], inputs[1]])
    with rows_computed() as computed:
        found, all_d_x, all_d_weight = differentiate(of(many), [among(inputs[0]), inputs[1]])
    if on.name == "torch":
        assert set(computed) == {27}
    else:
        assert 2 * _launch(torch.float32, target_of(kept))["BLOCK_M"] < len(kept)
    for ours, theirs in (
        (all_d_x, d_x),
        (found.logp, expected.logp),
        (found.entropy, expected.entropy),
    ):
        assert ours[kept].equal(theirs) and not ours[~kept].any()
    assert found.terms.coefficient[kept].all() and not found.terms.coefficient[~kept].any()
    for ours, theirs in (
        (found.loss, expected.loss),
        (all_d_weight, d_weight),
        (found.terms.kl, expected.terms.kl),
        (found.terms.ratio_max, expected.terms.ratio_max),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_the_gradient_of_the_weight_in_a_place_of_ones_own(on: Implementation, kind: str) -> None:
    """It is that of the loss itself, and is added to what is there."""
    inputs, given = problem(on, Case(kind))
    _, d_x, d_weight = differentiate(of(given), inputs)
    into = torch.ones_like(inputs[1])
    x, weight = (each.requires_grad_() for each in inputs)
    (3 * linear_policy_loss(x, weight, **given, weight_grad=into).loss).backward()
    torch.testing.assert_close(into - 1, d_weight / 3, rtol=1e-5, atol=1e-6)
    assert x.grad is not None and x.grad.equal(d_x) and weight.grad is None
    with torch.no_grad():
        linear_policy_loss(x, weight, **given, weight_grad=(nothing := torch.zeros_like(into)))
    assert not nothing.any()
    for wrong in (into[:5], into.double(), into.T.contiguous().T):
        with pytest.raises(ValueError, match="weight_grad must be"):
            linear_policy_loss(x, weight, **given, weight_grad=wrong)


def test_backward_runs_once(on: Implementation) -> None:
    (x, weight), given = problem(on, Case())
    loss = linear_policy_loss(x.requires_grad_(), weight, **given).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()


def test_nothing_is_differentiated_where_nothing_asks(on: Implementation) -> None:
    inputs, given = problem(on, Case())
    op = of(given)
    with on.counted() as counts:
        loss = op(*inputs).loss
    assert not loss.requires_grad and not counts["_weight_gradient_kernel"]
    expected, _, d_weight = differentiate(op, inputs)
    assert loss.equal(expected.loss.detach())
    with on.counted() as counts:
        (alone,) = gradients(lambda weight: op(inputs[0], weight).loss, inputs[1:], [3 * loss**0])
    assert alone.equal(d_weight) and not counts["_hidden_gradient_kernel"]


def test_no_tokens(on: Implementation) -> None:
    (x, weight), given = problem(on, Case("dapo", 0.0, True))
    none = {k: v[:0] if isinstance(v, Tensor) else v for k, v in given.items()}
    found, d_x, d_weight = differentiate(of(none), [x[:0], weight])
    assert found.loss == 0 and d_x.shape == (0, H) and not d_weight.any()


@pytest.mark.implementations("torch")
def test_what_is_missing_is_named(on: Implementation) -> None:
    inputs, given = problem(on, Case())
    sequence = replace(given["options"], level="sequence")
    for changed, message in (
        ({"ref_logp": None}, "needs ref_logp"),
        ({"target": given["target"] + V}, "linear_policy_loss: targets must be in"),
        ({"options": sequence, "lengths": None}, "needs lengths"),
    ):
        with pytest.raises(ValueError, match=message):
            of(given | changed)(*inputs)


# -- torch alone -----------------------------------------------------------------------------------


@pytest.mark.implementations("torch")
@pytest.mark.parametrize(
    ("kind", "beta", "rows"),
    [
        ("grpo", 0.1, [16, 16, 9]),
        ("gspo", 0.1, [16, 16, 9] * 2),  # a coefficient waits for its sequence's last token
        ("gspo", 0.0, [16, 16, 9, 16, 5]),  # 20 tokens have none
    ],
)
def test_logits_are_made_as_often_as_they_have_to_be(
    on: Implementation, kind: str, beta: float, rows: list[int]
) -> None:
    inputs, given = problem(on, Case(kind, beta, True))
    with rows_computed() as computed:
        differentiate(of(given, chunk_size=16), inputs)
    assert computed == rows


@pytest.mark.implementations("torch")
def test_rows_without_a_coefficient_take_no_part_in_the_last_products(
    on: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With beta 0: tokens of advantage 0, and those that are clipped."""
    inputs, given = problem(on, Case(beta=0.0))
    asked: list[int] = []
    made = TorchLogitHead._logit_gradients

    def counted(head: TorchLogitHead, held: Any, given: LogProbGradients) -> Tensor:
        asked.append(len(given.logp))
        return made(head, held, given)

    monkeypatch.setattr(TorchLogitHead, "_logit_gradients", counted)
    found, d_x, _ = differentiate(of(given), inputs)
    moved = found.terms.coefficient != 0
    assert found.terms.clipped_high > 0 and 0 < moved.sum() < 21
    assert asked == [-(-int(moved.sum()) // 16) * 16]
    assert d_x[moved].any(1).all() and not d_x[~moved].any()


@pytest.mark.implementations("torch")
@pytest.mark.parametrize("half", HALVES)
def test_the_weights_gradient_is_rounded_once(on: Implementation, half: torch.dtype) -> None:
    """A sum in half precision over 41 chunks would be rounded with each of them."""
    (x, weight), given = problem(on, Case("dapo"), half)
    many = {k: torch.cat([v] * 16) if isinstance(v, Tensor) else v for k, v in given.items()}
    inputs = [torch.cat([x] * 16), weight]
    exact = differentiate(of(many), [each.double() for each in inputs])[2]
    found = differentiate(of(many, chunk_size=16), inputs)[2]
    rounding = (exact.to(half).double() - exact).norm()
    assert (found.double() - exact).norm() <= 1.6 * rounding  # once more where it is scaled


# -- Triton alone ----------------------------------------------------------------------------------


@pytest.mark.implementations("triton")
def test_small_coefficients_in_half_precision(on: Implementation) -> None:
    """Those of a loss over a hundred million tokens are beyond float16; gradients are not, where
    they are taken out in float32."""
    (x, weight), given = problem(on, Case("dapo", 0.0, True), torch.float16)
    found, expected = torch.zeros(2, V, H, device=on.device)
    linear_policy_loss(x, weight, **given, weight_grad=expected)
    given["token_weight"] *= 2.0**-26
    linear_policy_loss(x, weight, **given, weight_grad=found)
    assert expected.abs().max() > 0 and (found * 2.0**26).equal(expected)
