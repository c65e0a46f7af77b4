"""Compile, without a GPU, every kernel launch that the table of shapes can lead to.

    python -m bench.aot [--targets sm_80 sm_90 sm_100 gfx942] [--shapes NAME ...]
                        [--operations NAME ...]

Operations run on CPU tensors (their cases are in `bench/ops`) with their launches intercepted
 (`kernels.launch.intercept`), so what is compiled is what would run: the arguments'
types and alignment, the constants, warps and stages that the operation itself chose for the target.
For sm_90 the compiled code is asked for its registers, spills and shared memory. Ends in one JSON
line; exits with 1 where a launch does not compile, spills on sm_90, or asks for more shared memory
than its target has.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from bench.case import OpCase
from bench.forests import Workload
from bench.ops import OPERATIONS
from bench.provenance import print_json
from bench.sass import Sass, Usage, programs_per_processor, read_sass, read_usage
from bench.shapes import SHAPES, Shape
from bench.timing import empty
from engine import command
from kernels.forest_attention.plan import ForestPlan
from kernels.launch import intercept
from kernels.target import TARGETS, Target

_LISTS_CONSTANTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
_ALIGNED: list[list[object]] = [["tt.divisibility", 16]]


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

    @property
    def choice(self) -> tuple[object, ...]:
        """What the operation chose: dtypes, what is absent, constants, warps and stages; without
        what Triton tells apart by value (sizes that are 1 or multiples of 16)."""
        declared = {p.name for p in self.kernel.params if p.is_constexpr}
        constants = tuple((k, v) for k, v in self.constants if k in declared or v is None)
        dtypes = tuple(kind for _, kind in self.signature if kind.startswith("*"))
        return self.kernel.__name__, dtypes, constants, self.options


@dataclass(frozen=True)
class Report:
    """What a compiled launch needs of a program, registers on NVIDIA only; its machine code where
    that was read."""

    launch: str
    target: str
    shared_bytes: int
    warps: int = 0
    usage: Usage | None = None
    sass: Sass | None = None
    error: str | None = None

    @property
    def per_processor(self) -> int | None:
        """Programs that run at once on a processor of sm_90."""
        if self.usage is None or self.target != "sm_90":
            return None
        return programs_per_processor(self.usage.registers, self.shared_bytes, self.warps)

    @property
    def fault(self) -> str | None:
        """Why this launch will not do, if it will not."""
        if self.error is not None:
            return self.error
        if self.usage is not None and self.usage.spill_bytes and self.target == "sm_90":
            return f"spills {self.usage.spill_bytes} bytes"
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


def launches_of(target: Target, call: Callable[..., object], *arguments: Any) -> list[Launch]:
    """The distinct launches of a call, tiled for a target."""
    found: dict[Launch, None] = {}

    def record(kernel: Any, grid: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        found[describe(kernel, arguments, options)] = None

    # A plan keeps what it was compiled to, which depends on the target.
    fresh = (
        replace(x, plan=recompiled(x.plan)) if isinstance(x, Workload) else x for x in arguments
    )
    with intercept(record, target), torch.inference_mode():
        call(*fresh)
    return list(found)


def recompiled(plan: ForestPlan) -> ForestPlan:
    """A plan without what it was compiled to."""
    return ForestPlan(plan.tiles, plan.positions, plan.suffix, plan.advancing, plan.per_split)


def dtypes_of(shape: Shape) -> tuple[torch.dtype, ...]:
    """Both half types, and float32 where a model is small enough for it."""
    halves = (torch.bfloat16, torch.float16)
    return (*halves, torch.float32) if shape.hidden_size <= 1024 else halves


def cases(shapes: Iterable[Shape], operations: Iterable[str]) -> Iterator[OpCase]:
    """All variants of the operations for these shapes, in every dtype."""
    for name, shape in product(operations, shapes):
        operation = OPERATIONS[name]
        for dtype, rows in product(dtypes_of(shape), operation.rows):
            yield from operation.variants(replace(shape, dtype=dtype), rows)


def all_launches(
    shapes: Iterable[Shape], operations: Iterable[str], targets: Iterable[Target]
) -> dict[tuple[Launch, str], str]:
    """One launch of every choice that operations make, with its target's name, and a case that
    leads to it; the least special one, with the fewest sizes that are constants to Triton."""
    found: dict[tuple[object, ...], tuple[Launch, str, str]] = {}
    for case in cases(shapes, operations):
        (arguments,) = case.make_inputs(empty, 1)
        for target in targets:
            for launch in launches_of(target, case.call, *arguments):
                key = launch.choice, target.arch
                if key not in found or len(launch.constants) < len(found[key][0].constants):
                    found[key] = launch, target.arch, case.key
    return {(launch, arch): key for launch, arch, key in found.values()}


def _attributes(launch: Launch) -> dict[tuple[int], list[list[object]]]:
    """As Triton lists them when it compiles at a launch, so that it finds under its key what is
    compiled here: empty for integers and pointers that are not aligned, and since 3.7 for constants
    too; absent for numbers that are never told apart."""
    return {
        (i,): _ALIGNED if i in launch.aligned else []
        for i, (_, kind) in enumerate(launch.signature)
        if (kind == "constexpr" and _LISTS_CONSTANTS)
        or (kind.startswith(("*", "i")) and not launch.kernel.params[i].do_not_specialize)
    }


def compiled(launch: Launch, target: Target) -> Any:
    """What Triton makes of one launch for one target."""
    source = ASTSource(
        launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs=_attributes(launch),
    )
    if target.is_hip:
        gpu = GPUTarget("hip", target.arch, 64)
    else:
        gpu = GPUTarget("cuda", int(target.arch.removeprefix("sm_")), 32)
    return triton.compile(source, target=gpu, options=dict(launch.options))


def compile_launch(launch: Launch, target: Target, reads_sass: bool = False) -> Report:
    """Compile one launch for one target, and ask what it needs. reads_sass: of sm_90 read the
    machine code too."""
    try:
        kernel = compiled(launch, target)
    except Exception as error:  # whatever a compiler throws is the finding
        return Report(launch.name, target.arch, 0, error=f"{type(error).__name__}: {error}")
    usage = None if target.is_hip else read_usage(kernel.asm["cubin"])
    sass = read_sass(kernel.asm["cubin"]) if reads_sass and target.arch == "sm_90" else None
    needs = kernel.metadata.shared, kernel.metadata.num_warps
    return Report(launch.name, target.arch, *needs, usage, sass)


def compile_all(jobs: Sequence[tuple[Launch, str]], reads_sass: bool = False) -> Iterator[Report]:
    """`compile_launch` for targets, in a process for each processor, in any order."""
    # A fork would copy torch's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        futures = [
            pool.submit(
                _compile_named,
                launch.kernel.__module__,
                launch.kernel.__name__,
                replace(launch, kernel=None),
                target,
                reads_sass,
            )
            for launch, target in jobs
        ]
        for future in as_completed(futures):
            yield future.result()


def _compile_named(
    module: str, kernel: str, launch: Launch, target: str, reads_sass: bool
) -> Report:
    """In another process, to which a kernel cannot be sent."""
    found = getattr(import_module(module), kernel)
    return compile_launch(replace(launch, kernel=found), TARGETS[target], reads_sass)


def table(reports: Iterable[Report]) -> str:
    """What launches compiled for sm_90 need, a line for each: registers, spilled bytes, shared
    bytes, programs of a processor, loads and groups of copies under way, instructions."""
    lines = ["registers  spills  shared  programs  loads  groups  instructions  launch"]
    for report in sorted(reports, key=lambda report: report.launch):
        usage, sass = report.usage, report.sass
        if usage is None or sass is None:
            lines.append(f"{report.launch}: {report.error}")
            continue
        groups = "-" if sass.groups_ahead is None else sass.groups_ahead
        lines.append(
            f"{usage.registers:>9}  {usage.spill_bytes:>6}  {report.shared_bytes:>6}  "
            f"{report.per_processor:>8}  {sass.loads:>5}  {groups:>6}  {sass.instructions:>12}  "
            f"{report.launch}"
        )
    return "\n".join(lines)


def summary(target: str, reports: Sequence[Report]) -> str:
    """One line for a target."""
    faults = sum(report.fault is not None for report in reports)
    shared = max((report.shared_bytes for report in reports), default=0)
    registers = max((r.usage.registers for r in reports if r.usage is not None), default=0)
    most = f", at most {registers} registers" if registers else ""
    return (
        f"{target}: {len(reports)} launches, {faults} faults{most}, at most {shared:,} bytes of "
        "shared memory"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, choices in (("targets", TARGETS), ("shapes", SHAPES), ("operations", OPERATIONS)):
        chosen = list(choices)
        parser.add_argument(f"--{name}", nargs="+", choices=chosen, default=chosen, metavar="NAME")
    args = parser.parse_args(arguments)
    targets, shapes = (
        [TARGETS[name] for name in args.targets],
        [SHAPES[name] for name in args.shapes],
    )
    jobs = all_launches(shapes, args.operations, targets)
    keys = {(launch.name, target): key for (launch, target), key in jobs.items()}
    reports = []
    compiling = compile_all(list(jobs), reads_sass=True)
    for report in tqdm(compiling, total=len(jobs), unit="launch", smoothing=0.02):
        reports.append(report)
        if report.fault is not None:
            key = keys[report.launch, report.target]
            tqdm.write(f"{report.target}: {report.launch} ({key}): {report.fault}")
    if "sm_90" in args.targets:
        print(table(report for report in reports if report.target == "sm_90"))
    by_target = {name: [r for r in reports if r.target == name] for name in args.targets}
    for name, found in by_target.items():
        print(summary(name, found))
    counts = {
        name: {"launches": len(found), "faults": sum(r.fault is not None for r in found)}
        for name, found in by_target.items()
    }
    print_json(counts)
    return int(any(count["faults"] for count in counts.values()))


if __name__ == "__main__":
    sys.exit(command.run(main))
