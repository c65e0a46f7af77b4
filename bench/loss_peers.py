"""A step of policy loss to measure, and its rivals: whole logits under autograd, Liger-Kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.timing import DEVICE
from kernels.logprob.policy_loss import PolicyLossOptions

OPTIONS = PolicyLossOptions(beta=0.04)


@dataclass(frozen=True)
class Head:
    """N tokens under a head of V tokens and H channels."""

    tokens: int
    hidden: int
    vocab: int
    softcap: float | None
    dtype: torch.dtype


@dataclass
class Batch:
    """Tensors of a step; one eighth of the tokens have no advantage."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    advantage: Tensor
    token_weight: Tensor
    old_logp: Tensor
    ref_logp: Tensor

    @staticmethod
    def of(head: Head) -> "Batch":
        generator = torch.Generator(DEVICE).manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE)

        n = head.tokens
        weight = (randn(head.vocab, head.hidden) * 2 * head.hidden**-0.5).to(head.dtype)
        target = torch.randint(head.vocab, (n,), generator=generator, device=DEVICE)
        near = -randn(n).abs() - 12
        advantage = torch.where(torch.arange(n, device=DEVICE) % 8 < 7, randn(n), 0)
        return Batch(
            randn(n, head.hidden).to(head.dtype).requires_grad_(), weight.requires_grad_(), target,
            advantage, torch.full((n,), 1 / n, device=DEVICE), near, near + 0.1 * randn(n),
        )  # fmt: skip


def unfused(batch: Batch, softcap: float | None) -> Tensor:
    """The loss on whole logits."""
    logits = (batch.hidden @ batch.weight.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits, -1).gather(1, batch.target[:, None])[:, 0]
    ratio = (logp - batch.old_logp).exp()
    clipped = ratio.clamp(1 - OPTIONS.clip_low, 1 + OPTIONS.clip_high)
    gap = batch.ref_logp - logp
    kl = gap.expm1() - gap
    term = -torch.minimum(ratio * batch.advantage, clipped * batch.advantage) + OPTIONS.beta * kl
    return (batch.token_weight * term).sum()


def liger(batch: Batch, softcap: float | None) -> Tensor:
    """Liger-Kernel's fused loss: one sequence, no soft-cap."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # type: ignore[import-not-found]

    if softcap is not None:
        raise ValueError("has no soft-cap")
    loss = LigerFusedLinearGRPOLoss(
        beta=OPTIONS.beta, epsilon_low=OPTIONS.clip_low, epsilon_high=OPTIONS.clip_high,
        loss_type="dapo", use_ref_model=True, chunk_size=1, compiled=False,
    )  # fmt: skip
    # A chunk is of whole sequences: rows of 512 tokens, which share an advantage.
    rows = len(batch.target) // 512
    return loss(
        batch.hidden.view(rows, 512, -1), batch.weight, batch.target.view(rows, 512),
        torch.ones(rows, 512, device=DEVICE), batch.advantage.view(rows, 512)[:, 0],
        ref_per_token_logps=batch.ref_logp.view(rows, 512),
        old_per_token_logps=batch.old_logp.view(rows, 512),
    )[0]  # fmt: skip
