"""The norm, with and without the residual addition, on a step's rows and on a prefill's, and its
gradients."""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Arguments, OpCase, Peers, each, gradients, like, same_inputs
from bench.shapes import SHAPES, Shape, projected
from bench.timing import ON_GPU, Fill, empty
from kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_ref

EPS = 1e-6

Part = Literal["hidden", "q", "k"]  # of a layer: hidden states, or slices of their projection
Normed = Tensor | tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor | None, Tensor | None]  # of x, of the residual and of the weight


def _x(shape: Shape, rows: int, part: Part, tensor: Fill, dtype: torch.dtype) -> Tensor:
    if part == "hidden":
        return tensor(rows, shape.hidden_size, dtype=dtype)
    return projected(shape, rows, tensor)["qk".index(part)]


def _size(shape: Shape, rows: int, part: Part) -> int:
    heads = shape.num_heads if part == "q" else shape.num_kv_heads
    return rows * (shape.hidden_size if part == "hidden" else heads * shape.head_dim)


def _name(shape: Shape, rows: int, part: Part, residual: torch.dtype | None) -> str:
    name = f"{shape.name} {rows} rows" + ("" if part == "hidden" else f" of {part}")
    if residual is None:
        return name
    return f"{name} + residual" + ("" if residual == shape.dtype else f" in {residual}")


def _eager(
    x: Tensor, weight: Tensor, eps: float, plus_one: bool, residual: Tensor | None
) -> Normed:
    """As models spell it in torch."""
    total = x if residual is None else x + residual
    wide = total.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = (normed * (weight.float() + plus_one)).to(total.dtype)
    return normed if residual is None else (normed, total)


def _fused(
    x: Tensor, weight: Tensor, eps: float, plus_one: bool, residual: Tensor | None
) -> Normed:
    """Torch's own function."""
    total = x if residual is None else x + residual
    normed = F.rms_norm(total, weight.shape, weight + 1 if plus_one else weight, eps)
    return normed if residual is None else (normed, total)


def forward(
    shape: Shape, rows: int, residual: torch.dtype | None = None, part: Part = "hidden"
) -> OpCase:
    """The norm of `rows` hidden states, queries or keys; residual: the dtype of what is added
    first, if anything is."""
    size, dtype = _size(shape, rows, part), shape.dtype

    def make(tensor: Fill) -> Arguments:
        x = _x(shape, rows, part, tensor, dtype)
        added = None if residual is None else tensor(*x.shape, dtype=residual)
        plus_one = shape.norm_plus_one and part == "hidden"
        return x, tensor(x.shape[-1], dtype=dtype), EPS, plus_one, added

    moved = 2 * dtype.itemsize if residual is None else dtype.itemsize + 3 * residual.itemsize
    return OpCase(
        "rms_norm",
        _name(shape, rows, part, residual),
        each(make),
        rms_norm,
        like("rms_norm", rms_norm_ref),
        size * moved + size // rows * dtype.itemsize,
        (4 if residual is None else 5) * size,
        same_inputs(eager=_eager, torch=_fused),
    )


# Arguments of the gradients are those of `rms_norm_backward`.


def _reference_backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor,
    plus_one: bool, dtype: torch.dtype, residual: torch.dtype | None, weight_grad: bool,
) -> Gradients:  # fmt: skip
    added = None if grad_total is None else torch.zeros_like(total)
    d_total, d_weight = gradients(
        lambda x, weight: rms_norm_ref(x, weight, EPS, plus_one, added),
        [total, weight],
        [grad] if grad_total is None else [grad, grad_total],
    )
    return d_total, None if residual is None else d_total, d_weight if weight_grad else None


def _eager_backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor,
    plus_one: bool, dtype: torch.dtype, residual: torch.dtype | None, weight_grad: bool,
) -> Gradients:  # fmt: skip
    """The formula in torch."""
    wide = grad.float()
    normed = total.float() * rstd
    d_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype) if weight_grad else None
    wide = wide * (weight.float() + plus_one)
    d_total = ((wide - normed * (wide * normed).mean(-1, keepdim=True)) * rstd).to(total.dtype)
    d_total = d_total if grad_total is None else d_total + grad_total
    return d_total.to(dtype), None if residual is None else d_total, d_weight


def _fused_backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor,
    plus_one: bool, dtype: torch.dtype, residual: torch.dtype | None, weight_grad: bool,
) -> Gradients:  # fmt: skip
    """The backward of torch's own function."""
    d_total, d_weight = torch.ops.aten._fused_rms_norm_backward(
        grad, total, weight.shape, rstd, weight + 1 if plus_one else weight, [True, weight_grad]
    )
    d_total = d_total if grad_total is None else d_total + grad_total
    return d_total.to(dtype), None if residual is None else d_total, d_weight


def backward(
    shape: Shape,
    rows: int,
    residual: torch.dtype | None = None,
    part: Part = "hidden",
    weight_grad: bool = True,
) -> OpCase:
    """The gradients of the norm of `rows` hidden states, queries or keys; of its weight too, or
    not."""
    size, dtype = _size(shape, rows, part), residual or shape.dtype

    def make(tensor: Fill) -> Arguments:
        total, plus_one = _x(shape, rows, part, tensor, dtype), shape.norm_plus_one
        rstd = tensor(*total.shape[:-1], 1)
        if tensor is not empty:
            rstd = torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + EPS)
        grad, grad_total = (tensor(*total.shape, dtype=dtype) for _ in range(2))
        return (
            grad, None if residual is None else grad_total, total,
            tensor(total.shape[-1], dtype=shape.dtype), rstd, plus_one and part == "hidden",
            shape.dtype, residual, weight_grad,
        )  # fmt: skip

    def peers(inputs: list[Arguments]) -> Peers:
        if ON_GPU:
            return same_inputs(eager=_eager_backward, torch=_fused_backward)(inputs)
        eager = same_inputs(eager=_eager_backward)(inputs)
        return {**eager, "torch": "has no fused backward on CPU"}

    operands = 2 if residual is None else 3
    return OpCase(
        "rms_norm backward",
        _name(shape, rows, part, residual) + ("" if weight_grad else ", not of the weight"),
        each(make),
        rms_norm_backward,
        like("rms_norm backward", _reference_backward),
        ((operands + 1) * size + 2 * size // rows) * dtype.itemsize + 4 * rows,
        (9 + operands) * size,
        peers,
    )


def variants(shape: Shape, rows: int) -> Iterator[OpCase]:
    """Of hidden states, with residuals of their dtype or in float32, and of heads; gradients with
    and without those of the weight."""
    parts: list[Part] = ["hidden", "q", "k"] if shape.qk_norm else ["hidden"]
    for part in parts:
        residuals = (None, shape.dtype, torch.float32) if part == "hidden" else (None,)
        for residual in dict.fromkeys(residuals):
            yield forward(shape, rows, residual, part)
            for weight_grad in (False, True):
                yield backward(shape, rows, residual, part, weight_grad)


_NAMES = ("qwen3-8b", "gemma2-27b") if ON_GPU else ("pocket", "qwen3-107m")
CASES = [
    case(SHAPES[name], rows, residual)
    for name in _NAMES
    for case, rows in (
        [(forward, 64), (forward, 2048), (backward, 2048)]
        if ON_GPU
        else [(forward, 32), (forward, 512), (backward, 512)]
    )
    for residual in (None, SHAPES[name].dtype)
]
