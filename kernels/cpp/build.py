"""The C++ library: compiled when first used, kept, and loaded only if it is ours.

It needs a C++20 compiler (CXX, else g++ or clang++) and an instruction set that it knows: AVX-512,
AVX2 with FMA, or NEON. QUORUM_ISA=avx2|avx512|neon builds for another set than the best one here.

A library is kept under $XDG_CACHE_HOME/quorum (~/.cache/quorum). Its name holds a hash of all that
it was made from and a hash of its own content. A folder that others can write is not used, and a
damaged file is built anew; what is loaded then has to reproduce known bits.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_ROOT = Path(__file__).parents[2]
_SOURCES = ("kernels/cpp/exports.cpp", "models/decoder.cpp")
_HEADERS = ("kernels/cpp", "models")
_FLAGS = (
    "-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-pthread",
    "-fvisibility=hidden",
)  # fmt: skip
_ISA_FLAGS = {
    "avx512": ("-march=x86-64-v4", "-mtune=native"),
    "avx2": ("-march=x86-64-v3", "-mtune=native"),
    "neon": ("-march=armv8-a",),
}
_LETTERS = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "f": ctypes.c_float}
# SHA-256 of what `_known_results` gives, on every processor.
_KNOWN_BITS = "63da54e2fbc1d91a0cbbf2993f98135935315cf8ce554c769b4d956c3fdfc9b3"

_lock = threading.Lock()
_loaded: "list[Library | None]" = []


@dataclass(frozen=True)
class Library:
    """A loaded library: its functions by name, and its structs as ctypes has them."""

    functions: dict[str, Any]
    structures: dict[str, type[ctypes.Structure]]


def library() -> Library | None:
    """The library of this process, or None (and a warning, once) where it cannot be had."""
    with _lock:
        if not _loaded:
            _loaded.append(_load_or_warn())
        return _loaded[0]


def forget() -> None:
    """Let the next call of `library` build or load it again."""
    with _lock:
        _loaded.clear()


def instruction_set() -> str:
    """The set that the library is built for: QUORUM_ISA, else the processor's best. Raises OSError
    for a processor without one of them, ValueError for another name."""
    chosen = os.environ.get("QUORUM_ISA")
    if chosen:
        if chosen not in _ISA_FLAGS:
            raise ValueError(f"QUORUM_ISA must be one of {sorted(_ISA_FLAGS)}, got {chosen!r}")
        return chosen
    machine = platform.machine()
    if machine in ("aarch64", "arm64"):
        return "neon"
    flags: set[str] = set()
    if machine == "x86_64":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                flags = set(line.split())
                break
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
        return "avx512"
    if {"avx2", "fma", "f16c", "bmi1", "bmi2"} <= flags:
        return "avx2"
    raise OSError(f"this processor ({machine}) has none of AVX-512, AVX2 and NEON")


def _load_or_warn() -> Library | None:
    try:
        return _load()
    except subprocess.CalledProcessError as error:
        reason = f"{error.cmd[0]} failed: {(error.stderr or '').strip()[-2000:]}"
    except (OSError, ValueError) as error:
        reason = str(error)
    warnings.warn(
        f"operations run in torch, slowly, and without reproducible bits: no C++ library: {reason}",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def _load() -> Library:
    """Find or build the library, load it and check it."""
    isa = instruction_set()
    compiler = _compiler()
    version = _run([*compiler, "--version"])
    sources = [_ROOT / source for source in _SOURCES]
    headers = sorted(h for folder in _HEADERS for h in (_ROOT / folder).glob("*.h"))
    texts = [f"{path.name}\0{path.read_text()}" for path in (*sources, *headers)]
    target = _run([*compiler, "-mtune=native", "-Q", "--help=target"]) if isa != "neon" else ""
    made_from = [*compiler, *_FLAGS, *_ISA_FLAGS[isa], version, target, *texts]
    key = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:16]
    home, name = _home(), f"cpp-{isa}-{key}"
    with _alone_in(home):
        for path in home.glob(f"{name}-*.so"):
            if path.name == f"{name}-{_digest(path)}.so" and _is_private(path):
                return _open(path)
            path.unlink()
        return _open(_build(compiler, isa, home, name))


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let other processes wait, so that one of them builds and the others load."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in ("g++", "clang++", "c++"):
        if found := shutil.which(name):
            return [found]
    raise OSError("no C++ compiler (g++ or clang++) was found")


def _build(compiler: Sequence[str], isa: str, home: Path, name: str) -> Path:
    """Compile the sources at the same time, link them, and keep the result under its name."""
    with tempfile.TemporaryDirectory(dir=home) as folder:
        objects = [Path(folder) / f"{i}.o" for i in range(len(_SOURCES))]
        commands = [
            [*compiler, *_FLAGS, *_ISA_FLAGS[isa], "-c", str(_ROOT / source), "-o", str(made)]
            for source, made in zip(_SOURCES, objects, strict=True)
        ]
        running = [
            subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for c in commands
        ]
        outputs = [process.communicate() for process in running]
        for command, process, (out, err) in zip(commands, running, outputs, strict=True):
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command, out, err)
        linked = Path(folder) / "linked.so"
        _run([*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(linked)])
        linked.chmod(0o700)
        with linked.open("rb") as file:
            os.fsync(file.fileno())
        path = home / f"{name}-{_digest(linked)}.so"
        linked.replace(path)  # whole or not at all
    return path


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _home() -> Path:
    """The folder that libraries are kept in. Where others could write to it, a folder of this
    process alone."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quorum"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if all(_is_private(path) for path in (home, *home.resolve().parents)):
        return home
    warnings.warn(
        f"others can write to {home}: the C++ library is built for this process alone",
        RuntimeWarning,
        stacklevel=5,
    )
    folder = tempfile.TemporaryDirectory(prefix="quorum-")
    _temporary.append(folder)
    return Path(folder.name)


