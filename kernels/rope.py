"""Rotary position embedding: each pair of channels turns by an angle proportional to the position.

    angle = position * inv_freq[i]
    (a, b) -> (a cos - b sin, b cos + a sin)

T tokens, H heads, D channels per head (even). Half-split pairs channel i with i + D/2 (Llama, Qwen,
Gemma); interleaved pairs 2i with 2i + 1 (DeepSeek). Angles, sines and cosines are float32: at
position 100,000 a bfloat16 angle would be off by hundreds of radians. The rotation is computed in
float32 (float64 for float64 input) and rounded once. A Triton program turns several heads, each of
them whole. Gradients turn by the opposite angle, in the same kernel.

It does not know where `inv_freq` comes from: scaling belongs to the model's configuration.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import cpp
from kernels.cpp import runs_cpp
from kernels.launch import (
    Target,
    check_triton,
    launch,
    power_of_two,
    runs_triton,
    target_of,
    without_gaps,
)


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


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Specification of `rope`, in plain torch for any device and floating dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = cos[:, None].to(wide.dtype), sin[:, None].to(wide.dtype)
    if interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
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
    INTERLEAVED: tl.constexpr,
    OPPOSITE: tl.constexpr,  # turn back
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, PAIRS)
    there = (row < num_rows)[:, None] & (pair < HALF)[None, :]  # (ROWS, PAIRS)
    t, h = row // heads, row % heads
    cos = tl.load(cos_ptr + (t * cos_t)[:, None] + pair[None, :], mask=there, other=0.0)
    sin = tl.load(sin_ptr + (t * sin_t)[:, None] + pair[None, :], mask=there, other=0.0)
    if OPPOSITE:
        sin = -sin
    x_row = x_ptr + (t * x_t + h * x_h)[:, None]
    y_row = y_ptr + row[:, None] * (2 * HALF)
    if INTERLEAVED:
        # Whole rows, so that neighbouring threads read and write neighbouring addresses.
        channel = tl.arange(0, 2 * PAIRS)
        whole = (row < num_rows)[:, None] & (channel < 2 * HALF)[None, :]  # (ROWS, 2 * PAIRS)
        x = tl.load(x_row + channel[None, :], mask=whole, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (ROWS, PAIRS, 2)))
        y = tl.join(a * cos - b * sin, b * cos + a * sin)
        y = tl.reshape(y, (ROWS, 2 * PAIRS)).to(y_ptr.dtype.element_ty)
        tl.store(y_row + channel[None, :], y, mask=whole)
    else:
        a = tl.load(x_row + pair[None, :], mask=there, other=0.0).to(tl.float32)
        b = tl.load(x_row + HALF + pair[None, :], mask=there, other=0.0).to(tl.float32)
        first, second = a * cos - b * sin, b * cos + a * sin
        tl.store(y_row + pair[None, :], first.to(y_ptr.dtype.element_ty), mask=there)
        tl.store(y_row + HALF + pair[None, :], second.to(y_ptr.dtype.element_ty), mask=there)


def _launch(half: int, target: Target) -> dict[str, int]:
    """Rows and pairs of a program, and its warps: 1,024 pairs or one head. Not yet tuned on a
    device; bench/bench_rope.py is the bench to tune with."""
    pairs = power_of_two(half, 8)
    return {"ROWS": max(1, 1024 // pairs), "PAIRS": pairs, "num_warps": 4}


def _run_triton(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, opposite: bool) -> Tensor:
    check_triton("rope", x, cos, sin)
    tokens, heads, dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    options = _launch(dim // 2, target_of(x))
    launch(
        _rope_kernel,
        (-(-tokens * heads // options["ROWS"]),),
        x, cos, sin, y, tokens * heads, heads,
        x.stride(0), x.stride(1), cos.stride(0), sin.stride(0),
        HALF=dim // 2, INTERLEAVED=interleaved, OPPOSITE=opposite, **options,
    )  # fmt: skip
    return y


def _rotate(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, opposite: bool = False
) -> Tensor:
    """In torch, the reference with each half of the result written in place."""
    if runs_triton(x):
        return _run_triton(x, cos, sin, interleaved, opposite)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = cos[:, None].to(wide.dtype), sin[:, None].to(wide.dtype)
    sin = -sin if opposite else sin
    out = torch.empty(wide.shape, dtype=wide.dtype, device=wide.device)
    for_a, for_b = _pairs(out, interleaved)
    a, b = _pairs(wide, interleaved)
    torch.mul(a, cos, out=for_a).sub_(b * sin)
    torch.mul(b, cos, out=for_b).add_(a * sin)
    return out.to(x.dtype)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and the second channel of every pair."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _run_cpp(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    tokens, heads, dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype)
    cpp.call("rope", x.dtype, x, *x.stride()[:2], cos, sin, y, tokens, heads, dim // 2)
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return rope_backward(grad, cos, sin, ctx.interleaved), None, None, None


def rope_backward(grad: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The gradient of x from that of the result: the transpose of a rotation is the rotation by
    the opposite angle.

    grad: (T, H, D) of any strides, floating. cos, sin, interleaved: what `rope` was given.
    Returns (T, H, D) in the dtype of grad.
    """
    return _rotate(without_gaps(grad), cos, sin, interleaved, opposite=True)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the channel pairs of every head of every token.

    x: (T, H, D) floating, D even. cos, sin: (T, D/2) float32, from `rope_cos_sin`.
    In Triton the last dimensions are contiguous; the others may be slices of something wider.
    Returns (T, H, D) in the dtype of x; differentiable once, in x. Raises ValueError for other
    shapes or dtypes.
    """
    if x.ndim != 3 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(f"rope: x must be (T, H, even D) floating, got {tuple(x.shape)} {x.dtype}")
    half = (x.shape[0], x.shape[2] // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != half or table.dtype != torch.float32:
            raise ValueError(
                f"rope: {name} must be {half} float32, got {tuple(table.shape)} {table.dtype}"
            )
    if not interleaved and runs_cpp(x) and cos.is_contiguous() and sin.is_contiguous():
        return _run_cpp(x, cos, sin)
    return _Rope.apply(x, cos, sin, interleaved)
