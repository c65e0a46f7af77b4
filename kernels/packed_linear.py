"""A linear layer over weights that are packed for C++: y = x W^T + b.

T tokens, K terms of a sum, N columns. A sum adds its terms in index order with fused multiply-adds
in float32, so a row's bits do not depend on the others. bfloat16 weights stay bfloat16 in memory
and are widened in registers; the sum is rounded once.

A packed copy is kept beside each weight for as long as the weight lives, and made anew when the
weight has changed. It doubles the memory of the weights; `pack` makes one that is not kept. The
C++ is in `kernels/cpp/linear.h`; the specification is `matmul_ref`. Inference only.

`allow_dot_products`: twice the speed on processors that multiply and add pairs of bfloat16 in one
instruction. A row still does not depend on the others, but its bits depend on the processor.
"""

import threading
from collections.abc import Iterable
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
_for_dots = WeakTensorKeyDictionary()  # the weights that `allow_dot_products` was given
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
    dots = uses_dot_products(weight)
    cpp.call("linear", x.dtype, x, rows, terms, panels, columns, bias, y, dots=dots)
    return y


def allow_dot_products(weights: Iterable[Tensor]) -> None:
    """Let products with these weights, (..., N, K) bfloat16, run on the processor's dot products,
    before one is packed. Raises ValueError where they cannot: another dtype or device, an odd K, a
    processor without such instructions."""
    weights = list(weights)
    for weight in weights:
        if weight.dtype != torch.bfloat16 or not weight.is_cpu:
            raise ValueError(
                f"fast numerics are for bfloat16 on a CPU, the weights are {weight.dtype} on "
                f"{weight.device.type}"
            )
        if weight.shape[-1] % 2:
            raise ValueError(f"fast numerics add terms in pairs, a sum has {weight.shape[-1]}")
    if not cpp.has_dot_products():
        raise ValueError("fast numerics need a processor with AVX512-BF16, this one has none")
    for weight in weights:
        _for_dots[weight] = True


def uses_dot_products(weight: Tensor) -> bool:
    """Whether `allow_dot_products` was given this weight."""
    return weight in _for_dots


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


def pack(weight: Tensor, paired: bool = False, dots: bool | None = None) -> Tensor:
    """`packed`, for one use: nothing is kept. weight: contiguous. dots: for dot products; by
    default as `uses_dot_products` says."""
    dots = uses_dot_products(weight) if dots is None else dots
    columns, terms = weight.shape[-2:]
    width = cpp.panel_columns()
    across = columns // 2 if paired else columns
    assert not (dots and terms % 2)
    panels = -(-across // (width // 2 if paired else width))
    matrices = weight.detach().reshape(-1, columns, terms)
    laid = torch.empty(len(matrices), panels * width * terms, dtype=weight.dtype)
    for matrix, to in zip(matrices, laid, strict=True):
        cpp.call("pack", weight.dtype, matrix, columns, terms, int(paired), to, dots=dots)
    return laid
