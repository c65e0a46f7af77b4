"""The norm, with and without the residual addition, on a step's rows and on a prefill's, and its
gradients."""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Arguments, OpCase, Peers, assert_like, gradients, same_inputs
from bench.shapes import SHAPES, Shape, projected
from bench.timing import ON_GPU, Fill, empty
from kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_ref

EPS = 1e-6
CHECKED = 16  # rows

Part = Literal["hidden", "q", "k"]
Normed = Tensor | tuple[Tensor, Tensor]
# Of x, of the residual (None: there was none) and of the weight (None: not wanted).
Gradients = tuple[Tensor, Tensor | None, Tensor | None]


class _Norm:
    """The norm of `rows` hidden states, or of their queries or keys as slices of one projection;
    residual: the dtype of what is added first, if anything is."""

    def __init__(self, shape: Shape, rows: int, part: Part, residual: torch.dtype | None) -> None:
        self.shape, self.rows, self.part, self.residual = shape, rows, part, residual
        self.plus_one = shape.norm_plus_one and part == "hidden"
        heads = {"hidden": 1, "q": shape.num_heads, "k": shape.num_kv_heads}[part]
        self.width = shape.hidden_size if part == "hidden" else shape.head_dim
        self.size = rows * heads * self.width
        self.name = f"{shape.name} {rows} rows" + ("" if part == "hidden" else f" of {part}")
        if residual is not None:
            self.name += " + residual" if residual == shape.dtype else f" + {residual} residual"

    def x(self, tensor: Fill, dtype: torch.dtype) -> Tensor:
        """(rows, H) or (rows, heads, D)."""
        if self.part == "hidden":
            return tensor(self.rows, self.width, dtype=dtype)
        return projected(self.shape, self.rows, tensor)["qk".index(self.part)]

    def reference(self, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Normed:
        """With this norm's options."""
        return rms_norm_ref(x, weight, EPS, self.plus_one, residual)


def forward(
    shape: Shape, rows: int, residual: torch.dtype | None = None, part: Part = "hidden"
) -> OpCase:
    """The norm of `rows` hidden states, queries or keys."""
    norm = _Norm(shape, rows, part, residual)

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        weight = tensor(norm.width, dtype=shape.dtype)
        inputs = []
        for _ in range(count):
            x = norm.x(tensor, shape.dtype)
            inputs.append((x, weight, residual and tensor(*x.shape, dtype=residual)))
        return inputs

    def ours(x: Tensor, weight: Tensor, residual: Tensor | None) -> Normed:
        return rms_norm(x, weight, EPS, norm.plus_one, residual)

    def check(arguments: Arguments, out: Normed, factor: float) -> None:
        x, weight, added = arguments
        normed, total = (out, x) if isinstance(out, Tensor) else out
        if added is not None:
            inputs = [x[:CHECKED], added[:CHECKED]]
            assert_like("rms_norm: sum", torch.add, inputs, total[:CHECKED], factor)
        inputs = [total[:CHECKED], weight]
        assert_like("rms_norm", norm.reference, inputs, normed[:CHECKED], factor)

    def eager(x: Tensor, weight: Tensor, residual: Tensor | None) -> Normed:
        """As models spell it in torch."""
        total = x if residual is None else x + residual
        wide = total.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        normed = (normed * (weight.float() + norm.plus_one)).to(total.dtype)
        return normed if residual is None else (normed, total)

    def fused(x: Tensor, weight: Tensor, residual: Tensor | None) -> Normed:
        """Torch's own function."""
        total = x if residual is None else x + residual
        scale = (weight + 1 if norm.plus_one else weight).to(total.dtype)
        normed = F.rms_norm(total, weight.shape, scale, EPS)
        return normed if residual is None else (normed, total)

    moved = 2 * shape.dtype.itemsize
    if residual is not None:
        moved = shape.dtype.itemsize + 3 * residual.itemsize
    return OpCase(
        "rms_norm",
        norm.name,
        make_inputs,
        ours,
        check,
        norm.size * moved + norm.width * shape.dtype.itemsize,
        (4 if residual is None else 5) * norm.size,
        same_inputs(eager=eager, torch=fused),
    )


def backward(
    shape: Shape,
    rows: int,
    residual: torch.dtype | None = None,
    part: Part = "hidden",
    weight_grad: bool = True,
) -> OpCase:
    """The gradients of the norm of `rows` hidden states, queries or keys; of its weight too, or
    not."""
    norm, dtype = _Norm(shape, rows, part, residual), residual or shape.dtype

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        weight = tensor(norm.width, dtype=shape.dtype)
        inputs = []
        for _ in range(count):
            total = norm.x(tensor, dtype)
            rstd = tensor(*total.shape[:-1], 1)
            if tensor is not empty:
                rstd = torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + EPS)
            grad, grad_total = (tensor(*total.shape, dtype=dtype) for _ in range(2))
            inputs.append((grad, grad_total if residual else None, total, weight, rstd))
        return inputs

    def ours(
        grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor
    ) -> Gradients:
        return rms_norm_backward(
            grad, grad_total, total, weight, rstd, norm.plus_one, shape.dtype, residual, weight_grad
        )

    def check(arguments: Arguments, outs: Gradients, factor: float) -> None:
        grad, grad_total, total, weight, _ = arguments

        def reference(total: Tensor, weight: Tensor, *grads: Tensor) -> list[Tensor]:
            added = torch.zeros_like(total) if residual else None
            d_total, d_weight = gradients(
                lambda x, weight: norm.reference(x, weight, added), [total, weight], grads
            )
            kept = [d_total, d_total if residual else None, d_weight if weight_grad else None]
            return [x for x in kept if x is not None]

        inputs = [total, weight, grad, *([grad_total] if residual else [])]
        found = [x for x in outs if x is not None]
        assert_like("rms_norm backward", reference, inputs, found, factor)

    def gradients_of(d_total: Tensor, d_weight: Tensor, grad_total: Tensor | None) -> Gradients:
        if grad_total is not None:
            d_total = d_total + grad_total
        return (
            d_total.to(shape.dtype),
            d_total if residual else None,
            d_weight if weight_grad else None,
        )

    def eager(
        grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor
    ) -> Gradients:
        """The formula in torch."""
        wide = grad.float()
        normed = total.float() * rstd
        d_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        wide = wide * (weight.float() + norm.plus_one)
        d_total = (wide - normed * (wide * normed).mean(-1, keepdim=True)) * rstd
        return gradients_of(d_total.to(total.dtype), d_weight, grad_total)

    def fused(
        grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor
    ) -> Gradients:
        """The backward of torch's own function."""
        scale = weight + 1 if norm.plus_one else weight
        d_total, d_weight = torch.ops.aten._fused_rms_norm_backward(
            grad, total, weight.shape, rstd, scale, [True, True]
        )
        return gradients_of(d_total, d_weight, grad_total)

    def peers(inputs: list[Arguments]) -> Peers:
        if ON_GPU:
            return same_inputs(eager=eager, torch=fused)(inputs)
        return {**same_inputs(eager=eager)(inputs), "torch": "has no fused backward on CPU"}

    operands = 2 if residual is None else 3
    return OpCase(
        "rms_norm backward",
        norm.name + ("" if weight_grad else ", not of the weight"),
        make_inputs,
        ours,
        check,
        ((operands + 1) * norm.size + 2 * norm.width) * dtype.itemsize
        + 4 * norm.size // norm.width,
        (9 + operands) * norm.size,
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


_SHAPES = [
    SHAPES[name] for name in (("qwen3-8b", "gemma2-27b") if ON_GPU else ("pocket", "qwen3-107m"))
]
_ROWS = (64, 2048) if ON_GPU else (32, 512)
CASES = [
    forward(shape, rows, residual)
    for shape in _SHAPES
    for rows in _ROWS
    for residual in (None, shape.dtype)
]
CASES += [
    backward(shape, _ROWS[-1], residual) for shape in _SHAPES for residual in (None, shape.dtype)
]
