"""The policy loss of GRPO and its variants, from log-probs: the mathematics, in one place.

For a token with advantage A, weight w and log-ratio d = logp - old_logp,

    r      = exp(d)                                   level "token"
    r      = exp(mean of d over the token's sequence) level "sequence" (GSPO)
    loss   = sum over tokens of w (-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta KL)

KL of the policy to the reference, with x = ref_logp - logp, is one of k1 = -x, k2 = x^2 / 2 and
k3 = exp(x) - x - 1. Without old log-probs the policy is on-policy: r = 1, and the gradient is that
of -A logp. Tokens of weight 0 do not count, not even in a sequence's mean; their coefficient is 0.

`coefficient`, the loss's derivative by each logp, gives the gradients of hidden states and weights
without autograd. float32 (float64 for float64 input); nothing waits for the device. N tokens, S
sequences.

Sources: DeepSeekMath (2402.03300), DAPO (2503.14476), Dr. GRPO (2503.20783), GSPO (2507.18071),
http://joschu.net/blog/kl-approx.html.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.checks import check

LOSSES = ("grpo", "dr_grpo", "dapo", "gspo")
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class PolicyLossOptions:
    """clip_low, clip_high: how far the ratio counts below and above 1. beta: weight of the KL term,
    0 for none. kl: its estimator. level: "token" or "sequence". Raises ValueError for others."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    kl: str = "k3"
    level: str = "token"

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low = {self.clip_low} is not in [0, 1]")
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high = {self.clip_high} is negative")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta = {self.beta} is not in [0, inf)")
        if self.kl not in KL_ESTIMATORS:
            raise ValueError(f"kl must be one of {KL_ESTIMATORS}, got {self.kl!r}")
        if self.level not in ("token", "sequence"):
            raise ValueError(f"level must be 'token' or 'sequence', got {self.level!r}")


@dataclass(frozen=True)
class PolicyLoss:
    """loss: (), coefficient: (N,), the derivative of loss by each logp. Metrics, each (), over
    tokens of weight other than 0 (NaN if there is none): the share whose ratio was clipped from
    below and from above, the mean KL, and the least and greatest ratio."""

    loss: Tensor
    coefficient: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl: Tensor
    ratio_min: Tensor
    ratio_max: Tensor


def token_weights(
    loss: str, lengths: Tensor, *, num_sequences: int, num_tokens: int, max_tokens: int
) -> Tensor:
    """The weight of every token, (N,) float32, of sequences of `lengths` (S,) int64 end to end. The
    weights carry the normaliser, which is what the variants of the loss differ in:

        grpo, gspo  1 / (num_sequences * tokens of its sequence)
        dr_grpo     1 / (num_sequences * max_tokens)
        dapo        1 / num_tokens

    num_sequences, num_tokens: of the whole accumulation window, of which these sequences may be a
    micro-batch. Raises ValueError for an unknown loss, or counts smaller than these sequences'.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")
    if num_sequences < len(lengths) or max_tokens < 1:
        raise ValueError(
            f"{len(lengths)} sequences of at most {max_tokens} tokens in a window of "
            f"{num_sequences}"
        )
    if loss == "dapo":
        each = torch.full_like(lengths, num_tokens)
    elif loss == "dr_grpo":
        each = torch.full_like(lengths, num_sequences * max_tokens)
    else:
        each = lengths * num_sequences
    return (1 / each.double()).float().repeat_interleave(lengths)


def policy_loss(
    logp: Tensor,
    advantage: Tensor,
    weight: Tensor,
    options: PolicyLossOptions,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    lengths: Tensor | None = None,
) -> PolicyLoss:
    """The loss of N tokens and its derivative by each log-prob.

    logp, advantage, weight, old_logp, ref_logp: (N,) floating, all on one device. ref_logp is
    needed if beta is not 0; lengths, (S,) int64, at level "sequence". Not
    differentiable: the gradient of `logp` is in the result. Raises ValueError for missing arguments
    and for other shapes.
    """
    named = {"logp": logp, "advantage": advantage, "weight": weight}
    named |= {} if old_logp is None else {"old_logp": old_logp}
    named |= {} if ref_logp is None else {"ref_logp": ref_logp}
    for name, tensor in named.items():
        check(f"policy_loss: {name}", tensor, (len(logp),), "floating")
    if options.beta and ref_logp is None:
        raise ValueError(f"policy_loss: beta = {options.beta} needs ref_logp")
    if options.level == "sequence" and lengths is None:
        raise ValueError("policy_loss: level 'sequence' needs lengths")
    dtype = torch.promote_types(logp.dtype, torch.float32)
    logp, advantage, weight = (x.detach().to(dtype) for x in (logp, advantage, weight))

    counted = weight != 0
    number = counted.sum()
    sequences = lengths if options.level == "sequence" else None
    log_ratio = torch.zeros_like(logp)
    if old_logp is not None:
        log_ratio = torch.where(counted, logp - old_logp.to(dtype), 0)
    if sequences is not None:
        log_ratio = _mean_of_sequence(log_ratio, counted, sequences)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    term = -torch.minimum(ratio * advantage, clipped * advantage)
    slope = torch.where(ratio * advantage <= clipped * advantage, -ratio * advantage, 0) * weight
    if sequences is not None:
        slope = _mean_of_sequence(slope, counted, sequences)

    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        x = torch.where(counted, ref_logp.to(dtype) - logp, 0)
        if options.kl == "k1":
            kl, by_logp = -x, torch.ones_like(x)
        elif options.kl == "k2":
            kl, by_logp = x * x / 2, -x
        else:
            kl, by_logp = x.expm1() - x, -x.expm1()
        term = term + options.beta * kl
        slope = slope + options.beta * weight * by_logp

    low = (ratio < 1 - options.clip_low) & (advantage < 0) & counted
    high = (ratio > 1 + options.clip_high) & (advantage > 0) & counted
    return PolicyLoss(
        loss=torch.where(counted, weight * term, 0).sum(),
        coefficient=torch.where(counted, slope, 0),
        clipped_low=low.sum() / number,
        clipped_high=high.sum() / number,
        kl=torch.where(counted, kl, 0).sum() / number,
        ratio_min=_extreme(torch.where(counted, ratio, math.inf).amin, ratio),
        ratio_max=_extreme(torch.where(counted, ratio, -math.inf).amax, ratio),
    )


def _mean_of_sequence(x: Tensor, counted: Tensor, lengths: Tensor) -> Tensor:
    """For each token the mean of x over those of its sequence that count."""
    # Unchecked on a GPU, where the check would wait for it.
    total, number = (
        torch.segment_reduce(each, "sum", lengths=lengths, unsafe=lengths.is_cuda)
        for each in (torch.where(counted, x, 0), counted.to(x.dtype))
    )
    return (total / number.clamp(min=1)).repeat_interleave(lengths, output_size=len(x))


def _extreme(reduce: Callable[[], Tensor], values: Tensor) -> Tensor:
    return reduce() if values.numel() else values.new_full((), math.nan)
