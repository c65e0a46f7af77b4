"""Rotary position embedding: each pair of channels turns by an angle proportional to the position.

    angle = position * inv_freq[i]
    (a, b) -> (a cos - b sin, b cos + a sin)

T tokens, H heads, D channels per head (even). Half-split pairs channel i with i + D/2 (Llama, Qwen,
Gemma); interleaved pairs 2i with 2i + 1 (DeepSeek). Angles, sines and cosines are float32: at
position 100,000 a bfloat16 angle would be off by hundreds of radians. The rotation is computed in
float32 (float64 for float64 input) and rounded once.

It does not know where `inv_freq` comes from: scaling belongs to the model's configuration.
"""

from typing import Any

import torch
from torch import Tensor


def rope_cos_sin(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of every position.

    positions: (T,) integer. inv_freq: (D/2,) float32, radians per position.
    Returns cos and sin, each (T, D/2) float32.
    """
    if positions.ndim != 1 or positions.is_floating_point():
        raise ValueError(
            f"rope: positions must be (T,) integer, got {tuple(positions.shape)} {positions.dtype}"
        )
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


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The reference with each half of the result written in place."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = cos[:, None].to(wide.dtype), sin[:, None].to(wide.dtype)
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


class _Rope(torch.autograd.Function):
    """A rotation, whose transpose is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin, ctx.interleaved), None, None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the channel pairs of every head of every token.

    x: (T, H, D) floating, D even. cos, sin: (T, D/2) float32, from `rope_cos_sin`.
    Returns (T, H, D) in the dtype of x, differentiable in x. Raises ValueError for other shapes or
    dtypes.
    """
    if x.ndim != 3 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(f"rope: x must be (T, H, even D) floating, got {tuple(x.shape)} {x.dtype}")
    half = (x.shape[0], x.shape[2] // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != half or table.dtype != torch.float32:
            raise ValueError(
                f"rope: {name} must be {half} float32, got {tuple(table.shape)} {table.dtype}"
            )
    return _Rope.apply(x, cos, sin, interleaved)
