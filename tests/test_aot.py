"""Every Triton kernel compiles without a device for every target, and does not spill on sm_90.

One launch of each kernel as an 8B model makes it, and every instance of attention on sm_90;
`python -m bench.aot` compiles all the rest.
"""

import ast
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from bench.aot import (
    Launch,
    Report,
    all_launches,
    compile_all,
    compile_launch,
    compiled,
    launches_of,
)
from bench.case import OpCase
from bench.ops import OPERATIONS, accept_token, rms_norm
from bench.shapes import SHAPES
from bench.timing import empty
from kernels.launch import INTERPRETED
from kernels.matmul import matmul
from kernels.target import TARGETS

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")

KERNELS = Path(__file__).parent.parent / "kernels"
SM_90 = TARGETS["sm_90"]


def names_in(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def launched_kernels() -> set[str]:
    """Names of all functions compiled by Triton that no other such function calls."""
    jitted: dict[str, ast.FunctionDef] = {}
    for path in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list
            ):
                assert node.name not in jitted, node.name
                jitted[node.name] = node
    called = set().union(*(names_in(node) - {node.name} for node in jitted.values()))
    return set(jitted) - called


@cache
def representatives() -> list[tuple[Launch, str]]:
    """One launch of each kernel for each target (in bfloat16 where it has that), for sm_90 one of
    each instance of attention."""
    found = all_launches([SHAPES["qwen3-8b"]], OPERATIONS, TARGETS.values())
    chosen: dict[tuple[object, ...], tuple[Launch, str]] = {}
    # The least special first: not the launch of a single row, whose sizes are constants.
    for launch, target in sorted(
        found, key=lambda job: ("*fp16" in job[0].name, len(job[0].constants))
    ):
        kind: tuple[object, ...] = (launch.kernel.__name__, target)
        if target == "sm_90" and launch.kernel.__name__ == "_forest_attention_kernel":
            constants = dict(launch.constants)
            kind += constants["M"], constants["SUFFIX"]
        chosen.setdefault(kind, (launch, target))
    return list(chosen.values())


def test_every_kernel_is_covered() -> None:
    covered = {(launch.kernel.__name__, target) for launch, target in representatives()}
    assert covered == {(kernel, target) for kernel in launched_kernels() for target in TARGETS}
    assert len(representatives()) <= 98


def test_every_kernel_compiles() -> None:
    found = list(compile_all(representatives()))
    assert len(found) == len(representatives())
    assert [(r.target, r.launch, r.fault) for r in found if r.fault is not None] == []
    on_nvidia = [report for report in found if report.target.startswith("sm_")]
    assert all(report.registers for report in on_nvidia)


@pytest.mark.parametrize("arch", TARGETS)
def test_a_product_is_made_of_one_instruction_for_any_number_of_rows(arch: str) -> None:
    """So that a row's sum does not depend on how many rows there are: see kernels/matmul.py."""
    target = TARGETS[arch]
    x = weight = torch.empty(4096, 4096, dtype=torch.bfloat16)
    found: dict[tuple[object, ...], set[str]] = {}
    for rows in (16, 64, 65, 4096):
        launch = launches_of(target, matmul, x[:rows], weight)[0]
        constants = dict(launch.constants)
        assembly = compiled(launch, target).asm["amdgcn" if target.is_hip else "ptx"]
        found[constants["BLOCK_M"], constants["IN_PIECES"]] = set(
            re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma\.|v_mfma)[\w.:]+", assembly)
        )
    assert len(found) == (2 if arch == "sm_100" else 3)
    (instructions,) = {frozenset(names) for names in found.values()}
    shape = {"sm_80": "m16n8k16", "sm_90": "m64n128k16", "sm_100": "cta_group", "gfx942": "32x32x8"}
    assert [shape[arch] in name for name in instructions] == [True]


def a_launch(case: OpCase) -> Launch:
    return launches_of(SM_90, case.call, *case.make_inputs(empty, 1)[0])[0]


def test_spills_are_found() -> None:
    launch = a_launch(accept_token.take(1, 0, stop_at_box=False, moves=False))
    report = compile_launch(replace(launch, options=(*launch.options, ("maxnreg", 32))), SM_90)
    assert report.error is None and report.spill_bytes
    assert report.fault == f"spills {report.spill_bytes} bytes"


def test_what_does_not_compile_is_a_fault() -> None:
    launch = a_launch(rms_norm.forward(SHAPES["qwen3-8b"], 1))
    constants = dict(launch.constants) | {"COLUMNS": 4097}
    report = compile_launch(replace(launch, constants=tuple(constants.items())), SM_90)
    assert report.fault is not None and "power of 2" in report.fault


def test_shared_memory_is_bounded_by_the_target() -> None:
    largest = TARGETS["gfx942"].shared_bytes
    assert Report("kernel", "gfx942", largest).fault is None
    fault = Report("kernel", "gfx942", largest + 1).fault
    assert fault == f"needs {largest + 1} bytes of shared memory"
    assert Report("kernel", "sm_90", largest + 1, 32, 0).fault is None
