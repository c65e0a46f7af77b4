"""`grpo_loss` against float64 logits under autograd, and against its unfused form."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import grpo_loss as fused
from kernels import linear_logprob
from kernels.grpo_loss import grpo_loss, grpo_loss_ref
from kernels.policy_loss import LOSSES, PolicyLossOptions, token_weights
from tests.test_linear_logprob import problem
from tests.test_policy_loss import oracle

LENGTHS = torch.tensor([7, 1, 20, 13])
N, H, V = 41, 24, 211


def arguments(kind: str, beta: float, on_policy: bool, peaked: bool) -> dict[str, Any]:
    """Tokens of four sequences, of which one has advantage 0, with ratios beyond the clip."""
    x, w, t = problem(N, H, V, peaked)
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    exact = linear_logprob.linear_logprob_ref(x, w, t, 5.0, 0.6).logp
    options = PolicyLossOptions(beta=beta, level="sequence" if kind == "gspo" else "token")
    return {
        "hidden": x,
        "weight": w,
        "target": t,
        "advantage": torch.tensor([1.0, -0.5, 0.0, 2.0]).double().repeat_interleave(LENGTHS),
        "token_weight": token_weights(
            kind, LENGTHS, num_sequences=4, num_tokens=N, max_tokens=25
        ).double(),
        "options": options,
        "old_logp": None if on_policy else exact + 0.3 * randn(N),
        "ref_logp": exact + 0.5 * randn(N),
        "lengths": LENGTHS,
    }


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
    peaked: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Against the published formulas on plain logits, differentiated by autograd; in float32 by
    relative norm, on rows of the weight that no target names too."""
    monkeypatch.setattr(linear_logprob, "_MAX_LOGITS", 16 * V)
    given = arguments(kind, beta, on_policy, peaked)
    x = given["hidden"].clone().requires_grad_()
    w = given["weight"].clone().requires_grad_()
    logits = x @ w.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits / temperature, -1)[torch.arange(N), given["target"]]
    sizes = LENGTHS.tolist()
    expected = oracle(
        kind,
        list(logp.split(sizes)),
        None if on_policy else list(given["old_logp"].split(sizes)),
        list(given["ref_logp"].split(sizes)),
        torch.tensor([1.0, -0.5, 0.0, 2.0]).double(),
        given["options"],
        25,
    )
    (3 * expected).backward()
    assert x.grad is not None and w.grad is not None
    found, dx, dw = run(grpo_loss, given, softcap=softcap, temperature=temperature)
    torch.testing.assert_close(found.loss.detach(), expected.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(dx, x.grad, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(dw, w.grad, rtol=1e-5, atol=1e-8)

    narrow = {k: v.float() if _is_floating(v) else v for k, v in given.items()}
    _, dx, dw = run(grpo_loss, narrow, softcap=softcap, temperature=temperature)
    other = torch.ones(V, dtype=torch.bool)
    other[given["target"]] = False
    for short, exact in ((dx, x.grad), (dw, w.grad), (dw[other], w.grad[other])):
        assert (short.double() - exact).norm() <= 1e-4 * exact.norm() + 1e-7


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.parametrize("kind", LOSSES)
def test_the_fused_and_the_unfused_form_agree(kind: str) -> None:
    given = arguments(kind, 0.1, on_policy=False, peaked=False)
    for ours, theirs in zip(run(grpo_loss, given)[1:], run(grpo_loss_ref, given)[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    ours, theirs = run(grpo_loss, given)[0], run(grpo_loss_ref, given)[0]
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.entropy, theirs.entropy)
    torch.testing.assert_close(ours.terms.ratio_max, theirs.terms.ratio_max)
    assert ours.terms.clipped_high == theirs.terms.clipped_high


@pytest.mark.parametrize(("kind", "passes"), [("grpo", 1), ("gspo", 2)])
def test_logits_are_made_as_often_as_they_have_to_be(
    kind: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    made = linear_logprob.scaled_logits

    def counted(padded: Tensor, *more: Any) -> Tensor:
        rows.append(len(padded))
        return made(padded, *more)

    monkeypatch.setattr(linear_logprob, "_MAX_LOGITS", 16 * V)
    monkeypatch.setattr(linear_logprob, "scaled_logits", counted)
    monkeypatch.setattr(fused, "scaled_logits", counted)
    run(grpo_loss, arguments(kind, 0.0, on_policy=True, peaked=False))
    assert rows == passes * [16, 16, 16]


def test_nothing_is_differentiated_where_nothing_asks() -> None:
    given = arguments("grpo", 0.1, on_policy=False, peaked=False)
    found = grpo_loss(**given)
    assert not found.loss.requires_grad
    torch.testing.assert_close(found.loss, run(grpo_loss, given)[0].loss.detach())
    given["weight"].requires_grad_()
    grpo_loss(**given).loss.backward()
    assert given["weight"].grad is not None and given["hidden"].grad is None


def test_no_tokens() -> None:
    given = arguments("dapo", 0.0, on_policy=True, peaked=False)
    none = {
        name: value[:0] if isinstance(value, Tensor) and name != "weight" else value
        for name, value in given.items()
    }
    found, dx, dw = run(grpo_loss, none)
    assert found.loss == 0 and dx.shape == (0, H) and not dw.any()


def test_what_is_missing_is_named() -> None:
    given = arguments("grpo", 0.1, on_policy=True, peaked=False)
    with pytest.raises(ValueError, match="needs ref_logp"):
        grpo_loss(**given | {"ref_logp": None})
    with pytest.raises(ValueError, match="grpo_loss: targets must be in"):
        grpo_loss(**given | {"target": given["target"] + V})
    sequence = replace(given["options"], level="sequence")
    with pytest.raises(ValueError, match="needs lengths"):
        grpo_loss(**given | {"options": sequence, "lengths": None})
