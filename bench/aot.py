"""Compile, without a GPU, every kernel launch that the table of shapes can lead to.

    python -m bench.aot [--targets sm_80 sm_90 sm_100 gfx942] [--shapes NAME ...]

Operations run on CPU tensors with their launches intercepted (`kernels.launch.intercept`), so what
is compiled is what would run: the arguments' types and alignment, the constants, warps and stages
that the operation itself chose for the target. For sm_90 the compiled code is asked for its
registers, spills and shared memory. Exits with 1 where a launch does not compile, spills on sm_90,
or asks for more shared memory than its target has.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from kernels.launch import TARGETS, Target, intercept

_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Launch:
    """A kernel launch as a compiler sees it: types, constants and options instead of values."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # arguments that are divisible by 16
    options: tuple[tuple[str, int], ...]  # num_warps, num_stages

    @property
    def name(self) -> str:
        """The kernel's name and what tells this launch from others."""
        values = [f"{k}={v}" for k, v in (*self.constants, *self.options)]
        dtypes = [kind for _, kind in self.signature if kind.startswith("*")]
        return f"{self.kernel.__name__}[{' '.join([*dict.fromkeys(dtypes), *values])}]"


@dataclass(frozen=True)
class Report:
    """What a compiled launch needs of a program; registers and spills on NVIDIA only."""

    launch: str
    target: str
    shared_bytes: int
    registers: int | None = None
    spill_bytes: int | None = None
    error: str | None = None

    @property
    def fault(self) -> str | None:
        """Why this launch will not do, if it will not."""
        if self.error is not None:
            return self.error
        if self.spill_bytes and self.target == "sm_90":
            return f"spills {self.spill_bytes} bytes"
        if self.shared_bytes > TARGETS[self.target].shared_bytes:
            return f"needs {self.shared_bytes} bytes of shared memory"
        return None


def describe(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """A launch of these arguments, specialised as Triton specialises them."""
    settings = {k: options[k] for k in ("num_warps", "num_stages") if k in options}
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    given |= {k: v for k, v in options.items() if k not in settings}
    signature, constants, aligned = [], [], []
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
            continue
        signature.append((parameter.name, mangle_type(value)))
        address = value.data_ptr() if isinstance(value, Tensor) else value
        if isinstance(address, int) and not isinstance(value, bool) and address % 16 == 0:
            aligned.append(i)
    return Launch(
        kernel, tuple(signature), tuple(constants), tuple(aligned), tuple(settings.items())
    )


def launches_of(target: Target, call: Callable[[], object]) -> list[Launch]:
    """The distinct launches of what `call` runs, tiled for a target."""
    found: dict[Launch, None] = {}

    def record(kernel: Any, grid: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        found[describe(kernel, arguments, options)] = None

    with intercept(record, target):
        call()
    return list(found)


def compile_launch(launch: Launch, target: Target) -> Report:
    """Compile one launch for one target."""
    source = ASTSource(
        launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(i,): _ALIGNED for i in launch.aligned},
    )
    if target.is_hip:
        gpu = GPUTarget("hip", target.arch, 64)
    else:
        gpu = GPUTarget("cuda", int(target.arch.removeprefix("sm_")), 32)
    try:
        compiled = triton.compile(source, target=gpu, options=dict(launch.options))
    except Exception as error:  # whatever a compiler throws is the finding
        return Report(launch.name, target.arch, 0, error=f"{type(error).__name__}: {error}")
    shared = compiled.metadata.shared
    if target.is_hip:
        return Report(launch.name, target.arch, shared)
    registers, spills = _resources(compiled.asm["cubin"])
    return Report(launch.name, target.arch, shared, registers, spills)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack frame (spills, since kernels keep no arrays)."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    assert found is not None, dump
    return int(found[1]), int(found[2])
