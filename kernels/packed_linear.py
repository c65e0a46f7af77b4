"""A linear layer over bfloat16 weights that were laid out for the CPU: y = x W^T + b.

T tokens, K terms of a sum, N columns. Weights stay bfloat16 in memory, which is what a decode step
has to read; they are widened in registers, products are accumulated in float32 in blocks of 256
terms, and the sum is rounded once. torch's bfloat16 product emulates what a processor lacks: on
AVX-512 without bfloat16 instructions it is four times slower (bench/results/NOTES.md).

A packed copy is kept beside each weight for as long as the weight lives, and made anew when the
weight has changed. It doubles the memory of the weights. Rows do not depend on each other.

In float32 nothing is packed: MKL's product over plain weights is as fast at the batch sizes that
matter. The C++ is in `kernels/cpp/exports.cpp`. Inference only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kernels import cpp
from kernels.cpp import runs_cpp


@dataclass(frozen=True)
class _Packed:
    """Panels of columns, each term by term, and the state of the weight that they are of."""

    panels: Tensor
    version: tuple[int, int, bool]


_packed = WeakTensorKeyDictionary()


def packs(x: Tensor, weight: Tensor) -> bool:
    """Whether `packed_linear` is there for this product: bfloat16, on CPU, in C++, no gradient."""
    # An inference tensor has no version: whether it has changed could not be told.
    usable = x.dtype == torch.bfloat16 and x.is_contiguous() and not weight.is_inference()
    return usable and runs_cpp(x, weight)


def packed_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Specification of `packed_linear`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: (T, K), weight: (N, K), bias: (N,) or None, all bfloat16 where `packs` says so. Returns
    (T, N) bfloat16. Raises ValueError for other shapes.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"packed_linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (T, K) "
            "and (N, K)"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(
            f"packed_linear: bias must be ({weight.shape[0]},) {x.dtype}, got {tuple(bias.shape)} "
            f"{bias.dtype}"
        )
    rows, terms = x.shape
    columns = len(weight)
    y = torch.empty(rows, columns, dtype=x.dtype)
    cpp.call("linear", x.dtype, x, rows, terms, packed(weight), columns, bias, y)
    return y


def packed(weight: Tensor, paired: bool = False) -> Tensor:
    """A weight (N, K), float32 or bfloat16, laid out for C++ and from now on kept beside it.
    paired: it holds two matrices, gate and up, and a panel columns of both."""
    version = (weight.data_ptr(), weight._version, paired)
    kept: _Packed | None = _packed.get(weight)
    if kept is None or kept.version != version:
        columns, terms = weight.shape
        width = cpp.panel_columns()
        across = columns // 2 if paired else columns
        panels = -(-across // (width // 2 if paired else width))
        laid = torch.empty(panels * width * terms, dtype=weight.dtype)
        cpp.call("pack", weight.dtype, weight, columns, terms, int(paired), laid)
        kept = _packed[weight] = _Packed(laid, version)
    return kept.panels
