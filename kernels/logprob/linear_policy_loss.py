"""The policy loss from hidden states and the head's weight, with its gradients, without logits.

The mathematics is in `policy_loss.py`, log-probs and logit gradients in `linear_logprob.py`; here
they meet some rows at a time. Where a token's coefficient is known as soon as its log-prob is
(level "token"), the logits of a chunk become its logit gradients in place: three matrix products.
At level "sequence" a coefficient waits for the last token of its sequence, so logits are made
twice: four. Gradients are computed with the loss, where anything asks for them, and scaled in the
backward. The weight's gradient is added up in float32.

Tokens of weight 0 are not computed, and those whose coefficient is 0 have no part in the last two
products (on a GPU, at level "token": those whose advantage is 0 where beta is).
N tokens, H the hidden size, V the vocabulary, S sequences.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.logprob import (
    LogProbGradients,
    add_gradients,
    check_linear,
    head_of,
    linear_logprob,
)
from kernels.logprob.policy_loss import PolicyLoss, PolicyLossOptions, policy_loss


@dataclass(frozen=True)
class GRPOLoss:
    """loss: (), differentiable in hidden and weight. logp and entropy: (N,), 0 for tokens of weight
    0. terms: what `policy_loss` says of them: metrics, and each token's coefficient."""

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

    def part(self, rows: Tensor) -> "_Tokens":
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
    counted = token_weight != 0
    logp, entropy = (torch.where(counted, x.detach(), 0) for x in (found.logp, found.entropy))
    return GRPOLoss(loss, logp, entropy, terms)


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
        chunk_size: int | None,
        weight_grad: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        head = head_of(weight, softcap, temperature, chunk_size)
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = weight_grad
        if needs_weight and weight_grad is None:
            d_weight = torch.zeros_like(weight, dtype=head.dtype)
        logp, entropy = (hidden.new_zeros(len(hidden), dtype=head.dtype) for _ in range(2))
        at_once = options.level == "token" and (d_hidden is not None or d_weight is not None)
        counted = tokens.weight != 0
        moved = counted if options.beta else counted & (tokens.advantage != 0)
        order, (num_moved, num_counted) = head.front(moved, counted)
        for rows in head.chunks(len(order)):
            at = order[rows]
            limits = (None if n is None else n - rows.start for n in (num_counted, num_moved))
            limit, gradient_limit = limits
            found = head.log_probs(hidden[at], tokens.target[at], limit, hold=at_once)
            logp[at], entropy[at] = found.logp, found.entropy
            if at_once:
                terms = tokens.part(at).terms(found.logp, options)
                given = LogProbGradients(terms.coefficient)
                own = head.gradients(given, gradient_limit, d_hidden is not None, d_weight)
                if d_hidden is not None:
                    assert own is not None
                    d_hidden[at] = own.to(d_hidden.dtype)
        if options.level == "sequence" and (d_hidden is not None or d_weight is not None):
            given = LogProbGradients(tokens.terms(logp, options).coefficient)
            add_gradients(head, hidden, tokens.target, given, d_hidden, d_weight)
        ctx.gradients = d_hidden, None if weight_grad is not None else d_weight
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(logp, entropy)
        return hidden.new_zeros((), dtype=head.dtype), logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("grpo_loss: its backward runs once, and has run")
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        if d_hidden is not None:
            d_hidden.mul_(grad)
        if d_weight is not None:
            d_weight = d_weight.mul_(grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, *[None] * 6


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
    chunk_size: int | None = None,
    weight_grad: Tensor | None = None,
) -> GRPOLoss:
    """The policy loss of the tokens `target` after hidden states.

    hidden (N, H), weight (V, H), target (N,), softcap, temperature and chunk_size as for
    `linear_logprob` (on a GPU 1,024 rows at a time take a quarter of the memory); the others, (N,),
    as for `policy_loss`, with the weights of `token_weights`. Log-probs are those at `temperature`,
    as the sampler's are. weight_grad: (V, H) float32 (float64 for float64 input), contiguous: gets
    the weight's gradient added to it at once, in place of autograd's, whatever the loss is then
    multiplied with. Raises ValueError for other shapes, and as those two do.
    """
    check_linear("grpo_loss", hidden, weight, target, softcap, temperature, chunk_size)
    if weight_grad is not None and not (
        weight_grad.shape == weight.shape
        and weight_grad.dtype == torch.promote_types(weight.dtype, torch.float32)
        and weight_grad.is_contiguous()
    ):
        raise ValueError(
            f"grpo_loss: weight_grad must be contiguous, {tuple(weight.shape)} and float32, got "
            f"{tuple(weight_grad.shape)} {weight_grad.dtype}"
        )
    tokens = _Tokens(target, advantage, token_weight, old_logp, ref_logp, lengths)
    through, logp, entropy = _GRPOLoss.apply(
        hidden, weight, tokens, options, softcap, temperature, chunk_size,
        weight_grad if torch.is_grad_enabled() else None,
    )  # fmt: skip
    terms = tokens.terms(logp, options)
    return GRPOLoss(terms.loss + through, logp, entropy, terms)
