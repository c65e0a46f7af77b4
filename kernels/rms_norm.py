"""Root-mean-square norm over the last dimension, with an optional residual addition before it.

    s = x + residual                                  (rounded to the dtype of the sum)
    y = n w,    n = s / sqrt(mean(s^2) + eps)         (or n (1 + w): Gemma)

    ds = (g - n mean(g n)) / sqrt(mean(s^2) + eps),    g = dy w (or dy (1 + w))
    dw = sum over rows of dy n

T tokens (or tokens x heads), H the normalised size. Everything after the sum is computed in
float32 (float64 for float64 input) and rounded once at the end.

A Triton program has whole rows: several short ones (heads) or one long one at a time. In the
backward each of P programs takes every P-th block of rows and stores its part of dw in its row of a
float32 buffer, which a second kernel sums. Without atomics dw has the same bits in every run; its
order of summation depends on the number of rows and on P, and so on the device.

It does not subtract a mean and has no bias.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import cpp
from kernels.checks import check, check_triton, without_gaps
from kernels.cpp import runs_cpp
from kernels.launch import launch, runs_triton
from kernels.target import Target, power_of_two, target_of

# Tile and warps of the sum of partial gradients of the weight.
_SUM_LAUNCH = {"ROWS": 64, "COLUMNS": 32, "num_warps": 4}


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
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row < num_rows)[:, None] & (column < H)[None, :]  # (ROWS, COLUMNS)
    t, a = (row // inner).to(tl.int64), row % inner  # divisions of 64 bits are slow
    row = row.to(tl.int64)
    offset = (t * x_t + a * x_a)[:, None] + column[None, :]
    out = row[:, None] * H + column[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        offset = (t * r_t + a * r_a)[:, None] + column[None, :]
        x += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        total = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out, total, mask=mask)
        x = total.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / H + eps)  # (ROWS,)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    if PLUS_ONE:
        weight += 1
    y = x * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_backward_kernel(
    grad_ptr,  # (T, A, H), strides grad_t, grad_a, 1
    grad_total_ptr,  # (T, A, H), strides grad_total_t, grad_total_a, 1, or None
    total_ptr,  # (T, A, H), strides total_t, total_a, 1
    weight_ptr,  # (H,)
    rstd_ptr,  # (T * A,)
    d_x_ptr,  # (T * A, H), contiguous
    d_residual_ptr,  # (T * A, H), contiguous, or None: as d_x
    partial_ptr,  # (P, H) float32, contiguous, or None: without d_weight
    num_rows,
    inner,  # A
    grad_t,
    grad_a,
    grad_total_t,
    grad_total_a,
    total_t,
    total_a,
    H: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    if PLUS_ONE:
        weight += 1
    d_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(program * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & (column < H)[None, :]  # (ROWS, COLUMNS)
        t, a = row // inner, row % inner
        offset = (t * grad_t + a * grad_a)[:, None] + column[None, :]
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        offset = (t * total_t + a * total_a)[:, None] + column[None, :]
        total = tl.load(total_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)  # (ROWS,)
        normed = total * rstd[:, None]
        d_weight += grad * normed
        grad *= weight[None, :]
        projection = tl.sum(grad * normed, 1) / H  # (ROWS,)
        d_total = (grad - normed * projection[:, None]) * rstd[:, None]
        if grad_total_ptr is not None:
            offset = (t * grad_total_t + a * grad_total_a)[:, None] + column[None, :]
            d_total += tl.load(grad_total_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        out = row[:, None] * H + column[None, :]
        tl.store(d_x_ptr + out, d_total.to(d_x_ptr.dtype.element_ty), mask=mask)
        if d_residual_ptr is not None:
            d_residual = d_total.to(d_residual_ptr.dtype.element_ty)
            tl.store(d_residual_ptr + out, d_residual, mask=mask)
    if partial_ptr is not None:
        tl.store(partial_ptr + program * H + column, tl.sum(d_weight, 0), mask=column < H)


@triton.jit
def _sum_partials_kernel(
    partial_ptr,  # (P, H) float32, contiguous
    out_ptr,  # (H,)
    num_partials,  # P
    size,  # H
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, num_partials, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < num_partials)[:, None] & (column < size)[None, :]  # (ROWS, COLUMNS)
        offset = row.to(tl.int64)[:, None] * size + column[None, :]
        total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
    out = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + column, out, mask=column < size)


def _launch(size: int) -> dict[str, int]:
    """Rows and columns of a program, and its warps: 2,048 elements or one row."""
    columns = power_of_two(size, 16)
    return {
        "ROWS": max(1, 2048 // columns),
        "COLUMNS": columns,
        "num_warps": 4 if columns <= 2048 else 8 if columns <= 4096 else 16,
    }


def _launch_backward(num_rows: int, size: int, target: Target) -> tuple[int, dict[str, int]]:
    """The number of programs, 32 warps per multiprocessor; and a program's tile: the forward's, on
    twice the warps, since it has several tensors."""
    options = _launch(size)
    options["num_warps"] = min(2 * options["num_warps"], 16 if target.is_hip else 32)
    programs = target.num_processors * (32 // options["num_warps"])
    return min(triton.cdiv(num_rows, options["ROWS"]), programs), options


def _folded(shape: torch.Size) -> tuple[int, int, int]:
    """(T, A, H): all but the last two dimensions as one."""
    inner = shape[-2] if len(shape) > 2 else 1
    return shape.numel() // max(inner * shape[-1], 1), inner, shape[-1]


def _run_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, plus_one: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, the sum and the reciprocal root mean squares (float32) of x (+ residual)."""
    check_triton("rms_norm", x, weight, *([] if residual is None else [residual]))
    shape, folded = x.shape, _folded(x.shape)
    _, inner, size = folded
    x = x.view(folded)  # a view: what cannot be one is refused by torch
    added = x if residual is None else residual.view(folded)
    dtype = torch.promote_types(x.dtype, added.dtype)
    y = torch.empty(shape, dtype=dtype, device=x.device)
    total = x.view(shape) if residual is None else torch.empty_like(y)
    rstd = torch.empty(*shape[:-1], 1, dtype=torch.float32, device=x.device)
    options = _launch(size)
    launch(
        _rms_norm_kernel,
        (triton.cdiv(rstd.numel(), options["ROWS"]),),
        x, added, weight, y, total, rstd, rstd.numel(), inner,
        x.stride(0), x.stride(1), added.stride(0), added.stride(1), eps,
        H=size, PLUS_ONE=plus_one, RESIDUAL=residual is not None, **options,
    )  # fmt: skip
    return y, total, rstd


