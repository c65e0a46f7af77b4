"""Compiled kernels for a GPU run, made where there is no GPU: `python -m bench.gpu --pack FILE`.

Triton keeps a kernel under a key that hashes its own installation, the kernel's source, the types
and alignment of its arguments, and the options of its launch. So a cache serves where Python and
Triton are those that it was packed with, and, since it names its files by absolute paths, in the
folder of the same path: CACHE, or TRITON_CACHE_DIR. Elsewhere kernels are compiled when they are
first launched, as without a cache. Of a kernel its machine code and its description are packed.
"""

import os
import platform
import tarfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import triton
from tqdm import tqdm

from bench.aot import Launch, compile_all, launches_of
from bench.case import OpCase
from bench.ops import OPERATIONS
from bench.timing import ON_GPU, empty
from kernels.target import TARGETS, target_of

if TYPE_CHECKING:
    from bench.gpu_steps import Work

CACHE = Path("/tmp/quorum-triton")
ROWS = (64, 2048)  # of a step, and of a prefill


def folder() -> Path:
    """Where Triton keeps what it compiles in a GPU run."""
    return Path(os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE)))


def cases_of(work: "Work") -> Iterator[OpCase]:
    """The cases that are timed, but for the grid; what the models' steps and prefills are made
    of."""
    yield from chain(*(cases for step, cases in work.figures.items() if step != "grid"))
    for shape in dict.fromkeys(shape for shape, _ in work.decodes.values()):
        for operation in OPERATIONS.values():
            for rows in ROWS:
                yield from operation.variants(shape, rows)


def kernels_of(work: "Work") -> list[tuple[Launch, str]]:
    """The distinct launches of a GPU run's work, and the architecture that they are for: this
    GPU's, without one sm_90."""
    target = target_of(torch.empty(0, device="cuda")) if ON_GPU else TARGETS["sm_90"]
    found: dict[Launch, None] = {}
    for case in cases_of(work):
        (arguments,) = case.make_inputs(empty, 1)
        found |= dict.fromkeys(launches_of(target, case.call, *arguments))
    return [(launch, target.arch) for launch in found]


def pack(work: "Work", path: Path) -> dict[str, object]:
    """Compile a run's kernels for sm_90 and write them to a tar file; how many, and with what."""
    folder().mkdir(parents=True, exist_ok=True)
    jobs = kernels_of(work)
    reports = list(tqdm(compile_all(jobs), total=len(jobs), unit="kernel"))
    with tarfile.open(path, "w:gz") as tar:
        for file in sorted(folder().rglob("*")):
            if file.suffix in (".cubin", ".json"):
                tar.add(file, file.relative_to("/"))
    return {
        "kernels": len(reports),
        "failed": [report.launch for report in reports if report.error is not None],
        "folder": str(folder()),
        "python": platform.python_version(),
        "triton": triton.__version__,
        "bytes": path.stat().st_size,
    }


def unpack(path: Path) -> int:
    """Put packed kernels where they were; the number of files."""
    with tarfile.open(path) as tar:
        names = tar.getnames()
        tar.extractall("/", filter="data")
    return len(names)
