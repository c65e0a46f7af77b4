"""A GPU that is not there: `install()` makes this process believe in one.

A tensor on it says "cuda:0", and its numbers are on the CPU and real, so what torch computes comes
out right. Kernels are not run: their results are 0. What a GPU would refuse is refused: tensors of
two devices in one operation, an argument on the CPU in a launch. `reads` lists where the host has
waited for the device, `launched` counts the launches. Events, streams and graphs are stand-ins; a
captured step is run once, as a capture does, and its replays run nothing.
"""

import ctypes
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).parent.parent
OWN = tuple(str(ROOT / folder) for folder in ("bench", "engine", "kernels", "models"))
# May take tensors of two devices: copies, and indices.
_MAY_MIX = ("copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_")

reads: list[tuple[str, ...]] = []  # functions of our own on the stack, the innermost first
launched: Counter[str] = Counter()


class FakeCuda(Tensor):
    """A tensor on the device; `inner` holds its numbers."""

    inner: Any  # a tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "FakeCuda":
        made: FakeCuda = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=CUDA,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FakeCuda{tuple(self.shape)}"

    def tolist(self) -> Any:
        """As of any tensor; torch's own reads memory."""
        _note_read()
        return self.inner.tolist()


class _FakeDevice(TorchDispatchMode):
    """What is asked for on the device is `FakeCuda`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it takes seconds to import, and nothing here is compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _note_read() -> None:
    names = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(OWN):
            names.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
        frame = frame.f_back
    reads.append(tuple(names))


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, FakeCuda) else x


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.removeprefix("aten::")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [isinstance(x, FakeCuda) for x in tensors]
    if name in ("is_pinned", "pin_memory", "_pin_memory"):
        return False if name == "is_pinned" else args[0].clone()
    # In inference mode operations come here that are made of others.
    if func._can_decompose():
        with _FakeDevice():
            return func.decompose(*args, **kwargs)
    if any(there) and name not in _MAY_MIX:
        mixed = [x for x, on in zip(tensors, there, strict=True) if not on and x.ndim]
        assert not mixed, f"{name}: tensors of two devices"
    asked = kwargs.get("device")
    on_device = any(there) if asked is None else torch.device(asked).type == "cuda"
    copies = (name == "_to_copy" and not on_device) or (name == "copy_" and not there[0])
    waits = copies and not (kwargs.get("non_blocking") or args[2:3] == (True,))
    if any(there) and (name == "_local_scalar_dense" or waits):
        _note_read()
    if any(there) and name in ("nonzero", "masked_select", "index") and _by_bools(args):
        _note_read()  # how many there are has to be known
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if name.startswith(("empty", "new_empty")):
        out.zero_()  # stays where a kernel would have written
    if name == "_local_scalar_dense" or not (on_device or name == "copy_"):
        return out
    of_inner = {id(x.inner): x for x in tensors if isinstance(x, FakeCuda)}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or (name == "copy_" and not there[0]):
            return x
        same = of_inner.get(id(x))  # what is changed in place stays itself
        with torch.inference_mode(False):  # a view of what is no inference tensor is none
            return FakeCuda(x) if same is None else same

    return tree_map(wrapped, out)


def _by_bools(args: Any) -> bool:
    indices = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor)]
    return not indices or any(x.dtype == torch.bool for x in indices)


# -- gradients: the engine of torch wants streams of a device that is there ------------------------


def _gradients(outputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> dict[Any, list[Any]]:
    """Gradients that have arrived at every node of the graph, by their index."""
    pending: Counter[Any] = Counter()
    seen, stack = set(), [x.grad_fn for x in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is not None:
                pending[following] += 1
                stack.append(following)
    arrived: dict[Any, list[Any]] = defaultdict(list)

    def arrive(node: Any, index: int, grad: Any) -> None:
        if grad is not None:  # where a tensor was broadcast, its gradient is summed on arrival
            grad = grad.sum_to_size(node._input_metadata[index].shape)
        arrived[node] += [None] * (index + 1 - len(arrived[node]))
        before = arrived[node][index]
        arrived[node][index] = grad if before is None or grad is None else before + grad

    for out, grad in zip(outputs, grads, strict=True):
        arrive(out.grad_fn, out.output_nr, torch.ones_like(out) if grad is None else grad)
    ready = [node for node in arrived if not pending[node]]
    while ready:
        node = ready.pop()
        if not node.next_functions:
            continue
        given = arrived[node]
        found = node.apply(*given) if hasattr(node, "apply") else node(*given)
        found = found if isinstance(found, tuple) else (found,)
        for (following, index), grad in zip(node.next_functions, found, strict=False):
            if following is not None:
                arrive(following, index, grad)
                pending[following] -= 1
                if not pending[following]:
                    ready.append(following)
    return arrived


def _grad(
    outputs: Any, inputs: Any, grad_outputs: Any = None, retain_graph: Any = None
) -> tuple[Any, ...]:
    """`torch.autograd.grad` of leaves and of what operations made."""
    outputs, inputs = (x if isinstance(x, (list, tuple)) else [x] for x in (outputs, inputs))
    grads = [grad_outputs] if isinstance(grad_outputs, Tensor) else grad_outputs
    with torch.no_grad():
        arrived = _gradients(outputs, grads or [None] * len(outputs))
    by_leaf = {id(getattr(node, "variable", None)): each[0] for node, each in arrived.items()}
    return tuple(by_leaf[id(x)] for x in inputs)


# -- clocks, streams, graphs -----------------------------------------------------------------------


class Generator(torch.Generator):
    """One of the CPU, whatever the device."""

    def __new__(cls, device: object = None) -> "Generator":
        return super().__new__(cls)


class Event:
    """A second after the one before: what is timed is not repeated for being short."""

    def __init__(self, enable_timing: bool = False) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: "Event") -> float:
        return 1e3


class Stream:
    """Everything is in order already."""

    def __init__(self, device: object = None) -> None: ...
    def wait_stream(self, other: "Stream") -> None: ...
    def wait_event(self, event: Event) -> None: ...


class Graph:
    """Replays nothing."""

    def replay(self) -> None:
        launched["replay"] += 1


@contextmanager
def _nothing(*_: object, **__: object) -> Iterator[None]:
    yield


def _run_no_kernel(kernel: Any, grid: Any, arguments: Any, options: dict[str, Any]) -> None:
    for x in arguments:
        on_cpu = isinstance(x, Tensor) and not isinstance(x, FakeCuda)
        assert not on_cpu, f"{kernel.__name__}: an argument on the CPU"
    assert all(0 < size < 1 << 31 for size in grid), grid
    launched[kernel.__name__] += 1


@contextmanager
def used() -> Iterator[None]:
    """Tensors may be made on the device inside, and launches are taken."""
    from kernels.launch import intercept

    # `torch.tensor` makes a tensor on the CPU and copies it: not past the mode.
    torch._C._set_only_lift_cpu_tensors(True)
    with _FakeDevice(), intercept(_run_no_kernel):
        yield
    torch._C._set_only_lift_cpu_tensors(False)


def install() -> None:
    """Before anything of the project is imported."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    # The guard that does nothing, of the CPU, for a device that torch was built without.
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = guards[0]
    cuda: Any = torch.cuda
    properties = SimpleNamespace(
        name="Fake H200", total_memory=8 << 30, multi_processor_count=132, L2_cache_size=1
    )
    stream = Stream()
    for name, value in {
        "is_available": True, "_lazy_init": None, "is_initialized": True, "current_device": 0,
        "device_count": 1, "get_device_properties": properties, "get_device_name": properties.name,
        "synchronize": None, "empty_cache": None, "max_memory_allocated": 1 << 20,
        "memory_allocated": 0, "reset_peak_memory_stats": None, "mem_get_info": (4 << 30, 8 << 30),
        "current_stream": stream, "graph_pool_handle": (0, 0),
        "is_current_stream_capturing": False,
    }.items():  # fmt: skip
        setattr(cuda, name, lambda *_, value=value, **__: value)
    cuda.Event, cuda.Stream, cuda.CUDAGraph = Event, Stream, Graph
    cuda.graph = cuda.stream = cuda.device = _nothing
    setattr(torch, "Generator", Generator)  # noqa: B010
    setattr(torch.autograd, "grad", _grad)  # noqa: B010

    from bench import timing
    from kernels import target

    # To a device without an index torch asks the guard for the current one.
    timing.DEVICE = CUDA
    target._device_target = lambda index: target.TARGETS["sm_90"]  # type: ignore[assignment]
