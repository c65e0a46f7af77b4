"""`linear_policy_loss` against float64 logits under autograd, and against its unfused form."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.logprob import linear_logprob_ref
from kernels.logprob.linear_policy_loss import linear_policy_loss, linear_policy_loss_ref
from kernels.logprob.policy_loss import LOSSES, PolicyLossOptions, token_weights
from kernels.logprob.torch_impl import LogProbGradients, TorchLogitHead
from tests.policy_oracle import ADVANTAGES, LENGTHS, MAX_TOKENS, dense
from tests.test_linear_logprob import assert_as_near, problem, rows_computed

N, H, V = 41, 24, 211


def arguments(
    kind: str, beta: float, on_policy: bool, peaked: bool, vocab: int = V
) -> dict[str, Any]:
    """Tokens of four sequences, of which one has advantage 0, with ratios beyond the clip."""
    x, w, t = problem(N, H, vocab, peaked)
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    exact = linear_logprob_ref(x, w, t, 5.0, 0.6).logp
    options = PolicyLossOptions(beta=beta, level="sequence" if kind == "gspo" else "token")
    return {
        "hidden": x,
        "weight": w,
        "target": t,
        "advantage": ADVANTAGES.repeat_interleave(LENGTHS),
        "token_weight": token_weights(
            kind, LENGTHS, num_sequences=4, num_tokens=N, max_tokens=MAX_TOKENS
        ).double(),
        "options": options,
        "old_logp": None if on_policy else exact + 0.3 * randn(N),
        "ref_logp": exact + 0.5 * randn(N),
        "lengths": LENGTHS,
    }


def to_dtype(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same with hidden and weight in a dtype, and all else in float32."""

    def cast(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.to(dtype if name in ("hidden", "weight") else torch.float32)

    return {name: cast(name, value) for name, value in given.items()}


def run(operation: Any, given: dict[str, Any], **more: Any) -> tuple[Any, Tensor, Tensor]:
    x = given["hidden"].clone().requires_grad_()
    w = given["weight"].clone().requires_grad_()
    found = operation(**given | {"hidden": x, "weight": w} | more)
    (3 * found.loss).backward()
    assert x.grad is not None and w.grad is not None
    return found, x.grad, w.grad


@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize(("softcap", "temperature"), [(None, 1.0), (5.0, 0.6)])
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradients_are_those_of_all_logits_in_float64(
    kind: str, beta: float, on_policy: bool, softcap: float | None, temperature: float,
    peaked: bool,
) -> None:  # fmt: skip
    """Against the published formulas on plain logits, differentiated by autograd; in float32 as
    near as autograd is in float32."""
    given = arguments(kind, beta, on_policy, peaked)
    more: dict[str, Any] = {"softcap": softcap, "temperature": temperature, "chunk_size": 16}
    expected = dense(kind, given, softcap, temperature)
    found, dx, dw = run(linear_policy_loss, given, **more)
    # Weights and the reading of the oracle's clip are float32.
    for ours, exact in zip((found.loss.detach(), dx, dw), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-8)

    narrow = to_dtype(given, torch.float32)
    expected = dense(kind, to_dtype(narrow, torch.float64), softcap, temperature)
    found, dx, dw = run(linear_policy_loss, narrow, **more)
    plain = dense(kind, narrow, softcap, temperature)
    assert_as_near((found.loss.detach(), dx, dw), plain, expected, given["target"])


@pytest.mark.parametrize("kind", LOSSES)
def test_the_fused_and_the_unfused_form_agree(kind: str) -> None:
    given = arguments(kind, 0.1, on_policy=False, peaked=False)
    for ours, theirs in zip(
        run(linear_policy_loss, given)[1:], run(linear_policy_loss_ref, given)[1:], strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    ours, theirs = run(linear_policy_loss, given)[0], run(linear_policy_loss_ref, given)[0]
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.entropy, theirs.entropy)
    torch.testing.assert_close(ours.terms.ratio_max, theirs.terms.ratio_max)
    assert ours.terms.clipped_high == theirs.terms.clipped_high


@pytest.mark.parametrize(
    ("kind", "beta", "rows"),
    [
        ("grpo", 0.1, [16, 16, 9]),
        ("gspo", 0.1, [16, 16, 9] * 2),  # a coefficient waits for its sequence's last token
        ("gspo", 0.0, [16, 16, 9, 16, 5]),  # 20 tokens have none
    ],
)
def test_logits_are_made_as_often_as_they_have_to_be(
    kind: str, beta: float, rows: list[int]
) -> None:
    given = arguments(kind, beta, on_policy=True, peaked=False)
    with rows_computed() as computed:
        run(linear_policy_loss, given, chunk_size=16)
    assert computed == rows


@pytest.mark.parametrize("kind", LOSSES)
def test_tokens_of_weight_0_are_as_if_they_were_not_there(kind: str) -> None:
    """Whatever is given of them; they are not computed, and have no part in a sequence's mean."""
    given = arguments(kind, 0.1, on_policy=False, peaked=False)
    kept = torch.arange(N) % 3 != 1
    weights = torch.where(kept, given["token_weight"], 0)
    lengths = torch.stack([part.sum() for part in kept.split(LENGTHS.tolist())])
    assert lengths.tolist() == [5, 0, 14, 8]
    few = {k: v[kept] if isinstance(v, Tensor) and len(v) == N else v for k, v in given.items()}
    expected, dx, dw = run(linear_policy_loss, few | {"lengths": lengths})
    for name, junk in (("hidden", math.nan), ("old_logp", -math.inf), ("ref_logp", math.nan)):
        given[name][~kept] = junk
    with rows_computed() as computed:
        found, all_dx, all_dw = run(linear_policy_loss, given | {"token_weight": weights})
    assert set(computed) == {27}
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(all_dx[kept], dx, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(all_dw, dw, rtol=1e-9, atol=1e-15)
    assert not all_dx[~kept].any()
    for ours in (found.logp, found.entropy, found.terms.coefficient):
        assert ours[kept].all() and not ours[~kept].any()
    for name in ("kl", "ratio_max"):
        ours, theirs = (getattr(x.terms, name) for x in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_rows_without_a_coefficient_take_no_part_in_the_last_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With beta 0: tokens of advantage 0, and those that are clipped."""
    given = arguments("grpo", 0.0, on_policy=False, peaked=False)
    asked: list[int] = []
    gradients = TorchLogitHead._logit_gradients

    def counted(head: TorchLogitHead, held: Any, given: LogProbGradients) -> Tensor:
        asked.append(len(given.logp))
        return gradients(head, held, given)

    monkeypatch.setattr(TorchLogitHead, "_logit_gradients", counted)
    found, dx, _ = run(linear_policy_loss, given)
    moved = found.terms.coefficient != 0
    assert found.terms.clipped_high > 0 and 0 < moved.sum() < 21
    assert asked == [-(-int(moved.sum()) // 16) * 16]
    assert dx[moved].any(1).all() and not dx[~moved].any()


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_the_gradient_of_the_weight_in_a_place_of_ones_own(kind: str) -> None:
    given = arguments(kind, 0.1, on_policy=False, peaked=False)
    _, dx, dw = run(linear_policy_loss, given)
    into = torch.ones_like(given["weight"])
    x = given["hidden"].clone().requires_grad_()
    given["weight"].requires_grad_()
    found = linear_policy_loss(**given | {"hidden": x}, weight_grad=into)
    torch.testing.assert_close(into - 1, dw / 3, rtol=1e-9, atol=1e-12)
    (3 * found.loss).backward()
    assert x.grad is not None and x.grad.equal(dx) and given["weight"].grad is None
    with torch.no_grad():
        linear_policy_loss(**given, weight_grad=(nothing := torch.zeros_like(into)))
    assert not nothing.any()
    for wrong in (into[:5], into.float(), into.T.contiguous().T):
        with pytest.raises(ValueError, match="weight_grad must be"):
            linear_policy_loss(**given, weight_grad=wrong)


def test_the_weights_gradient_is_rounded_once() -> None:
    """A bfloat16 sum over 41 chunks would be rounded with each of them."""
    given = arguments("dapo", 0.1, on_policy=False, peaked=False)
    given = {k: torch.cat([v] * 16) if isinstance(v, Tensor) and len(v) == N else v
             for k, v in given.items()}  # fmt: skip
    narrow = to_dtype(given, torch.bfloat16)
    exact = run(linear_policy_loss, to_dtype(narrow, torch.float64))[2]
    found = run(linear_policy_loss, narrow, chunk_size=16)[2]
    rounded = (exact.bfloat16().double() - exact).norm()
    assert (found.double() - exact).norm() <= 1.6 * rounded  # once more where it is scaled


def test_backward_runs_once() -> None:
    given = arguments("grpo", 0.1, on_policy=False, peaked=False)
    given["hidden"].requires_grad_()
    loss = linear_policy_loss(**given).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()


def test_nothing_is_differentiated_where_nothing_asks() -> None:
    given = arguments("grpo", 0.1, on_policy=False, peaked=False)
    found = linear_policy_loss(**given)
    assert not found.loss.requires_grad
    torch.testing.assert_close(found.loss, run(linear_policy_loss, given)[0].loss.detach())
    given["weight"].requires_grad_()
    linear_policy_loss(**given).loss.backward()
    assert given["weight"].grad is not None and given["hidden"].grad is None


def test_no_tokens() -> None:
    given = arguments("dapo", 0.0, on_policy=True, peaked=False)
    none = {
        name: value[:0] if isinstance(value, Tensor) and name != "weight" else value
        for name, value in given.items()
    }
    found, dx, dw = run(linear_policy_loss, none)
    assert found.loss == 0 and dx.shape == (0, H) and not dw.any()


def test_what_is_missing_is_named() -> None:
    given = arguments("grpo", 0.1, on_policy=True, peaked=False)
    with pytest.raises(ValueError, match="needs ref_logp"):
        linear_policy_loss(**given | {"ref_logp": None})
    with pytest.raises(ValueError, match="linear_policy_loss: targets must be in"):
        linear_policy_loss(**given | {"target": given["target"] + V})
    sequence = replace(given["options"], level="sequence")
    with pytest.raises(ValueError, match="needs lengths"):
        linear_policy_loss(**given | {"options": sequence, "lengths": None})
