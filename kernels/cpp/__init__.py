"""The C++ implementations of operations on a CPU, and the one door through which they are called.

In float32 these define the results: the same bits on AVX-512, AVX2 and NEON, with any number of
threads, whatever else is in the batch. Products add their terms in index order with fused
multiply-adds, sums run over 16 lanes that are joined in a fixed tree, and exp, log and tanh are our
own. Torch is the reference, equal within rounding, and the slow path where there is no compiler.

`build` compiles and loads the library. QUORUM_CPP=0 in the environment turns it off. Where Triton
runs, it goes first. All state is the thread's own, so that judges can run side by side.
"""

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from kernels import launch
from kernels.cpp import build
from kernels.cpp.build import library

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}

_Call = tuple[Any, list[Any], Sequence[Any]]  # a function, its arguments, and what they point to

_enabled: ContextVar[bool] = ContextVar("enabled", default=os.environ.get("QUORUM_CPP", "1") != "0")
_recording: ContextVar[list[_Call] | None] = ContextVar("recording", default=None)


def runs_cpp(*tensors: Tensor) -> bool:
    """Whether operations on these tensors, all of one dtype, run in C++: float32 or bfloat16 on
    CPU, contiguous in their last dimension, none of them empty, where nothing asks for Triton or a
    gradient."""
    first = tensors[0]
    if not _enabled.get() or first.dtype not in _SUFFIX or launch.runs_triton(first):
        return False
    for x in tensors:
        if x.dtype != first.dtype or not x.is_cpu or (x.stride(-1) != 1 and x.shape[-1] > 1):
            return False
        if not x.numel() or (x.requires_grad and torch.is_grad_enabled()):
            return False
    return library() is not None


def implementation() -> str:
    """Which implementation runs on a CPU: "cpp" or "torch"."""
    return "cpp" if _enabled.get() and library() is not None else "torch"


def has_dot_products() -> bool:
    """Whether products of bfloat16 can run on this processor's own dot products."""
    loaded = library() if _enabled.get() else None
    return loaded is not None and "linear_bf16_dots" in loaded.functions


@contextmanager
def torch_only() -> Iterator[None]:
    """Run this thread's operations in torch: what C++ is tested against."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def call(name: str, dtype: torch.dtype, *arguments: Any, dots: bool = False) -> None:
    """Call a C++ function for tensors of `dtype` on torch's number of threads. Tensors go by their
    address, None as a null pointer. dots: its form for weights packed for dot products."""
    suffix = _SUFFIX[dtype] + ("_dots" if dots else "")
    function = _library().functions[f"{name}_{suffix}"]
    passed = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    passed.append(torch.get_num_threads())
    function(*passed)
    recorded = _recording.get()
    if recorded is not None:
        recorded.append((function, passed, arguments))


def structure(name: str) -> type[ctypes.Structure]:
    """A struct of the library's interface; its fields are named as in C++."""
    return _library().structures[name]


def replayed(step: Callable[[], None], times: int) -> Iterator[None]:
    """A CUDA graph for the CPU: run `step` once and record its C++ calls, then replay only those.
    Yields before each of the `times` times. Valid only if the step works entirely through `call`,
    on tensors that keep their addresses."""
    yield
    calls: list[_Call] = []
    token = _recording.set(calls)
    try:
        step()
    finally:
        _recording.reset(token)
    for _ in range(times - 1):
        yield
        for function, passed, _kept in calls:
            function(*passed)


def panel_columns() -> int:
    """Columns of one panel of packed weights."""
    return _number("panel_columns_f32")


def distinct_slots(slots: Tensor, size: int) -> bool:
    """Whether int64 slots are contiguous, distinct and in [0, size)."""
    if not slots.is_contiguous():
        return False
    return bool(_number("distinct_slots_f32", slots.data_ptr(), len(slots), size))


def _number(name: str, *arguments: Any) -> int:
    """The number that a function gives; such calls are not recorded."""
    result = ctypes.c_int64()
    _library().functions[name](*arguments, ctypes.addressof(result), 1)
    return result.value


def _library() -> build.Library:
    loaded = library()
    assert loaded is not None
    return loaded
