"""The policy loss once more: published formulas on whole logits, differentiated by autograd."""

import torch
from torch import Tensor

from kernels.logprob.policy_loss import PolicyLossOptions


def oracle(
    kind: str,
    logp: list[Tensor],
    old: list[Tensor] | None,
    ref: list[Tensor] | None,
    advantage: Tensor,
    options: PolicyLossOptions,
    max_tokens: int,
) -> Tensor:
    """The loss of whole sequences as trl's GRPOTrainer has it: (S, T) tensors and a mask."""
    lengths = [len(x) for x in logp]
    mask = torch.zeros(len(logp), max(lengths), dtype=torch.float64)
    padded = [torch.zeros_like(mask) for _ in range(3)]
    for i, n in enumerate(lengths):
        mask[i, :n] = 1
        for table, rows in zip(padded, (logp, old or [x.detach() for x in logp], ref), strict=True):
            if rows is not None:
                table[i, :n] = rows[i]
    new, before, reference = padded
    log_ratio = new - before
    if kind == "gspo":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    coef_1 = torch.exp(log_ratio)
    coef_2 = torch.clamp(coef_1, 1 - options.clip_low, 1 + options.clip_high)
    per_token = -torch.min(coef_1 * advantage[:, None], coef_2 * advantage[:, None])
    if options.beta:
        gap = reference - new
        per_token_kl = {
            "k1": -gap, "k2": gap.square() / 2, "k3": torch.exp(gap) - gap - 1,
        }[options.kl]  # fmt: skip
        per_token = per_token + options.beta * per_token_kl
    if kind in ("grpo", "gspo"):
        per_token = per_token * mask
        return (per_token.sum(-1) / mask.sum(-1)).mean()
    if kind == "dr_grpo":
        return (per_token * mask).sum() / (len(logp) * max_tokens)
    return (per_token * mask).sum() / mask.sum()
