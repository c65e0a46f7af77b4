"""The logits of some rows at a time in torch; the package's docstring has the mathematics.

Logits and their gradients share one buffer. Rows are padded to a multiple of 16, so that a row's
results do not depend on how many rows are computed with it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.logprob.head import LogitHead, LogProbGradients, LogProbs

_ALIGN = 16
_MAX_LOGITS = 1 << 25  # of a chunk by default: 128 MiB of float32


class _Saved(NamedTuple):
    """Rows between `log_probs` and `gradients`; all tensors are padded."""

    hidden: Tensor  # (n, H)
    target: Tensor  # (n,)
    z: Tensor  # (n, V), less their rows' maxima
    row_max: Tensor  # (n, 1)
    log_sum: Tensor  # (n, 1), of exp(z)
    mean: Tensor  # (n, 1), of z under p


class TorchLogitHead(LogitHead):
    """`LogitHead` on CPU. Rows without a gradient take no part in products."""

    def __init__(
        self, weight: Tensor, softcap: float | None, temperature: float, chunk_size: int | None
    ) -> None:
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self._weight = weight.to(self.dtype)
        self._softcap = softcap
        self._temperature = temperature
        size = _MAX_LOGITS // len(weight) if chunk_size is None else chunk_size
        self.chunk_size = max(_ALIGN, size // _ALIGN * _ALIGN)
        self._saved: _Saved | None = None

    def partition_rows(self, *masks: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        return masks[-1].nonzero()[:, 0], [None] * len(masks)

    def log_probs(
        self, hidden: Tensor, target: Tensor, num_valid: Tensor | None = None, save: bool = False
    ) -> LogProbs:
        num_rows = len(hidden)
        hidden, target = self._padded(hidden.to(self.dtype)), self._padded(target)
        z = hidden @ self._weight.T
        if self._softcap is not None:
            z.div_(self._softcap).tanh_().mul_(self._softcap)
        if self._temperature != 1:
            z.div_(self._temperature)
        row_max = z.amax(-1, keepdim=True)
        z.sub_(row_max)  # only differences from here on: a peaked row's entropy is one of them
        weights = z.exp()
        row_sum = weights.sum(-1, keepdim=True)
        mean = torch.bmm(weights[:, None], z[:, :, None])[:, 0] / row_sum
        log_sum = row_sum.log()
        out = z.gather(1, target[:, None]) - log_sum, log_sum - mean, log_sum + row_max
        # From the rounded log-sum-exp, p would be off by the unit of a number as large as that.
        self._saved = _Saved(hidden, target, z, row_max, log_sum, mean) if save else None
        return LogProbs(*(x[:num_rows, 0] for x in out))

    def gradients(
        self,
        d_out: LogProbGradients,
        num_valid: Tensor | None,
        needs_hidden: bool,
        d_weight: Tensor | None,
    ) -> Tensor | None:
        assert self._saved is not None
        saved, self._saved = self._saved, None
        num_rows = len(d_out.logp)
        needs_grad = torch.stack([x != 0 for x in d_out if x is not None]).any(0).nonzero()[:, 0]
        d_hidden = saved.hidden.new_zeros(num_rows, saved.hidden.shape[1]) if needs_hidden else None
        if len(needs_grad) < num_rows:
            saved = _Saved(*(self._padded(x[needs_grad]) for x in saved))
        if not len(needs_grad):
            return d_hidden
        logp, entropy, lse = (
            None if x is None else self._padded(x[needs_grad].to(self.dtype)) for x in d_out
        )
        assert logp is not None
        dz = self._logit_gradients(saved, LogProbGradients(logp, entropy, lse))
        if d_hidden is not None:
            d_hidden[needs_grad] = (dz @ self._weight)[: len(needs_grad)]
        if d_weight is not None:
            d_weight.addmm_(dz.T, saved.hidden)
        return d_hidden

    def _logit_gradients(self, saved: _Saved, d_out: LogProbGradients) -> Tensor:
        """The gradients of the raw logits, in place of z."""
        _, target, z, row_max, log_sum, mean = saved
        slope = None
        if self._softcap is not None:
            slope = (z + row_max).mul_(self._temperature / self._softcap)
            slope.square_().neg_().add_(1)
        common = -d_out.logp if d_out.lse is None else d_out.lse - d_out.logp
        if d_out.entropy is None:
            dz = z.sub_(log_sum).exp_().mul_(common[:, None])
        else:
            probability = (z - log_sum).exp_()
            dz = z.sub_(mean).mul_(-d_out.entropy[:, None]).add_(common[:, None])
            dz.mul_(probability)
        dz.scatter_add_(1, target[:, None], d_out.logp[:, None])
        if slope is not None:
            dz.mul_(slope)
        return dz if self._temperature == 1 else dz.div_(self._temperature)

    def _padded(self, rows: Tensor) -> Tensor:
        """Rows, and zeros up to a multiple of 16."""
        missing = -len(rows) % _ALIGN
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
