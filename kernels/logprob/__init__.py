"""Log-probs of chosen tokens from hidden states and the head's weight, without their logits.

    z    = cap(hidden W^T) / temperature,   cap(x) = softcap tanh(x / softcap), or x
    lse  = log sum_v exp(z_v),   p = exp(z - lse)
    logp = z_target - lse
    entropy = lse - sum_v p_v z_v

With gradients g of logp, e of the entropy and l of lse, for each v

    dz_v = p_v (l - g - e (z_v - lse + entropy)) + g [v = target]
    d(hidden W^T)_v = dz_v (1 - (z_v temperature / softcap)^2) / temperature

N tokens, H the hidden size, V the vocabulary; float32 (float64 for float64 input).

Only a chunk of rows has its logits in memory at a time. Without gradients that takes one matrix
product; the backward computes the logits again and adds two products with their gradients.
`linear_policy_loss.py` shares all of this. A target out of range is refused on CPU; on a GPU, where
a check would wait for the device, it gives NaN.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import check
from kernels.launch import runs_triton
from kernels.logprob.head import LogitHead, LogProbGradients, LogProbs
from kernels.logprob.torch_impl import TorchLogitHead
from kernels.logprob.triton_impl import TritonLogitHead


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
    log_p = torch.log_softmax(z, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return LogProbs(log_p.gather(1, target[:, None])[:, 0], entropy, torch.logsumexp(z, -1))


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
    *,
    chunk_size: int | None = None,
) -> LogProbs:
    """Log-probs, entropy and log-sum-exp of the tokens `target` after hidden states.

    hidden: (N, H), weight: (V, H), floating, of one dtype (not float64 in Triton); target: (N,)
    int64 in [0, V). softcap: positive, of the logits before the temperature, or None. chunk_size:
    rows whose logits are in memory at a time; by default 4,096 on a GPU, 128 MiB of logits on CPU.
    Computed in float32 (float64 for float64 input); the weight's gradient is accumulated in that
    dtype and rounded once. Differentiable once in hidden and weight. Raises ValueError for other
    shapes, dtypes or numbers, and on CPU for a target out of range.
    """
    check_linear("linear_logprob", hidden, weight, target, softcap, temperature, chunk_size)
    out: LogProbs = _LinearLogProb.apply(hidden, weight, target, softcap, temperature, chunk_size)
    return LogProbs(*out)


def check_linear(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    softcap: float | None,
    temperature: float,
    chunk_size: int | None,
) -> None:
    """Raise ValueError for arguments that `linear_logprob` does not take."""
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
    check(f"{name}: target", target, hidden.shape[:1], torch.int64)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{name}: softcap must be positive and finite, got {softcap}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name}: temperature must be positive, got {temperature}")
    if chunk_size is not None and chunk_size < 16:
        raise ValueError(f"{name}: chunk_size must be 16 or more, got {chunk_size}")
    if target.is_cpu and len(target) and not (target.min() >= 0 and target.max() < len(weight)):
        raise ValueError(f"{name}: targets must be in [0, {len(weight)})")


def head_of(
    weight: Tensor, softcap: float | None, temperature: float, chunk_size: int | None
) -> LogitHead:
    """The head of a weight (V, H), on its device."""
    implementation = TritonLogitHead if runs_triton(weight) else TorchLogitHead
    return implementation(weight, softcap, temperature, chunk_size)


def add_gradients(
    head: LogitHead,
    hidden: Tensor,
    target: Tensor,
    d_out: LogProbGradients,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
) -> None:
    """Compute logits again, only for rows whose log-probs have a gradient other than 0. Write these
    rows' gradients to `d_hidden` (N, H), and add the weight's to `d_weight` (V, H)."""
    needs_grad = torch.stack([x != 0 for x in d_out if x is not None]).any(0)
    order, (count,) = head.partition_rows(needs_grad)
    for rows in head.chunks(len(order)):
        index = order[rows]
        num_valid = None if count is None else count - rows.start
        head.log_probs(hidden[index], target[index], num_valid, save=True)
        d_chunk = LogProbGradients(*(None if x is None else x[index] for x in d_out))  # type: ignore[arg-type]
        d_rows = head.gradients(d_chunk, num_valid, d_hidden is not None, d_weight)
        if d_hidden is not None:
            assert d_rows is not None
            d_hidden[index] = d_rows.to(d_hidden.dtype)


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        softcap: float | None,
        temperature: float,
        chunk_size: int | None,
    ) -> LogProbs:
        head = head_of(weight, softcap, temperature, chunk_size)
        out = LogProbs(*(hidden.new_empty(len(hidden), dtype=head.dtype) for _ in range(3)))
        for rows in head.chunks(len(hidden)):
            chunk = head.log_probs(hidden[rows], target[rows])
            for result, part in zip(out, chunk, strict=True):
                result[rows] = part
        ctx.save_for_backward(hidden, weight, target)
        ctx.options = softcap, temperature, chunk_size
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, target = ctx.saved_tensors
        head = head_of(weight, *ctx.options)
        zero = hidden.new_zeros(len(hidden), dtype=head.dtype)
        logp, entropy, lse = gradients
        d_out = LogProbGradients(zero if logp is None else logp, entropy, lse)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=head.dtype) if needs_weight else None
        add_gradients(head, hidden, target, d_out, d_hidden, d_weight)
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None
