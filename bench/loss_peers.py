"""A step of policy loss to measure, and its peers: whole logits under autograd, Liger-Kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.timing import DEVICE, Fill, randn
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
    def of(head: Head, tensor: Fill = randn) -> "Batch":
        """Leaves of autograd, in inference mode too. tensor: as in `OpCase.make_inputs`."""
        n, h = head.tokens, head.hidden
        with torch.inference_mode(False):
            row = torch.arange(n, device=DEVICE)
            near = -randn(n).abs() - 12
            return Batch(
                tensor(n, h, dtype=head.dtype).requires_grad_(),
                tensor(head.vocab, h, dtype=head.dtype, scale=2 * h**-0.5).requires_grad_(),
                row * 7919 % head.vocab, torch.where(row % 8 < 7, randn(n), 0),
                torch.full((n,), 1 / n, device=DEVICE), near, near + 0.1 * randn(n),
            )  # fmt: skip

    def rows(self, rows: list[int], dtype: torch.dtype) -> "Batch":
        """Some tokens alone, in another dtype, float32 at least beside the head; only `hidden` is a
        leaf."""
        wide = torch.promote_types(dtype, torch.float32)
        of_rows = (
            x[rows] for x in (self.advantage, self.token_weight, self.old_logp, self.ref_logp)
        )
        hidden = self.hidden.detach()[rows].to(dtype).requires_grad_()
        weight = self.weight.detach().to(dtype)
        return Batch(hidden, weight, self.target[rows], *(x.to(wide) for x in of_rows))


def unfused(batch: Batch, softcap: float | None) -> Tensor:
    """The loss on whole logits."""
    logits = batch.hidden @ batch.weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
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
