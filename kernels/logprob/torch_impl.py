"""The logits of some rows at a time on CPU, in torch; the mathematics is in `linear_logprob.py`.

Everything is computed in float32 (float64 for float64 input). Logits and their gradients share one
buffer. Rows are filled up to a multiple of 16, so that a row's results depend on nothing but the
row. n rows, H the hidden size, V the vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGN = 16
_MAX_LOGITS = 1 << 25  # held at a time, unless told otherwise: 128 MiB of float32


class LogProbs(NamedTuple):
    """Each (N,) float32 (float64 for float64 input); natural logarithms."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor


class LogProbGradients(NamedTuple):
    """Gradients of log-probs, each (N,) in their dtype, or None: 0."""

    logp: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None


class _Held(NamedTuple):
    """Rows between `log_probs` and `gradients`; all tensors are filled up."""

    hidden: Tensor  # (n, H)
    target: Tensor  # (n,)
    z: Tensor  # (n, V), less their rows' maxima
    maximum: Tensor  # (n, 1)
    found: LogProbs


class HeadCPU:
    """The head's weight, (V, H), and what is done with its logits z of some rows."""

    def __init__(
        self, weight: Tensor, softcap: float | None, temperature: float, chunk_size: int | None
    ) -> None:
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self._weight = weight.to(self.dtype)
        self._softcap = softcap
        self._temperature = temperature
        size = _MAX_LOGITS // len(weight) if chunk_size is None else chunk_size
        self._chunk_size = max(_ALIGN, size // _ALIGN * _ALIGN)
        self._held: _Held | None = None

    def chunks(self, num_rows: int) -> Iterator[slice]:
        """Rows whose logits are held together."""
        for first in range(0, num_rows, self._chunk_size):
            yield slice(first, min(first + self._chunk_size, num_rows))

    def front(self, *wanted: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The rows of the last of `wanted`, (N,) bool, of which the others are parts; there is
        nothing to count."""
        return wanted[-1].nonzero()[:, 0], [None] * len(wanted)

    def log_probs(
        self, hidden: Tensor, target: Tensor, limit: Tensor | None = None, hold: bool = False
    ) -> LogProbs:
        """Of rows (n, H) and their targets (n,). hold: `gradients` comes next."""
        num_rows = len(hidden)
        hidden, target = self._filled(hidden.to(self.dtype)), self._filled(target)
        z = hidden @ self._weight.T
        if self._softcap is not None:
            z.div_(self._softcap).tanh_().mul_(self._softcap)
        if self._temperature != 1:
            z.div_(self._temperature)
        maximum = z.amax(-1, keepdim=True)
        z.sub_(maximum)  # only differences from here on: a peaked row's entropy is one of them
        weights = z.exp()
        total = weights.sum(-1)
        mean = torch.bmm(weights[:, None], z[:, :, None])[:, 0, 0] / total
        log_total = total.log()
        logp = z.gather(1, target[:, None])[:, 0] - log_total
        found = LogProbs(logp, log_total - mean, log_total + maximum[:, 0])
        self._held = _Held(hidden, target, z, maximum, found) if hold else None
        return LogProbs(*(x[:num_rows] for x in found))

    def gradients(
        self,
        given: LogProbGradients,
        limit: Tensor | None,
        needs_hidden: bool,
        d_weight: Tensor | None,
    ) -> Tensor | None:
        """The gradient of the rows held, (n, H), from those of their log-probs; the weight's is
        added to `d_weight`. Rows without a gradient cost nothing. The rows are not held any more.
        """
        assert self._held is not None
        held, self._held = self._held, None
        num_rows = len(given.logp)
        asked = torch.stack([x != 0 for x in given if x is not None]).any(0).nonzero()[:, 0]
        d_hidden = held.hidden.new_zeros(num_rows, held.hidden.shape[1]) if needs_hidden else None
        if len(asked) < num_rows:
            hidden, target, z, maximum = (self._filled(x[asked]) for x in held[:4])
            found = LogProbs(*(self._filled(x[asked]) for x in held.found))
            held = _Held(hidden, target, z, maximum, found)
        if not len(asked):
            return d_hidden
        logp, entropy, lse = (
            None if x is None else self._filled(x[asked].to(self.dtype)) for x in given
        )
        assert logp is not None
        dz = self._logit_gradients(held, LogProbGradients(logp, entropy, lse))
        if d_hidden is not None:
            d_hidden[asked] = (dz @ self._weight)[: len(asked)]
        if d_weight is not None:
            d_weight.addmm_(dz.T, held.hidden)
        return d_hidden

    def _logit_gradients(self, held: _Held, given: LogProbGradients) -> Tensor:
        """Of the raw logits, in place of z."""
        _, target, z, maximum, found = held
        slope = None
        if self._softcap is not None:
            slope = (z + maximum).mul_(self._temperature / self._softcap)
            slope.square_().neg_().add_(1)
        dz = z.sub_(found.lse[:, None] - maximum)  # the log-probs of all tokens
        along = -given.logp if given.lse is None else given.lse - given.logp
        if given.entropy is None:
            dz.exp_().mul_(along[:, None])
        else:
            probability = dz.exp()
            dz.add_(found.entropy[:, None]).mul_(-given.entropy[:, None]).add_(along[:, None])
            dz.mul_(probability)
        dz.scatter_add_(1, target[:, None], given.logp[:, None])
        if slope is not None:
            dz.mul_(slope)
        return dz if self._temperature == 1 else dz.div_(self._temperature)

    def _filled(self, rows: Tensor) -> Tensor:
        """Rows, and zeros up to a multiple of 16."""
        missing = -len(rows) % _ALIGN
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
