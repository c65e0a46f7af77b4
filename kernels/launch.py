"""Where Triton kernels run, what they run on, and the one door through which they are launched.

An operation runs its Triton kernel for tensors on a GPU, and for tensors on CPU under
TRITON_INTERPRET=1 (set before this package is imported); otherwise, on CPU, it runs torch. On a GPU
it never falls back. Tile sizes, warps and stages are plain functions of the shape and a `Target`,
so a compiler without a device can ask for the launch that another device would get.

`intercept` hands every launch to a callable instead of the device: ahead-of-time compilation
records launches that way, and tests count them. No kernel is defined here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)

# handler(kernel, grid, arguments, options): options are constexprs and num_warps, num_stages.
Handler = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]


@dataclass(frozen=True)
class Target:
    """What a choice of tiles may depend on: the architecture ("sm_90", "gfx942"), the shared
    memory that one program may use, in bytes, and how many processors run programs."""

    arch: str
    shared_bytes: int
    num_processors: int

    @property
    def is_hip(self) -> bool:
        """An AMD GPU."""
        return self.arch.startswith("gfx")


TARGETS = {
    target.arch: target
    for target in (
        Target("sm_80", 163 << 10, 108),
        Target("sm_90", 227 << 10, 132),
        Target("sm_100", 227 << 10, 148),
        Target("gfx942", 64 << 10, 304),
    )
}
# Few processors: under the interpreter every program costs milliseconds.
_INTERPRETER = Target("sm_90", 227 << 10, 4)

_handler: Handler | None = None
_target: Target | None = None


def runs_triton(x: Tensor) -> bool:
    """Whether operations on this tensor run their Triton kernel."""
    return x.is_cuda or INTERPRETED or _handler is not None


def target_of(x: Tensor) -> Target:
    """The target that tiles for this tensor are chosen for."""
    if _target is not None:
        return _target
    return _device_target(x.device.index or 0) if x.is_cuda else _INTERPRETER


@cache
def _device_target(index: int) -> Target:
    driver = triton.runtime.driver.active
    with torch.cuda.device(index):
        arch = driver.get_current_target().arch  # 90, or "gfx942"
    properties = driver.utils.get_device_properties(index)
    name = arch if isinstance(arch, str) else f"sm_{arch}"
    return Target(name, properties["max_shared_mem"], properties["multiprocessor_count"])


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on `device`; one on CPU gets to a GPU without waiting for what runs there."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda" and x.numel():
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run `kernel` over `grid` on the device of its first tensor; an empty grid runs nothing."""
    if 0 in grid:
        return
    if _handler is not None:
        _handler(kernel, grid, arguments, options)
        return
    first = next(x for x in arguments if isinstance(x, Tensor))
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


@contextmanager
def intercept(handler: Handler, target: Target | None = None) -> Iterator[None]:
    """Hand all launches to `handler`, from operations on CPU tensors too; with a target, tiles are
    chosen for it. What a handler does not run leaves results uninitialised."""
    global _handler, _target
    before = _handler, _target
    _handler, _target = handler, target
    try:
        yield
    finally:
        _handler, _target = before


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def _gaps_in_rows(x: Tensor) -> bool:
    return x.numel() > 0 and x.shape[-1] > 1 and x.stride(-1) != 1


def check_triton(name: str, *tensors: Tensor) -> None:
    """Raise ValueError for what no Triton kernel takes: float64, or a last dimension that is not
    contiguous."""
    for x in tensors:
        if x.dtype == torch.float64:
            raise ValueError(f"{name}: float64 runs on CPU only, in torch")
        if _gaps_in_rows(x):
            raise ValueError(
                f"{name}: the last dimension must be contiguous, got shape {tuple(x.shape)} with "
                f"strides {x.stride()}"
            )


def without_gaps(grad: Tensor) -> Tensor:
    """A gradient, copied if its last dimension is not contiguous: its layout is autograd's choice,
    not the caller's, and that of a sum is expanded."""
    return grad.contiguous() if _gaps_in_rows(grad) else grad
