"""The physical memory that a call takes, as Linux counts it: mapped pages of files included."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_M_MMAP_THRESHOLD = -3


def resident_peak(call: Callable[[], T]) -> tuple[int, T]:
    """The most bytes that this process had during a call beyond those that it had before, and what
    the call returns.

    From now on blocks of a megabyte and more are the system's own, as they are for models: what has
    been freed is no longer resident, and nothing is counted less for being taken out of what was.
    """
    libc = ctypes.CDLL(None)
    assert libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    result = call()
    return _status("VmHWM") - before, result


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10
