"""Checks of an operation's arguments: a ValueError says what was wanted and what was passed."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def check(
    name: str,
    x: Tensor,
    shape: Sequence[int | str],
    dtype: torch.dtype | Literal["floating"] | None = None,
) -> None:
    """Raise ValueError unless `x` has this shape and dtype.

    name: of the operation and the tensor, as "rope: cos". shape: a letter stands for any size.
    dtype: None for any.
    """
    fits = x.ndim == len(shape) and all(
        isinstance(wanted, str) or wanted == size
        for wanted, size in zip(shape, x.shape, strict=True)
    )
    if dtype is not None:
        fits &= x.is_floating_point() if dtype == "floating" else x.dtype == dtype
    if not fits:
        sizes = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        wanted_dtype = "" if dtype is None else f" {dtype}"
        raise ValueError(f"{name} must be ({sizes}){wanted_dtype}, got {tuple(x.shape)} {x.dtype}")


def check_triton(name: str, *tensors: Tensor) -> None:
    """Raise ValueError for what no Triton kernel takes: float64, or a last dimension that is not
    contiguous."""
    for x in tensors:
        if x.dtype == torch.float64:
            raise ValueError(f"{name}: float64 runs on CPU only, in torch")
        if _has_gaps(x):
            raise ValueError(
                f"{name}: the last dimension must be contiguous, got shape {tuple(x.shape)} with "
                f"strides {x.stride()}"
            )


def without_gaps(grad: Tensor) -> Tensor:
    """A gradient, copied if its last dimension is not contiguous: autograd may pass any strides,
    and the gradient of a sum is an expanded tensor."""
    return grad.contiguous() if _has_gaps(grad) else grad


def _has_gaps(x: Tensor) -> bool:
    return x.numel() > 0 and x.shape[-1] > 1 and x.stride(-1) != 1
