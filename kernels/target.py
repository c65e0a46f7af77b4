"""The GPU that tile sizes are chosen for.

Tile sizes, warps and stages are plain functions of the shape and a `Target`, so a compiler without
a device can ask for the launch that another device would get.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """What a choice of tiles may depend on: the architecture ("sm_90", "gfx942"), the shared
    memory that one program may use, in bytes, and the number of multiprocessors."""

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

_chosen: ContextVar[Target | None] = ContextVar("target", default=None)


def target_of(x: Tensor) -> Target:
    """The target that tiles for this tensor are chosen for."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    return _device_target(x.device.index or 0) if x.is_cuda else _INTERPRETER


@contextmanager
def tiles_for(target: Target | None) -> Iterator[None]:
    """Choose tiles for `target` in this thread; None: for each tensor's own device."""
    token = _chosen.set(target)
    try:
        yield
    finally:
        _chosen.reset(token)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


@cache
def _device_target(index: int) -> Target:
    driver = triton.runtime.driver.active
    with torch.cuda.device(index):
        arch = driver.get_current_target().arch  # 90, or "gfx942"
    properties = driver.utils.get_device_properties(index)
    name = arch if isinstance(arch, str) else f"sm_{arch}"
    return Target(name, properties["max_shared_mem"], properties["multiprocessor_count"])