_temporary: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def _is_private(path: Path) -> bool:
    """Whether a file or folder is ours (or root's), and nobody else can write to it. In a folder
    with the sticky bit others cannot replace what is ours."""
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()):
        return False
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return not others or bool(path.is_dir() and status.st_mode & stat.S_ISVTX)


def _open(path: Path) -> Library:
    """Load a library and read its interface (kernels/cpp/interface.h). Raises OSError where it is
    not one of ours."""
    loaded = ctypes.CDLL(str(path))
    describe = getattr(loaded, "quorum_interface", None)
    if describe is None:
        raise OSError(f"{path} has no quorum_interface")
    describe.argtypes, describe.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    text = ctypes.create_string_buffer(describe(None, 0))
    describe(text, len(text))
    functions: dict[str, Any] = {}
    structures: dict[str, type[ctypes.Structure]] = {}
    for line in text.raw.decode().splitlines():
        kind, name, *rest = line.split(" ")
        if kind == "function":
            letters, address = rest
            prototype = ctypes.CFUNCTYPE(None, *(_LETTERS[letter] for letter in letters))
            functions[name] = prototype(int(address))
        else:
            structures[name] = _structure(name, int(rest[0]), rest[1:])
    library = Library(functions, structures)
    _check_bits(path, library)
    return library


def _structure(name: str, size: int, fields: Sequence[str]) -> type[ctypes.Structure]:
    """A struct of these fields, NAME:LETTER:OFFSET each, laid out as in C++."""
    described = [field.split(":") for field in fields]
    members = {"_fields_": [(field, _LETTERS[letter]) for field, letter, _ in described]}
    made = type(name, (ctypes.Structure,), members)
    offsets = [getattr(made, field).offset for field, _, _ in described]
    if ctypes.sizeof(made) != size or offsets != [int(offset) for *_, offset in described]:
        raise OSError(f"struct {name} has another layout in C++")
    return made


def _check_bits(path: Path, library: Library) -> None:
    digest = hashlib.sha256(_known_results(library).tobytes()).hexdigest()
    if digest != _KNOWN_BITS:
        raise OSError(f"{path} gives other results than on other processors ({digest})")


def _known_results(library: Library) -> np.ndarray:
    """Products, norms, exponentials, logarithms and samples of small fixed numbers: one row of
    float32."""
    rows, columns, terms = 19, 45, 331

    def numbers(n: int, step: int) -> np.ndarray:
        return ((np.arange(n, dtype=np.int64) * step % 251 - 125) / 97).astype(np.float32)

    def run(name: str, *arguments: Any) -> None:
        passed = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
        library.functions[f"{name}_f32"](*passed, 1)

    x, weight = numbers(rows * terms, 37), numbers(columns * terms, 101)
    width = np.zeros(1, np.int64)
    run("panel_columns", width)
    panels = np.zeros(-(-columns // int(width[0])) * int(width[0]) * terms, np.float32)
    products, normed = np.zeros(rows * columns, np.float32), np.zeros(rows * terms, np.float32)
    run("pack", weight, columns, terms, 0, panels)
    run("linear", x, rows, terms, panels, columns, None, products)
    run("rms_norm", x, terms, terms, None, numbers(terms, 7), normed, None, rows, 1, terms, 1e-6, 0)
    found = [products, normed]
    for function in range(3):
        found.append(np.zeros(rows * terms, np.float32))
        run("elementary", x, found[-1], rows * terms, function)
    samples, vocab = 202, 31
    token = np.zeros(samples, np.int64)
    logprob, sampling_logprob = np.zeros(samples, np.float32), np.zeros(samples, np.float32)
    uniform = ((np.arange(samples) + 0.5) / samples).astype(np.float32)
    run(
        "sample_token", x, samples, vocab, uniform, 1, 0.7, 19, 0.9, 0.01, 30.0, 8, token, logprob,
        sampling_logprob,
    )  # fmt: skip
    return np.concatenate([*found, token.astype(np.float32), logprob, sampling_logprob])
