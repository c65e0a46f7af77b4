"""The policy loss from hidden states and the head's weight, with its gradients, without logits.

The loss is `policy_loss`, and log-probs and logit gradients come from a `LogitHead`; here they meet
some rows at a time. At level "token" a coefficient depends on its own log-prob alone, so the logits
of a chunk are overwritten with their gradients: three matrix products. At level "sequence" (GSPO) a
coefficient waits for the last token of its sequence, so logits are computed twice: four products.
If a gradient is needed it is computed with the loss, and the backward only scales it. The weight's
gradient is accumulated in float32.

Tokens of weight 0 are not computed. Tokens whose coefficient is 0 take no part in the last two
products (on a GPU at level "token": tokens of advantage 0, if beta is 0).
N tokens, H the hidden size, V the vocabulary, S sequences.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.logprob import add_gradients, check_linear, head_of, linear_logprob_ref
from kernels.logprob.head import LogProbGradients
from kernels.logprob.policy_loss import PolicyLoss, PolicyLossOptions, policy_loss


@dataclass(frozen=True)
class LinearPolicyLoss:
    """loss: (), differentiable in hidden and weight. logp and entropy: (N,), 0 for tokens of weight
    0. terms: the result of `policy_loss`: metrics, and each token's coefficient."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    terms: PolicyLoss


@dataclass(frozen=True)
class _Tokens:
    """What `policy_loss` needs to know of the tokens, by its own names."""

    target: Tensor
    advantage: Tensor
    weight: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    lengths: Tensor | None

    def select(self, rows: Tensor) -> "_Tokens":
        """The tokens at `rows`, without sequences."""

        def select(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        return _Tokens(
            self.target[rows], self.advantage[rows], self.weight[rows], select(self.old_logp),
            select(self.ref_logp), None,
        )  # fmt: skip

    def terms(self, logp: Tensor, options: PolicyLossOptions) -> PolicyLoss:
        return policy_loss(
            logp, self.advantage, self.weight, options,
            old_logp=self.old_logp, ref_logp=self.ref_logp, lengths=self.lengths,
        )  # fmt: skip


def linear_policy_loss_ref(
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
) -> LinearPolicyLoss:
    """Specification of `linear_policy_loss`: `policy_loss` of all logits, under autograd."""
    out = linear_logprob_ref(hidden, weight, target, softcap, temperature)
    tokens = _Tokens(target, advantage, token_weight, old_logp, ref_logp, lengths)
    terms = tokens.terms(out.logp, options)
    through = (terms.coefficient * out.logp).sum()
    loss = terms.loss + through - through.detach()
    counted = token_weight != 0
    logp, entropy = (torch.where(counted, x.detach(), 0) for x in (out.logp, out.entropy))
    return LinearPolicyLoss(loss, logp, entropy, terms)


def linear_policy_loss(
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
) -> LinearPolicyLoss:
    """The policy loss of the tokens `target` after hidden states.

    hidden (N, H), weight (V, H), target (N,), softcap, temperature and chunk_size as for
    `linear_logprob` (on a GPU 1,024 rows at a time take a quarter of the memory); the others, (N,),
    as for `policy_loss`, with the weights of `token_weights`. Log-probs are those at `temperature`,
    as the sampler's are. weight_grad: (V, H) float32 (float64 for float64 input), contiguous: the
    weight's gradient is added to it at once, instead of by autograd, and is that of the loss itself
    whatever the loss is multiplied with later. Raises ValueError for other shapes, and as those two
    do.
    """
    check_linear("linear_policy_loss", hidden, weight, target, softcap, temperature, chunk_size)
    if weight_grad is not None and not (
        weight_grad.shape == weight.shape
        and weight_grad.dtype == torch.promote_types(weight.dtype, torch.float32)
        and weight_grad.is_contiguous()
    ):
        raise ValueError(
            f"linear_policy_loss: weight_grad must be contiguous, {tuple(weight.shape)} and "
            f"float32, got {tuple(weight_grad.shape)} {weight_grad.dtype}"
        )
    tokens = _Tokens(target, advantage, token_weight, old_logp, ref_logp, lengths)
    through, logp, entropy = _LinearPolicyLoss.apply(
        hidden, weight, tokens, options, softcap, temperature, chunk_size,
        weight_grad if torch.is_grad_enabled() else None,
    )  # fmt: skip
    terms = tokens.terms(logp, options)
    return LinearPolicyLoss(terms.loss + through, logp, entropy, terms)


class _LinearPolicyLoss(torch.autograd.Function):
    """Returns 0, through which the gradients of the loss flow, and logp and entropy (N,)."""

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
        needs_grad = counted if options.beta else counted & (tokens.advantage != 0)
        order, counts = head.partition_rows(needs_grad, counted)
        for rows in head.chunks(len(order)):
            index = order[rows]
            num_grad, num_valid = (None if n is None else n - rows.start for n in counts)
            out = head.log_probs(hidden[index], tokens.target[index], num_valid, save=at_once)
            logp[index], entropy[index] = out.logp, out.entropy
            if at_once:
                terms = tokens.select(index).terms(out.logp, options)
                d_out = LogProbGradients(terms.coefficient)
                d_rows = head.gradients(d_out, num_grad, d_hidden is not None, d_weight)
                if d_hidden is not None:
                    assert d_rows is not None
                    d_hidden[index] = d_rows.to(d_hidden.dtype)
        if options.level == "sequence" and (d_hidden is not None or d_weight is not None):
            d_out = LogProbGradients(tokens.terms(logp, options).coefficient)
            add_gradients(head, hidden, tokens.target, d_out, d_hidden, d_weight)
        ctx.gradients = d_hidden, None if weight_grad is not None else d_weight
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(logp, entropy)
        return hidden.new_zeros((), dtype=head.dtype), logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_policy_loss: backward runs once, and has run")
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        if d_hidden is not None:
            d_hidden.mul_(grad)
        if d_weight is not None:
            d_weight = d_weight.mul_(grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, *[None] * 6
