"""Every Triton kernel compiles without a device for every target, and does not spill on sm_90.

One launch of each kernel as an 8B model makes it, and every instance of attention, for sm_90 (for
the others in the soak); `python -m bench.aot` compiles all the rest.
"""

import ast
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
from bench.decode import config_of, random_model
from bench.forests import Heads, make_decode
from bench.ops import OPERATIONS, accept_token, rms_norm
from bench.ops.forest_attention import pair
from bench.shapes import SHAPES
from bench.timing import empty
from engine.forward import CachedForward
from engine.kv_cache import KVCache
from kernels.launch import INTERPRETED, intercept
from kernels.matmul import matmul
from kernels.route import Routing
from kernels.target import TARGETS
from models.experts_config import Experts

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled"),
    pytest.mark.xdist_group("aot"),  # they share what is compiled
]

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


GRADIENTS = "_forest_attention_dq_kernel", "_forest_attention_dkv_kernel"
READ = "_forest_attention_kernel", "_merge_states_kernel", *GRADIENTS  # their machine code


@cache
def reports(arch: str) -> dict[Launch, Report]:
    """Of all launches of a target."""
    return {
        launch: compile_launch(launch, TARGETS[arch], launch.kernel.__name__ in READ)
        for launch, target in representatives()
        if target == arch
    }


def test_what_other_processes_compile() -> None:
    job = next((launch, target) for launch, target in representatives() if target == "sm_90")
    assert list(compile_all([job])) == [compile_launch(job[0], SM_90)]


def test_every_kernel_is_covered() -> None:
    covered = {(launch.kernel.__name__, target) for launch, target in representatives()}
    assert covered == {(kernel, target) for kernel in launched_kernels() for target in TARGETS}
    assert len(representatives()) <= 131


@pytest.mark.parametrize(
    "arch", [pytest.param(x, marks=[] if x == "sm_90" else pytest.mark.soak) for x in TARGETS]
)
def test_every_kernel_compiles(arch: str) -> None:
    found = list(reports(arch).values())
    assert len(found) >= 23
    assert [(r.launch, r.fault) for r in found if r.fault is not None] == []
    if arch.startswith("sm_"):
        assert all(report.usage is not None and report.usage.registers for report in found)


def test_what_runs_at_once_on_a_processor() -> None:
    """What the speed of a decode step and of attention's gradients rests on: programs of a
    processor, and loads that do not wait for one another."""
    needs: dict[str, Report] = {}
    for launch, report in reports("sm_90").items():
        constants, kernel = dict(launch.constants), launch.kernel.__name__
        if kernel == "_forest_attention_kernel":
            kernel = "suffix" if constants["SUFFIX"] else str(constants["M"])
        elif kernel not in ("_merge_states_kernel", "_norm_rope_write_kernel"):
            continue
        needs[kernel] = report
    found = {name: report.per_processor or 0 for name, report in needs.items()}
    assert found.pop("_norm_rope_write_kernel") >= 8
    assert found == {"suffix": 3, "16": 2, "64": 2, "128": 1, "_merge_states_kernel": 32}
    merge = needs["_merge_states_kernel"].sass
    assert merge is not None and merge.loads >= 16
    attention = [needs[name].sass for name in ("suffix", "16", "64", "128")]
    assert all(sass is not None and sass.groups_ahead == 2 for sass in attention)


def test_gradients_of_attention_load_ahead() -> None:
    compiled_for = reports("sm_90")
    jobs = [launch for launch in compiled_for if launch.kernel.__name__ in GRADIENTS]
    assert len(jobs) == 2
    for launch in jobs:
        sass = compiled_for[launch].sass
        assert sass is not None and sass.groups_ahead is not None and sass.groups_ahead >= 2
        two = dict(launch.options) | {"num_stages": 2}
        sass = compile_launch(replace(launch, options=tuple(two.items())), SM_90, True).sass
        assert sass is not None and sass.groups_ahead == 0  # the measure tells the two apart


DENSE = {"product": 4, "_gated_act_kernel": 1}
# One to choose, one to sort, two products and their sum.
SPARSE = {"product": 2, "_route_kernel": 1, "_group_kernel": 1, "_experts_kernel": 2}
SPARSE |= {"_mix_kernel": 1}


@pytest.mark.parametrize("block", [DENSE, SPARSE], ids=["dense", "experts"])
def test_a_layer_of_a_decode_step(block: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """So many launches of ours and matrix products, beside what does not grow with layers."""

    def launches(layers: int) -> Counter[str]:
        counts: Counter[str] = Counter()

        def record(kernel: Any, *_: Any) -> None:
            counts[kernel.__name__] += 1

        def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            counts["product"] += 1
            return x.new_zeros(len(x), len(weight))

        shape = replace(SHAPES["qwen3-8b"], num_layers=layers, hidden_size=256, vocab_size=64)
        if block is SPARSE:
            shape = replace(shape, experts=Experts(8, 64, Routing(2)))
        work = make_decode(pair(32, 600, 300), Heads.of(shape), layers, empty)
        config = config_of(shape, 1024)
        model = random_model(config, torch.bfloat16, torch.device("cpu"))
        cache = KVCache(config, 32, 512, 1024, torch.bfloat16, torch.device("cpu"))
        monkeypatch.setattr(F, "linear", product)
        zeros = torch.zeros(32, dtype=torch.int64)
        with intercept(record, SM_90), torch.inference_mode():
            CachedForward(model, cache).forward(zeros, work.plan.positions, zeros, work.plan)
        return counts

    assert launches(2) - launches(1) == {
        "_rms_norm_kernel": 2,
        "_norm_rope_write_kernel": 1,
        "_forest_attention_kernel": 2,  # the shared prompt, and the suffixes beside it
        "_merge_states_kernel": 1,
        **block,
    }


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
    assert report.usage is not None and report.usage.spill_bytes
    assert report.fault == f"spills {report.usage.spill_bytes} bytes"


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
    assert Report("kernel", "sm_90", largest + 1).fault is None
