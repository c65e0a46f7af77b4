"""The policy loss against the published formulas, written out a second time with padded float64
tensors and differentiated by autograd. It is plain torch on every device."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.logprob.policy_loss import (
    KL_ESTIMATORS,
    LOSSES,
    PolicyLossOptions,
    policy_loss,
    token_weights,
)
from tests.oracles.policy import oracle

OPTIONS = st.builds(
    PolicyLossOptions,
    clip_low=st.sampled_from([0.0, 0.1, 0.2]),
    clip_high=st.sampled_from([0.05, 0.28]),
    beta=st.sampled_from([0.0, 0.04, 1.0]),
    kl=st.sampled_from(KL_ESTIMATORS),
)


@pytest.mark.parametrize("kind", LOSSES)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.0, 0.05, 0.5]),
    # A group without spread has advantage 0.
    scales=st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=5, max_size=5),
    options=OPTIONS,
    on_policy=st.booleans(),
    max_tokens=st.integers(9, 20),
)
@settings(max_examples=40, deadline=None)
def test_loss_and_coefficients_are_those_of_the_published_formulas(
    kind: str,
    lengths: list[int],
    seed: int,
    spread: float,
    scales: list[float],
    options: PolicyLossOptions,
    on_policy: bool,
    max_tokens: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def randn(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    options = replace(options, level="sequence" if kind == "gspo" else "token")
    size, count = sum(lengths), len(lengths)
    logp = (-2 * randn(size).abs()).requires_grad_()
    old = None if on_policy else logp.detach() + spread * randn(size)
    ref = logp.detach() + 0.7 * randn(size)
    advantage = randn(count) * torch.tensor(scales[:count])
    before = None if old is None else [*old.split(lengths)]
    expected = oracle(
        kind, [*logp.split(lengths)], before, [*ref.split(lengths)], advantage, options, max_tokens
    )
    (coefficient,) = torch.autograd.grad(expected, logp)

    each = torch.tensor(lengths)
    weight = token_weights(
        kind, each, num_sequences=count, num_tokens=size, max_tokens=max_tokens
    ).double()
    found = policy_loss(
        logp, advantage.repeat_interleave(each), weight, options,
        old_logp=old, ref_logp=ref, lengths=each,
    )  # fmt: skip
    # Weights are float32; a ratio that lies on the clip's edge may fall to either side in autograd.
    torch.testing.assert_close(found.loss, expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.coefficient, coefficient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_window_of_micro_batches_adds_up_to_the_whole(kind: str) -> None:
    """The normaliser is the window's: the sum over micro-batches is the loss of all at once."""
    lengths = torch.tensor([3, 7, 2, 5])
    logp, old, advantage = -torch.rand(17), -torch.rand(17), torch.randn(17)
    options = PolicyLossOptions(level="sequence" if kind == "gspo" else "token")

    def part(first: int, last: int) -> Tensor:
        own = lengths[first:last]
        rows = slice(int(lengths[:first].sum()), int(lengths[:last].sum()))
        weight = token_weights(kind, own, num_sequences=4, num_tokens=17, max_tokens=9)
        return policy_loss(
            logp[rows], advantage[rows], weight, options, old_logp=old[rows], lengths=own
        ).loss

    torch.testing.assert_close(part(0, 1) + part(1, 3) + part(3, 4), part(0, 4))


def test_metrics_count_tokens_of_weight_alone() -> None:
    logp = torch.tensor([0.0, 0.5, -0.5, 0.1, 9.0])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    weight = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0])
    found = policy_loss(
        logp, advantage, weight, PolicyLossOptions(), old_logp=torch.zeros(5), ref_logp=logp - 0.3
    )
    assert found.clipped_high == 0.25 and found.clipped_low == 0.25
    assert (
        found.ratio_max == torch.tensor(0.5).exp() and found.ratio_min == torch.tensor(-0.5).exp()
    )
    torch.testing.assert_close(found.kl, torch.tensor(math.exp(-0.3) + 0.3 - 1))
    # What is clipped gives no gradient; what is not gives -r A w.
    assert found.coefficient[1] == 0 and found.coefficient[2] == 0 and found.coefficient[4] == 0
    torch.testing.assert_close(found.coefficient[0], torch.tensor(-0.25))


def test_no_tokens() -> None:
    nothing = torch.zeros(0)
    found = policy_loss(nothing, nothing, nothing, PolicyLossOptions(), old_logp=nothing)
    assert found.loss == 0 and len(found.coefficient) == 0
    assert found.kl.isnan() and found.ratio_max.isnan() and found.clipped_low.isnan()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clip_low": 1.5}, "clip_low = 1.5"),
        ({"clip_high": -0.1}, "clip_high = -0.1"),
        ({"beta": math.nan}, "beta = nan"),
        ({"kl": "k4"}, "kl must be one of"),
        ({"level": "word"}, "level must be"),
    ],
)
def test_options_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyLossOptions(**wrong)


def test_what_is_missing_or_misshapen_is_named() -> None:
    x = torch.zeros(4)
    with pytest.raises(ValueError, match="needs ref_logp"):
        policy_loss(x, x, x, PolicyLossOptions(beta=0.1))
    with pytest.raises(ValueError, match="needs lengths"):
        policy_loss(x, x, x, PolicyLossOptions(level="sequence"))
    with pytest.raises(ValueError, match=r"weight must be \(4,\) floating"):
        policy_loss(x, x, torch.zeros(3), PolicyLossOptions())
    with pytest.raises(ValueError, match="old_logp must be"):
        policy_loss(x, x, x, PolicyLossOptions(), old_logp=torch.zeros(4, dtype=torch.int64))
    lengths = torch.tensor([2, 2])
    with pytest.raises(ValueError, match="loss must be one of"):
        token_weights("ppo", lengths, num_sequences=2, num_tokens=4, max_tokens=3)
    with pytest.raises(ValueError, match="2 sequences"):
        token_weights("grpo", lengths, num_sequences=1, num_tokens=4, max_tokens=3)