def _run_triton_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
    plus_one: bool,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    shape, folded = total.shape, _folded(total.shape)
    _, inner, size = folded
    grad = without_gaps(grad.reshape(folded))
    added = grad if grad_total is None else without_gaps(grad_total.reshape(folded))
    check_triton("rms_norm", grad, added, total, weight)
    total = total.view(folded)
    d_x = torch.empty(shape, dtype=dtype, device=total.device)
    d_residual = None if residual_dtype is None else d_x
    if residual_dtype is not None and residual_dtype != dtype:
        d_residual = torch.empty_like(d_x, dtype=residual_dtype)
    programs, options = _launch_backward(rstd.numel(), size, target_of(total))
    partial = None
    if weight_grad:
        partial = torch.empty(programs, size, dtype=torch.float32, device=total.device)
    launch(
        _rms_norm_backward_kernel,
        (programs,),
        grad, None if grad_total is None else added, total, weight, rstd,
        d_x, None if d_residual is d_x else d_residual, partial, rstd.numel(), inner,
        *grad.stride()[:2], *added.stride()[:2], *total.stride()[:2],
        H=size, PLUS_ONE=plus_one, **options,
    )  # fmt: skip
    if partial is None:
        return d_x, d_residual, None
    d_weight = torch.empty_like(weight)
    launch(
        _sum_partials_kernel,
        (triton.cdiv(size, _SUM_LAUNCH["COLUMNS"]),),
        partial, d_weight, programs, size, **_SUM_LAUNCH,
    )  # fmt: skip
    return d_x, d_residual, d_weight


