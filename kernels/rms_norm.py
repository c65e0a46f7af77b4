"""Root-mean-square norm over the last dimension, with an optional residual addition before it.

    s = x + residual                                  (rounded to the dtype of the sum)
    y = s / sqrt(mean(s^2) + eps) * w                 (or * (1 + w): Gemma)

T tokens (or tokens x heads), H the normalised size. Everything after the sum is computed in
float32 (float64 for float64 input) and rounded once at the end.

Row results do not depend on the other rows: the mean runs within a row, and squares, `rsqrt` and
products round alike in the vector body and the scalar tail of ATen's loops.

It does not subtract a mean and has no bias.
"""

from typing import Any

import torch
from torch import Tensor


def rms_norm_ref(
    x: Tensor, weight: Tensor, eps: float, plus_one: bool = False, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Specification of `rms_norm`, in plain torch for any device and floating dtype."""
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    scale = weight.to(wide.dtype) + (1 if plus_one else 0)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * scale
    normed = normed.to(total.dtype)
    return normed if residual is None else (normed, total)


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms: dx = (dy w - n mean(dy w n)) / rms, dw = sum over rows of dy n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, rstd)
        ctx.plus_one = plus_one
        return (wide * rstd).mul_(_scale(weight, plus_one, wide.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        grad = grad.to(rstd.dtype)
        normed = x * rstd
        d_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * _scale(weight, ctx.plus_one, rstd.dtype)
        along = (grad * normed).mean(-1, keepdim=True)
        d_x = grad.sub_(normed.mul_(along)).mul_(rstd)
        return d_x.to(x.dtype), d_weight, None, None


def _scale(weight: Tensor, plus_one: bool, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) + 1 if plus_one else weight.to(dtype)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, plus_one: bool = False, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise `x`, or `x + residual`, to unit root mean square and scale it.

    x: (..., H), floating. weight: (H,), any floating dtype. residual: shape of x; its dtype may be
    wider than x's (mixed precision keeps the residual stream in float32).
    Returns y, or (y, x + residual) when a residual is given, both in the dtype of the sum;
    differentiable once.
    Raises ValueError for other shapes or dtypes and for eps that is not positive.
    """
    if not x.is_floating_point():
        raise ValueError(f"rms_norm: x must be floating, got {x.dtype}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must be ({x.shape[-1]},), got {tuple(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"rms_norm: residual must be {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    if not eps > 0:
        raise ValueError(f"rms_norm: eps must be positive, got {eps}")
    total = x if residual is None else x + residual
    normed = _RMSNorm.apply(total, weight, eps, plus_one)
    return normed if residual is None else (normed, total)
