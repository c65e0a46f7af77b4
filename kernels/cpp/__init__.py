"""The C++ implementations of operations on CPU: built when first used, checked, then called.

`kernels/cpp/exports.cpp` does each operation in one pass, with results that are bit for bit those
of the torch implementations in float32. It needs a C++ compiler, an x86 processor with AVX2 and a
torch that was built with MKL. Where one of them is missing, or where a product, a sum or an
exponential comes out one bit different from torch's on this machine (`_same_bits`), operations run
in torch, several times slower, and a warning says why. So the same samples come out either way.

The library is kept under $XDG_CACHE_HOME/quorum (~/.cache/quorum), named after a hash of all that
it was made from. QUORUM_NATIVE=0 in the environment turns it off. Where Triton runs, it goes first.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import launch

_SOURCE = Path(__file__).with_name("exports.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp")
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
# Arguments of each function, without the number of threads: a pointer, a 64-bit int, a float.
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "f": ctypes.c_float}
_ATTENTION = "pll" * 3 + "llll" + "pffl" + "pp"
_SIGNATURES = {
    "uniforms": "ppp" + "ll" + "p",
    "take_token": "ppp" + "pppppp" + "ppll" + "pl" + "ppp" + "l" + "ppl",
    "rms_norm": "pll" + "pppp" + "lllfl",
    "rope": "pll" + "ppp" + "lll",
    "gated_act": "pl" + "p" + "lll",
    "write_kv": "pll" * 4 + "p" + "llll",
    "attend_items": _ATTENTION + "pl",
    "attend_suffixes": _ATTENTION + "ppp" + "lllll",
    "merge": "ppp" + "llll" + "pp",
    "decode": "ppl" + "pppp" + "p" + "ppp",
    "pack": "plllp",
    "linear": "pllplpp",
    "sample_token": "pllpl" + "fff" + "l" + "ppp",
}

_Functions = dict[tuple[str, torch.dtype], Any]
_Call = tuple[Any, list[Any], Sequence[Any]]  # a function, its arguments, and what they point to

_enabled = os.environ.get("QUORUM_NATIVE", "1") != "0"
_recording: list[_Call] | None = None


def runs_cpp(*tensors: Tensor) -> bool:
    """Whether operations on these tensors, all of one dtype, run in C++: float32 or bfloat16 on
    CPU, contiguous in their last dimension, none of them empty, where nothing asks for Triton or a
    gradient."""
    first = tensors[0]
    if not _enabled or first.dtype not in _SUFFIX or launch.runs_triton(first):
        return False
    for x in tensors:
        if x.dtype != first.dtype or not x.is_cpu or (x.stride(-1) != 1 and x.shape[-1] > 1):
            return False
        if not x.numel() or (x.requires_grad and torch.is_grad_enabled()):
            return False
    return library() is not None


@contextmanager
def torch_only() -> Iterator[None]:
    """Run operations in torch: what C++ is held against."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Call a C++ function for tensors of `dtype` on torch's number of threads. Tensors go by their
    address, None as a null pointer."""
    called = _call(_functions(), name, dtype, arguments)
    if _recording is not None:
        _recording.append(called)


def _call(functions: _Functions, name: str, dtype: torch.dtype, arguments: Sequence[Any]) -> _Call:
    addresses = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    function, passed = functions[name, dtype], [*addresses, torch.get_num_threads()]
    function(*passed)
    return function, passed, arguments


def replayed(step: Callable[[], None], times: int) -> Iterator[None]:
    """Run a step `times` times, yielding before each: first as it is, then only the C++ calls that
    it made, on the same tensors. So it has to do all its work in `call`s, on tensors whose contents
    alone differ from one time to the next, and with nothing else run in C++ in between."""
    global _recording
    yield
    calls: list[_Call] = []
    _recording = calls
    try:
        step()
    finally:
        _recording = None
    for _ in range(times - 1):
        yield
        for function, passed, _kept in calls:
            function(*passed)


def panel_columns() -> int:
    """Columns of one panel of packed weights."""
    native = library()
    assert native is not None
    return int(native.panel_columns())


def distinct_slots(slots: Tensor, size: int) -> bool:
    """Whether int64 slots are contiguous, distinct and in [0, size)."""
    native = library()
    assert native is not None
    at, num = ctypes.c_void_p(slots.data_ptr()), ctypes.c_int64(len(slots))
    return slots.is_contiguous() and bool(native.distinct_slots(at, num, ctypes.c_int64(size)))


@cache
def _functions() -> _Functions:
    native = library()
    assert native is not None
    return _typed(native)


def _typed(native: ctypes.CDLL) -> _Functions:
    found = {}
    for name, signature in _SIGNATURES.items():
        for dtype, suffix in _SUFFIX.items():
            function = getattr(native, f"{name}_{suffix}", None)
            if function is None:  # of `uniforms` and `take_token` there is one
                continue
            function.argtypes = [_TYPES[letter] for letter in signature] + [ctypes.c_int]
            function.restype = None
            found[name, dtype] = function
    return found


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None (and a warning) where it cannot be had or is not exact."""
    try:
        native = ctypes.CDLL(str(_built()))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        reason = f"no C++ library: {getattr(error, 'stderr', None) or error}"
    else:
        if _same_bits(native):
            return native
        reason = "C++ and torch differ in the last bits on this processor"
    warnings.warn(f"operations run in torch, slowly: {reason}", RuntimeWarning, stacklevel=2)
    return None


