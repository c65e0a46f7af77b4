"""A linear layer over weights that are packed for C++: y = x W^T + b.

T tokens, K terms of a sum, N columns. A sum adds its terms in index order with fused multiply-adds
in float32, so a row's bits do not depend on the others. bfloat16 weights stay bfloat16 in memory
and are widened in registers; the sum is rounded once.

A packed copy is kept beside each weight for as long as the weight lives, and made anew when the
weight has changed. It doubles the memory of the weights; `pack` makes one that is not kept. The
C++ is in `kernels/cpp/linear.h`; the specification is `matmul_ref`. Inference only.
"""

import threading
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
_packing = threading.Lock()


def packs(x: Tensor, weight: Tensor) -> bool:
    """Whether `packed_linear` can run this product: one dtype, on a CPU, in C++, no gradient."""
    # An inference tensor has no version: whether it has changed could not be told.
    usable = x.is_contiguous() and not weight.is_inference()
    return usable and not torch.is_autocast_enabled("cpu") and runs_cpp(x, weight)


def packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, keep: bool = True
) -> Tensor:
    """x: (T, K), weight: (N, K), bias: (N,) or None, of one dtype, where `packs` says so. Returns
    (T, N) of that dtype. keep: the packed copy stays beside the weight. Raises ValueError for other
    shapes.
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
    panels = packed(weight) if keep else pack(weight)
    cpp.call("linear", x.dtype, x, rows, terms, panels, columns, bias, y)
    return y


def packed(weight: Tensor, paired: bool = False) -> Tensor:
    """A weight (N, K), or several in one (E, N, K), float32 or bfloat16, packed for C++, one after
    another, and from now on kept beside it. paired: a weight holds two matrices, gate and up, and a
    panel has columns of both."""
    version = (weight.data_ptr(), weight._version, paired)
    with _packing:
        kept: _Packed | None = _packed.get(weight)
        if kept is None or kept.version != version:
            kept = _packed[weight] = _Packed(pack(weight, paired), version)
        return kept.panels


def pack(weight: Tensor, paired: bool = False) -> Tensor:
    """`packed`, for one use: nothing is kept. weight: contiguous."""
    columns, terms = weight.shape[-2:]
    width = cpp.panel_columns()
    across = columns // 2 if paired else columns
    panels = -(-across // (width // 2 if paired else width))
    matrices = weight.detach().reshape(-1, columns, terms)
    laid = torch.empty(len(matrices), panels * width * terms, dtype=weight.dtype)
    for matrix, to in zip(matrices, laid, strict=True):
        cpp.call("pack", weight.dtype, matrix, columns, terms, int(paired), to)
    return laid