def _run_cpp(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, plus_one: bool
) -> Tensor | tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    size = x.shape[-1]
    if x.ndim not in (2, 3):
        x = x.reshape(-1, size)
    residual = None if residual is None else residual.contiguous()
    cpp.call(
        "rms_norm", x.dtype, x, x.stride(0), x.stride(-2), residual, weight, y, total,
        x.numel() // size, x.shape[1] if x.ndim == 3 else 1, size, eps, int(plus_one),
    )  # fmt: skip
    return y if total is None else (y, total)


def _run_torch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, plus_one: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps))
    y = (wide * rstd).mul_(_scale(weight, plus_one, wide.dtype)).to(total.dtype)
    return y, total, rstd


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
    check("rms_norm: x", x, x.shape, "floating")
    check("rms_norm: weight", weight, x.shape[-1:], "floating")
    if residual is not None:
        check("rms_norm: residual", residual, x.shape, "floating")
    if not eps > 0:
        raise ValueError(f"rms_norm: eps must be positive, got {eps}")
    if runs_cpp(x, weight, *([] if residual is None else [residual])):
        return _run_cpp(x, residual, weight, eps, plus_one)
    return _RMSNorm.apply(x, residual, weight, eps, plus_one)


class _RMSNorm(torch.autograd.Function):
    """Returns y and, if there is a residual, s."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, plus_one: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        if runs_triton(x):
            y, total, rstd = _run_triton(x, residual, weight, eps, plus_one)
        else:
            y, total, rstd = _run_torch(x, residual, weight, eps, plus_one)
        ctx.save_for_backward(total, weight, rstd)
        ctx.plus_one = plus_one
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        return y if residual is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, grad_total: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        total, weight, rstd = ctx.saved_tensors
        dtype, residual_dtype = ctx.dtypes
        d_x, d_residual, d_weight = rms_norm_backward(
            grad, grad_total, total, weight, rstd, ctx.plus_one, dtype, residual_dtype,
            ctx.needs_input_grad[2],
        )  # fmt: skip
        return d_x, d_residual, d_weight, None, None


def rms_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
    plus_one: bool,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None = None,
    weight_grad: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, residual and weight from those of y and, with a residual, of s.

    grad, grad_total: (..., H) of any strides. total: s. rstd: (..., 1), 1 / sqrt(mean(s^2) + eps)
    in the dtype of accumulation. dtype, residual_dtype: those of x and residual (None: no
    residual), and of their gradients. Without `weight_grad` that of weight is None.
    """
    if runs_triton(total):
        return _run_triton_backward(
            grad, grad_total, total, weight, rstd, plus_one, dtype, residual_dtype, weight_grad
        )
    grad = grad.to(rstd.dtype)
    normed = total * rstd
    d_weight = None
    if weight_grad:
        d_weight = (grad * normed).reshape(-1, total.shape[-1]).sum(0).to(weight.dtype)
    grad = grad * _scale(weight, plus_one, rstd.dtype)
    projection = (grad * normed).mean(-1, keepdim=True)
    d_total = grad.sub_(normed.mul_(projection)).mul_(rstd).to(total.dtype)
    if grad_total is not None:
        d_total = d_total + grad_total
    d_residual = None if residual_dtype is None else d_total.to(residual_dtype)
    return d_total.to(dtype), d_residual, d_weight


def _scale(weight: Tensor, plus_one: bool, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) + 1 if plus_one else weight.to(dtype)
