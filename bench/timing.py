"""How long a call takes, in milliseconds, on inputs that the cache does not still hold.

What is timed is a `Rotation`: its calls, one for each of several input sets that together
are larger than the last cache, made one after another. On a GPU they are captured into one CUDA
graph (each output in memory of its own) and timed by events around a replay; where something
cannot be captured, around calls made back to back, and `captured` says so. On CPU a clock runs
around the calls. Rotations are compared by timing them in turn.

It knows nothing of what is called, and asserts nothing about time.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"

Call = Callable[[], object]
Fill = Callable[..., Tensor]  # (*shape, dtype=, scale=): `randn` or `empty`

_CACHES = 4  # working set, in multiples of the last cache
_MAX_SETS = 256 if ON_GPU else 4  # on CPU small operations are not bound by memory
# A rotation on a GPU that is shorter is repeated: the events' own time must not show.
_SHORT_MS, _MIN_CALLS = 1.0, 8


@cache
def cache_bytes() -> int:
    """Size of the device's last cache."""
    if ON_GPU:
        return int(torch.cuda.get_device_properties(DEVICE).L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kibibytes = [int(path.read_text().strip().removesuffix("K")) for path in sizes]
    return max(kibibytes, default=32 << 10) << 10


def num_sets(set_bytes: int) -> int:
    """How many input sets of this size a rotation takes."""
    return min(_MAX_SETS, max(1, math.ceil(_CACHES * cache_bytes() / max(set_bytes, 1))))


@cache
def _generator() -> torch.Generator:
    # Not torch's own: that one is tied to graphs while they are captured.
    return torch.Generator(DEVICE).manual_seed(0)


def reseed() -> None:
    """Begin the random numbers anew: a case's inputs do not depend on what ran before it."""
    _generator().manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers on the device, the same after every `reseed`."""
    x = torch.randn(shape, generator=_generator(), device=DEVICE)
    return x.to(dtype) if scale == 1 else x.mul_(scale).to(dtype)


def empty(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """An uninitialised tensor, where only dtype, shape and alignment matter."""
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def rand(*shape: int) -> Tensor:
    """Uniform numbers in (0, 1) on the device, likewise."""
    return torch.rand(shape, generator=_generator(), device=DEVICE).clamp_min(1e-7)


class Rotation:
    """Calls to be timed together, made before anything is timed. capture: try to."""

    def __init__(self, calls: Sequence[Call], capture: bool = True) -> None:
        self.calls = list(calls)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._run()
        if not ON_GPU:
            return
        if self.time_ms() * len(calls) < _SHORT_MS:
            self.calls *= math.ceil(_MIN_CALLS / len(calls))
        if capture:
            self._capture()

    @property
    def captured(self) -> bool:
        """Whether the calls are in a CUDA graph."""
        return self._graph is not None

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                # Held until the end: outputs that reused one block would never leave the cache.
                outputs = [call() for call in self.calls]
                del outputs
        except RuntimeError:  # what waits for the device cannot be captured
            torch.cuda.synchronize()
            # torch's generator goes on believing that it is being captured.
            fresh = torch.Generator(DEVICE).graphsafe_get_state()
            torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
            return
        self._graph = graph

    def time_ms(self) -> float:
        """Make all calls; the mean time of one."""
        if not ON_GPU:
            start = time.perf_counter()
            self._run()
            return 1e3 * (time.perf_counter() - start) / len(self.calls)
        start_event, stop_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._run()  # not timed: while it runs, what is timed is queued without a gap
        start_event.record()
        self._run()
        stop_event.record()
        stop_event.synchronize()
        return start_event.elapsed_time(stop_event) / len(self.calls)

    def _run(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        for call in self.calls:
            call()
