"""Kernels that are packed without a GPU are those that a GPU's launches look up."""

import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench import kernel_cache
from bench.aot import compile_launch
from bench.gpu_steps import Work
from bench.ops import OPERATIONS
from bench.shapes import SHAPES
from bench.timing import empty
from kernels.launch import INTERPRETED, intercept
from kernels.target import TARGETS

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
SM_90 = TARGETS["sm_90"]
# Sizes that are multiples of 16 and sizes that are not, and one that is never told apart.
CASES = [
    next(iter(OPERATIONS[name].variants(SHAPES["qwen3-8b"], 64)))
    for name in ("merge_states", "matmul")
]
WORK = Work(
    smoke=[], model=SHAPES["qwen3-8b"], figures={"others": CASES, "grid": []}, decodes={},
    memory={}, tests=[],
)  # fmt: skip


class NoDevice:
    """As much of a driver as a launch asks before there is anything to run."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(  # in this process, which is quicker for few
        kernel_cache, "compile_all", lambda jobs: (compile_launch(each, SM_90) for each, _ in jobs)
    )
    return tmp_path / "cache"


def test_what_is_packed_is_what_launches_look_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kernels.tar.gz"
    said = kernel_cache.pack(WORK, path)
    assert said["failed"] == [] and said["folder"] == str(folder)
    with tarfile.open(path) as tar:
        suffixes = {Path(name).suffix for name in tar.getnames()}
    assert suffixes == {".cubin", ".json"}
    shutil.rmtree(folder)
    assert kernel_cache.unpack(path) > 0
    packed = sorted(each.name for each in folder.iterdir())

    looked_up: list[str] = []

    def look_up(kernel: Any, grid: Any, arguments: Any, options: dict[str, Any]) -> None:
        looked_up.append(kernel.__name__)
        kernel.run(*arguments, grid=grid, warmup=True, **options)

    monkeypatch.setattr(driver, "_active", NoDevice())
    for case in CASES:
        with intercept(look_up, SM_90), torch.inference_mode():
            case.call(*case.make_inputs(empty, 1)[0])
    assert set(looked_up) > {"_merge_states_kernel", "_matmul_kernel"}
    assert len(looked_up) == said["kernels"]
    assert sorted(each.name for each in folder.iterdir()) == packed  # nothing new was compiled
