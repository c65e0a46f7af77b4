"""Root-mean-square norm over the last dimension, with an optional residual addition before it.

    s = x + residual                                  (rounded to the dtype of the sum)
    y = s / sqrt(mean(s^2) + eps) * w                 (or * (1 + w): Gemma)

T tokens (or tokens x heads), H the normalised size. Everything after the sum is computed in
float32 (float64 for float64 input) and rounded once at the end.

Row results do not depend on the other rows: the mean runs within a row, and squares, `rsqrt` and
products round alike in the vector body and the scalar tail of ATen's loops. The Triton kernel holds
whole rows: several short ones (heads) or one long one a program.

It does not subtract a mean and has no bias. The backward is plain torch on every device.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import native
from kernels.launch import Target, check_triton, launch, power_of_two, runs_triton, target_of
from kernels.native import runs_native


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


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # (T, A, H), strides x_t, x_a, 1
    residual_ptr,  # (T, A, H), strides r_t, r_a, 1
    weight_ptr,  # (H,)
    y_ptr,  # (T * A, H), contiguous
    sum_ptr,  # (T * A, H), contiguous
    rstd_ptr,  # (T * A,)
    num_rows,
    inner,  # A
    x_t,
    x_a,
    r_t,
    r_a,
    eps,
    H: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    there = (row < num_rows)[:, None] & (column < H)[None, :]  # (ROWS, COLUMNS)
    t, a = row // inner, row % inner
    at = (t * x_t + a * x_a)[:, None] + column[None, :]
    out = row[:, None] * H + column[None, :]
    x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
    if RESIDUAL:
        at = (t * r_t + a * r_a)[:, None] + column[None, :]
        x += tl.load(residual_ptr + at, mask=there, other=0.0).to(tl.float32)
        total = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out, total, mask=there)
        x = total.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / H + eps)  # (ROWS,)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    if PLUS_ONE:
        weight += 1
    y = x * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=there)


def _launch(size: int, target: Target) -> dict[str, int]:
    """Rows and columns of a program, and its warps: 2,048 elements or one row. Not yet tuned on a
    device; bench/bench_rms_norm.py is the bench to tune with."""
    columns = power_of_two(size, 16)
    return {
        "ROWS": max(1, 2048 // columns),
        "COLUMNS": columns,
        "num_warps": 4 if columns <= 2048 else 8 if columns <= 4096 else 16,
    }


def _run_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, plus_one: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, the sum and the reciprocal root mean squares (float32) of x (+ residual)."""
    check_triton("rms_norm", x, weight, *([] if residual is None else [residual]))
    shape, size = x.shape, x.shape[-1]
    inner = shape[-2] if x.ndim > 2 else 1
    outer = x.numel() // max(inner * size, 1)
    x = x.view(outer, inner, size)  # a view: what cannot be one is refused by torch
    added = x if residual is None else residual.view(outer, inner, size)
    dtype = torch.promote_types(x.dtype, added.dtype)
    y = torch.empty(shape, dtype=dtype, device=x.device)
    total = x.view(shape) if residual is None else torch.empty_like(y)
    rstd = torch.empty(*shape[:-1], 1, dtype=torch.float32, device=x.device)
    options = _launch(size, target_of(x))
    launch(
        _rms_norm_kernel,
        (-(-rstd.numel() // options["ROWS"]),),
        x, added, weight, y, total, rstd, rstd.numel(), inner,
        x.stride(0), x.stride(1), added.stride(0), added.stride(1), eps,
        H=size, PLUS_ONE=plus_one, RESIDUAL=residual is not None, **options,
    )  # fmt: skip
    return y, total, rstd


def _run_native(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, plus_one: bool
) -> Tensor | tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    size = x.shape[-1]
    if x.ndim not in (2, 3):
        x = x.reshape(-1, size)
    residual = None if residual is None else residual.contiguous()
    native.call(
        "rms_norm", x.dtype, x, x.stride(0), x.stride(-2), residual, weight, y, total,
        x.numel() // size, x.shape[1] if x.ndim == 3 else 1, size, eps, int(plus_one),
    )  # fmt: skip
    return y if total is None else (y, total)


class _RMSNorm(torch.autograd.Function):
    """With s = x (+ residual) and n = s / rms: ds = (dy w - n mean(dy w n)) / rms, dw = sum over
    rows of dy n. Gives y, and s where there is a residual."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, plus_one: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        if runs_triton(x):
            y, total, rstd = _run_triton(x, residual, weight, eps, plus_one)
        else:
            total = x if residual is None else x + residual
            wide = total.to(torch.promote_types(total.dtype, torch.float32))
            rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps))
            y = (wide * rstd).mul_(_scale(weight, plus_one, wide.dtype)).to(total.dtype)
        ctx.save_for_backward(total, weight, rstd)
        ctx.plus_one = plus_one
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        return y if residual is None else (y, total)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor, grad_total: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
        total, weight, rstd = ctx.saved_tensors
        grad = grad.to(rstd.dtype)
        normed = total * rstd
        d_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * _scale(weight, ctx.plus_one, rstd.dtype)
        along = (grad * normed).mean(-1, keepdim=True)
        d_total = grad.sub_(normed.mul_(along)).mul_(rstd).to(total.dtype)
        if grad_total is not None:
            d_total = d_total + grad_total
        dtype, residual_dtype = ctx.dtypes
        d_residual = None if residual_dtype is None else d_total.to(residual_dtype)
        return d_total.to(dtype), d_residual, d_weight, None, None


def _scale(weight: Tensor, plus_one: bool, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) + 1 if plus_one else weight.to(dtype)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, plus_one: bool = False, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise `x`, or `x + residual`, to unit root mean square and scale it.

    x: (..., H), floating. weight: (H,), any floating dtype. residual: shape of x; its dtype may be
    wider than x's (mixed precision keeps the residual stream in float32). In Triton at most the
    last two dimensions may be a slice of something wider, and the last is contiguous.
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
    if runs_native(x, weight, *([] if residual is None else [residual])):
        return _run_native(x, residual, weight, eps, plus_one)
    return _RMSNorm.apply(x, residual, weight, eps, plus_one)
