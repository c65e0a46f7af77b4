"""Rotary position embedding: each pair of channels turns by an angle proportional to the position.

    angle = position * inv_freq[i]
    (a, b) -> (a cos - b sin, b cos + a sin)

T tokens, H heads, D channels per head (even). Channel i is paired with i + D/2, as in Llama, Qwen
and Gemma. Angles, sines and cosines are float32: at position 100,000 a bfloat16 angle would be off
by hundreds of radians. The rotation is computed in float32 (float64 for float64 input) and rounded
once. A Triton program rotates several whole heads. The gradient is the rotation by the conjugate,
in the same kernel.

It does not know where `inv_freq` comes from: scaling belongs to the model's configuration.
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
from kernels.target import power_of_two


def rope_cos_sin(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of every position.

    positions: (T,) integer. inv_freq: (D/2,) float32, radians per position.
    Returns cos and sin, each (T, D/2) float32.
    """
    if positions.ndim != 1 or positions.is_floating_point():
        raise ValueError(
            f"rope: positions must be (T,) integer, got {tuple(positions.shape)} {positions.dtype}"
        )
    if positions.dtype == torch.int64 and runs_cpp(inv_freq) and inv_freq.is_contiguous():
        tokens, half = len(positions), len(inv_freq)
        cos, sin = torch.empty(tokens, half), torch.empty(tokens, half)
        cpp.call(
            "rope_cos_sin", torch.float32, positions.contiguous(), inv_freq, cos, sin, tokens, half
        )
        return cos, sin
    angles = positions[:, None].to(torch.float32) * inv_freq.to(torch.float32)
    return angles.cos(), angles.sin()


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Specification of `rope`, in plain torch for any device and floating dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = cos[:, None].to(wide.dtype), sin[:, None].to(wide.dtype)
    a, b = wide.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


@triton.jit
def _rope_kernel(
    x_ptr,  # (T, H, D), strides x_t, x_h, 1
    cos_ptr,  # (T, D/2), strides cos_t, 1
    sin_ptr,  # (T, D/2), strides sin_t, 1
    y_ptr,  # (T * H, D), contiguous
    num_rows,  # T * H
    heads,  # H
    x_t,
    x_h,
    cos_t,
    sin_t,
    HALF: tl.constexpr,  # D/2
    CONJUGATE: tl.constexpr,  # rotate back
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, PAIRS)
    mask = (row < num_rows)[:, None] & (pair < HALF)[None, :]  # (ROWS, PAIRS)
    t, h = (row // heads).to(tl.int64), row % heads  # divisions of 64 bits are slow
    row = row.to(tl.int64)
    cos = tl.load(cos_ptr + (t * cos_t)[:, None] + pair[None, :], mask=mask, other=0.0)
    sin = tl.load(sin_ptr + (t * sin_t)[:, None] + pair[None, :], mask=mask, other=0.0)
    if CONJUGATE:
        sin = -sin
    x_row = x_ptr + (t * x_t + h * x_h)[:, None]
    y_row = y_ptr + row[:, None] * (2 * HALF)
    a = tl.load(x_row + pair[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_row + HALF + pair[None, :], mask=mask, other=0.0).to(tl.float32)
    first, second = a * cos - b * sin, b * cos + a * sin
    tl.store(y_row + pair[None, :], first.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_row + HALF + pair[None, :], second.to(y_ptr.dtype.element_ty), mask=mask)


def _launch(half: int) -> dict[str, int]:
    """Rows and pairs of a program, and its warps: 1,024 pairs or one head."""
    pairs = power_of_two(half, 8)
    return {"ROWS": max(1, 1024 // pairs), "PAIRS": pairs, "num_warps": 4}


def _run_triton(x: Tensor, cos: Tensor, sin: Tensor, conjugate: bool) -> Tensor:
    check_triton("rope", x, cos, sin)
    tokens, heads, dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    options = _launch(dim // 2)
    launch(
        _rope_kernel,
        (triton.cdiv(tokens * heads, options["ROWS"]),),
        x, cos, sin, y, tokens * heads, heads,
        x.stride(0), x.stride(1), cos.stride(0), sin.stride(0),
        HALF=dim // 2, CONJUGATE=conjugate, **options,
    )  # fmt: skip
    return y


def _run_cpp(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    tokens, heads, dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype)
    cpp.call("rope", x.dtype, x, *x.stride()[:2], cos, sin, y, tokens, heads, dim // 2)
    return y


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs of every head of every token.

    x: (T, H, D) floating, D even. cos, sin: (T, D/2) float32, from `rope_cos_sin`.
    In Triton the last dimensions are contiguous; the others may be slices of something wider.
    Returns (T, H, D) in the dtype of x; differentiable once, in x. Raises ValueError for other
    shapes or dtypes.
    """
    if x.ndim != 3 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(f"rope: x must be (T, H, even D) floating, got {tuple(x.shape)} {x.dtype}")
    half = (x.shape[0], x.shape[2] // 2)
    check("rope: cos", cos, half, torch.float32)
    check("rope: sin", sin, half, torch.float32)
    if runs_cpp(x) and cos.is_contiguous() and sin.is_contiguous():
        return _run_cpp(x, cos, sin)
    return _Rope.apply(x, cos, sin)


def rope_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of x from that of the result: the transpose of a rotation is its conjugate.

    grad: (T, H, D) of any strides, floating. cos, sin: as for `rope`.
    Returns (T, H, D) in the dtype of grad.
    """
    grad = without_gaps(grad)
    return _run_triton(grad, cos, sin, True) if runs_triton(grad) else rope_ref(grad, cos, -sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _run_triton(x, cos, sin, False) if runs_triton(x) else rope_ref(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return rope_backward(grad, *ctx.saved_tensors), None, None
