"""The policy loss from hidden states and the head's weight, with its gradients, without logits.

The mathematics is in `policy_loss.py`, log-probs and logit gradients in `linear_logprob.py`; here
they meet some rows at a time. Where a token's coefficient is known as soon as its log-prob is
(level "token"), the logits of a chunk become its logit gradients in place: three matrix products.
At level "sequence" a coefficient waits for the last token of its sequence, so logits are made
twice: four. Gradients are computed with the loss, where anything asks for them, and scaled in the
backward. The weight's gradient is added up in float32. There is no Triton kernel yet: torch runs
everywhere.
N tokens, H the hidden size, V the vocabulary, S sequences.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.linear_logprob import (
    LogProbs,
    aligned,
    check_linear,
    chunks,
    linear_logprob,
    log_probs_,
    logit_gradients_,
    padded,
    scaled_logits,
)
from kernels.policy_loss import PolicyLoss, PolicyLossOptions, policy_loss


@dataclass(frozen=True)
class GRPOLoss:
    """loss: (), differentiable in hidden and weight. logp and entropy: (N,), of all tokens. terms:
    what `policy_loss` says of them: metrics, and each token's coefficient."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    terms: PolicyLoss


@dataclass(frozen=True)
class _Tokens:
    """What belongs to the tokens; `part` is that of some rows."""

    target: Tensor
    advantage: Tensor
    weight: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    lengths: Tensor | None

    def part(self, rows: slice) -> "_Tokens":
        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        return _Tokens(
            self.target[rows], self.advantage[rows], self.weight[rows], cut(self.old_logp),
            cut(self.ref_logp), None,
        )  # fmt: skip

    def terms(self, logp: Tensor, options: PolicyLossOptions) -> PolicyLoss:
        return policy_loss(
            logp, self.advantage, self.weight, options,
            old_logp=self.old_logp, ref_logp=self.ref_logp, lengths=self.lengths,
        )  # fmt: skip


def grpo_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantage: Tensor,
    token_weight: Tensor,
    options: PolicyLossOptions,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    lengths: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> GRPOLoss:
    """Specification of `grpo_loss`: log-probs by `linear_logprob`, whose gradients autograd takes
    further."""
    found = linear_logprob(hidden, weight, target, softcap, temperature)
    tokens = _Tokens(target, advantage, token_weight, old_logp, ref_logp, lengths)
    terms = tokens.terms(found.logp, options)
    through = (terms.coefficient * found.logp).sum()
    loss = terms.loss + through - through.detach()
    return GRPOLoss(loss, found.logp.detach(), found.entropy.detach(), terms)


class _GRPOLoss(torch.autograd.Function):
    """Gives 0, through which the gradients of the loss flow, and logp and entropy (N,)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: _Tokens,
        options: PolicyLossOptions,
        softcap: float | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wide = weight.to(dtype)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(wide) if needs_weight else None
        logp, entropy = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(2))
        coefficient = None  # of all tokens, where a token's does not follow from its own log-prob
        if options.level == "sequence":
            logp = linear_logprob(hidden, weight, tokens.target, softcap, temperature).logp
            coefficient = tokens.terms(logp, options).coefficient
        for rows in chunks(len(hidden), len(weight)):
            here = rows.stop - rows.start
            x = aligned(hidden[rows], dtype)
            target = padded(tokens.target[rows], len(x))
            z = scaled_logits(x, wide, softcap, temperature)
            maximum = z.amax(-1, keepdim=True)
            found = log_probs_(z, target)
            logp[rows], entropy[rows] = found.logp[:here], found.entropy[:here]
            if d_hidden is None and d_weight is None:
                continue
            if coefficient is None:
                own = tokens.part(rows).terms(found.logp[:here], options).coefficient
            else:
                own = coefficient[rows]
            zero = torch.zeros_like(found.logp)
            dz = logit_gradients_(
                z,
                target,
                found._replace(lse=found.lse - maximum[:, 0]),
                LogProbs(padded(own, len(x)), zero, zero),
                softcap,
                temperature,
                maximum,
            )
            if d_hidden is not None:
                d_hidden[rows] = (dz @ wide)[:here].to(hidden.dtype)
            if d_weight is not None:
                d_weight.addmm_(dz.T, x)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(logp, entropy)
        return hidden.new_zeros((), dtype=dtype), logp, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * grad.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None


def grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantage: Tensor,
    token_weight: Tensor,
    options: PolicyLossOptions,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    lengths: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> GRPOLoss:
    """The policy loss of the tokens `target` after hidden states.

    hidden (N, H), weight (V, H), target (N,), softcap and temperature as for `linear_logprob`; the
    others, (N,), as for `policy_loss`, with the weights of `token_weights`. Log-probs are those at
    `temperature`, as the sampler's are. Raises ValueError as those two do.
    """
    check_linear("grpo_loss", hidden, weight, target, softcap, temperature)
    tokens = _Tokens(target, advantage, token_weight, old_logp, ref_logp, lengths)
    through, logp, entropy = _GRPOLoss.apply(hidden, weight, tokens, options, softcap, temperature)
    terms = tokens.terms(logp, options)
    return GRPOLoss(terms.loss + through, logp, entropy, terms)
