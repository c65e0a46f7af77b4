"""Log-probs of chosen tokens from hidden states and the head's weight, without their logits.

    z    = cap(hidden W^T) / temperature,   cap(x) = softcap tanh(x / softcap), or x
    lse  = log sum_v exp(z_v),   p = exp(z - lse)
    logp = z_target - lse
    entropy = lse - sum_v p_v z_v

and with gradients g of logp, e of the entropy and l of lse, for each v

    dz_v = p_v (l - g - e (z_v - lse + entropy)) + g [v = target]
    d(hidden W^T)_v = dz_v (1 - (z_v temperature / softcap)^2) / temperature

Logits are made for some rows at a time and gone when the next are; the backward makes them again:
one matrix product without gradients, four with. A row's results depend on nothing but the row,
since rows are filled up to a multiple of 16. There is no Triton kernel yet: torch runs everywhere.
N tokens, H the hidden size, V the vocabulary.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGN = 16
_MAX_LOGITS = 1 << 25  # held at a time: 128 MiB of float32


class LogProbs(NamedTuple):
    """Each (N,) float32 (float64 for float64 input); natural logarithms."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor


def linear_logprob_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> LogProbs:
    """Specification of `linear_logprob`, with all logits at once."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    z = logits / temperature
    lse = torch.logsumexp(z, -1)
    entropy = lse - (torch.softmax(z, -1) * z).sum(-1)
    return LogProbs(z.gather(1, target[:, None])[:, 0] - lse, entropy, lse)


def chunks(num_tokens: int, vocab_size: int) -> Iterator[slice]:
    """Rows whose logits are held together."""
    size = max(_ALIGN, _MAX_LOGITS // vocab_size // _ALIGN * _ALIGN)
    for first in range(0, num_tokens, size):
        yield slice(first, min(first + size, num_tokens))


def aligned(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (n, H) in a dtype, with zeros up to a multiple of 16."""
    out = rows.new_zeros(-(-len(rows) // _ALIGN) * _ALIGN, rows.shape[1], dtype=dtype)
    out[: len(rows)] = rows
    return out


def scaled_logits(
    rows: Tensor, weight: Tensor, softcap: float | None, temperature: float
) -> Tensor:
    """z of aligned rows, (n, V)."""
    z = rows @ weight.T
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z if temperature == 1 else z.div_(temperature)


def log_probs_(z: Tensor, target: Tensor) -> LogProbs:
    """Of z (n, V), which becomes z less its rows' maxima, and the rows' targets (n,)."""
    maximum = z.amax(-1, keepdim=True)
    z.sub_(maximum)  # all differences are taken from here on: a peaked row's entropy is one of them
    weights = z.exp()
    total = weights.sum(-1)
    log_total = total.log()
    mean = torch.bmm(weights[:, None], z[:, :, None])[:, 0, 0] / total
    logp = z.gather(1, target[:, None])[:, 0] - log_total
    return LogProbs(logp, log_total - mean, log_total + maximum[:, 0])


def logit_gradients_(
    z: Tensor,
    target: Tensor,
    found: LogProbs,
    gradients: LogProbs,
    softcap: float | None,
    temperature: float,
    shift: Tensor | None = None,
) -> Tensor:
    """In place of z, the gradients of the raw logits, given those of what was found. shift: (n, 1),
    what z and the log-sum-exps lack, if they lack anything."""
    slope = None
    if softcap is not None:
        slope = (
            z * (temperature / softcap) if shift is None else (z + shift) * (temperature / softcap)
        )
        slope.square_().neg_().add_(1)
    centred = z.sub_(found.lse[:, None])  # the log-probs of all tokens
    probability = centred.exp()
    dz = centred.add_(found.entropy[:, None]).mul_(-gradients.entropy[:, None])
    dz.add_((gradients.lse - gradients.logp)[:, None]).mul_(probability)
    dz.scatter_add_(1, target[:, None], gradients.logp[:, None])
    if slope is not None:
        dz.mul_(slope)
    return dz if temperature == 1 else dz.div_(temperature)


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        softcap: float | None,
        temperature: float,
    ) -> LogProbs:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wide = weight.to(dtype)
        found = LogProbs(*(hidden.new_empty(len(hidden), dtype=dtype) for _ in LogProbs._fields))
        for rows in chunks(len(hidden), len(weight)):
            z = scaled_logits(aligned(hidden[rows], dtype), wide, softcap, temperature)
            own = log_probs_(z, padded(target[rows], len(z)))
            for all_rows, here in zip(found, own, strict=True):
                all_rows[rows] = here[: rows.stop - rows.start]
        ctx.save_for_backward(hidden, weight, target, *found)
        ctx.softcap, ctx.temperature = softcap, temperature
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, *found = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = found[0].dtype
        wide = weight.to(dtype)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(wide) if needs_weight else None
        for rows in chunks(len(hidden), len(weight)):
            x = aligned(hidden[rows], dtype)
            z = scaled_logits(x, wide, ctx.softcap, ctx.temperature)
            dz = logit_gradients_(
                z,
                padded(target[rows], len(z)),
                LogProbs(*(padded(x[rows], len(z)) for x in found)),
                LogProbs(*(padded(x[rows].to(dtype), len(z)) for x in gradients)),
                ctx.softcap,
                ctx.temperature,
            )
            if d_hidden is not None:
                d_hidden[rows] = (dz @ wide)[: rows.stop - rows.start].to(hidden.dtype)
            if d_weight is not None:
                d_weight.addmm_(dz.T, x)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


def padded(values: Tensor, size: int) -> Tensor:
    """Values (n,), and zeros up to `size`."""
    out = values.new_zeros(size)
    out[: len(values)] = values
    return out


def check_linear(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    softcap: float | None,
    temperature: float,
) -> None:
    """Raises ValueError for what `linear_logprob` does not take."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (N, H) "
            "and (V, H)"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"{name}: hidden and weight must be floating and of one dtype, got {hidden.dtype} and "
            f"{weight.dtype}"
        )
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"{name}: target must be ({len(hidden)},) int64, got {tuple(target.shape)} "
            f"{target.dtype}"
        )
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{name}: softcap must be positive and finite, got {softcap}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name}: temperature must be positive, got {temperature}")
    if target.is_cpu and len(target) and not (target.min() >= 0 and target.max() < len(weight)):
        raise ValueError(f"{name}: targets must be in [0, {len(weight)})")


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> LogProbs:
    """Log-probs, entropy and log-sum-exp of the tokens `target` after hidden states.

    hidden: (N, H), weight: (V, H), floating, of one dtype; target: (N,) int64 in [0, V). softcap,
    of the logits before the temperature: positive, or None. Everything is computed in float32
    (float64 for float64 input); the gradient of the weight is added up in it and rounded once.
    Differentiable once in hidden and weight. Raises ValueError for other shapes, dtypes or numbers,
    and on CPU for a target out of range.
    """
    check_linear("linear_logprob", hidden, weight, target, softcap, temperature)
    found: LogProbs = _LinearLogProb.apply(hidden, weight, target, softcap, temperature)
    return LogProbs(*found)
