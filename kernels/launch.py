"""Where Triton kernels run, and the one door through which they are launched.

An operation runs its Triton kernel for tensors on a GPU, and for tensors on CPU under
TRITON_INTERPRET=1 (set before this package is imported). On a GPU it never falls back.

`intercept` hands every launch to a callable instead of the device: tests count launches that way.
With a target, operations on CPU tensors are launched too: ahead-of-time compilation records them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.target import Target, tiles_for

INTERPRETED = bool(triton.knobs.runtime.interpret)

# handler(kernel, grid, arguments, options): options are constexprs and num_warps, num_stages.
Handler = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]

_handler: ContextVar[Handler | None] = ContextVar("handler", default=None)
_target: ContextVar[Target | None] = ContextVar("target", default=None)  # of `intercept`


def runs_triton(x: Tensor) -> bool:
    """Whether operations on this tensor run their Triton kernel."""
    return x.is_cuda or INTERPRETED or _target.get() is not None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run `kernel` over `grid` on the device of its first tensor; an empty grid runs nothing."""
    if 0 in grid:
        return
    handler = _handler.get()
    if handler is not None:
        handler(kernel, grid, arguments, options)
        return
    first = next(x for x in arguments if isinstance(x, Tensor))
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


def launch_beside(x: Tensor, launches: Callable[[], None]) -> Callable[[], None]:
    """Launch on a second stream of x's GPU, beside what this stream gets next. Returns what makes
    this stream wait for that; call it before anything reads the results, and before the tensors
    they use are freed. In a CUDA graph the two are branches. Elsewhere the launches run at once."""
    if not x.is_cuda or _handler.get() is not None:
        launches()
        return lambda: None
    current = torch.cuda.current_stream(x.device)
    second = _second_stream(x.device, current.cuda_stream)
    second.wait_stream(current)
    with torch.cuda.stream(second):
        launches()
    return lambda: current.wait_stream(second)


@cache
def _second_stream(device: torch.device, stream: int) -> torch.cuda.Stream:
    """The second stream of a stream: one that a graph is captured on has its own."""
    return torch.cuda.Stream(device)


@contextmanager
def intercept(handler: Handler, target: Target | None = None) -> Iterator[None]:
    """Hand all launches of this thread to `handler`. With a target, tiles are chosen for it, and
    operations on CPU tensors launch their kernels too. What a handler does not run leaves results
    uninitialised."""
    tokens = _handler.set(handler), _target.set(target)
    try:
        # Otherwise autograd launches a GPU's gradients from threads of its own.
        with tiles_for(target), torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _handler.reset(tokens[0])
        _target.reset(tokens[1])