def _same_bits(native: ctypes.CDLL) -> bool:
    """Whether products, sums over a row and exponentials have torch's bits: all that is not one
    rounded operation."""
    functions = _typed(native)
    generator = torch.Generator().manual_seed(0)

    def run(name: str, *arguments: Any) -> None:
        _call(functions, name, torch.float32, arguments)

    rows, columns, terms = 48, 80, 300
    x = torch.randn(rows, terms, generator=generator)
    weight = torch.randn(columns, terms, generator=generator)
    width = int(native.panel_columns())
    panels = torch.empty(-(-columns // width) * width * terms)
    y = torch.empty(rows, columns)
    run("pack", weight, columns, terms, 0, panels)
    run("linear", x, rows, terms, panels, columns, None, y)
    ones, total = torch.ones(terms), torch.empty(rows, terms)
    run("rms_norm", x, terms, terms, None, ones, total, None, rows, 1, terms, 1e-6, 0)
    token = torch.empty(rows, dtype=torch.int64)
    logprob, sampling_logprob = torch.empty(rows), torch.empty(rows)
    uniform = torch.rand(rows, generator=generator)
    run(
        "sample_token", x, rows, terms, uniform, 1, 0.7, 0.0, 0.0, 1024, token, logprob,
        sampling_logprob,
    )  # fmt: skip

    product = x[:, :256] @ weight[:, :256].T + x[:, 256:] @ weight[:, 256:].T
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    chosen = (x - x.amax(-1, keepdim=True)).gather(1, token[:, None])[:, 0]
    normalizer = (x - x.amax(-1, keepdim=True)).exp().sum(-1)
    return y.equal(product) and total.equal(normed) and logprob.equal(chosen - normalizer.log())


def _built() -> Path:
    """The library's path, after building it if it is not there. Raises OSError without a compiler
    and CalledProcessError where it refuses."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise OSError("no C++ compiler (g++) was found")
    torch_lib = Path(torch.__file__).parent / "lib"
    command = [compiler, *_FLAGS, "-shared", "-fPIC", str(_SOURCE)]
    # -march=native is resolved by the compiler: what it comes to decides whether a file still fits.
    native_flags = _run([compiler, "-march=native", "-Q", "--help=target"])
    made_from = [*command, torch.__version__, str(torch_lib), native_flags, _SOURCE.read_text()]
    digest = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quorum"
    path = home / f"native-{digest}.so"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as folder:
            made = Path(folder) / path.name
            _run([*command, "-o", str(made), f"-L{torch_lib}", "-ltorch_cpu"])
            made.replace(path)  # whole or not at all: others may build at the same time
    return path


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
