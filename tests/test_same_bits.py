"""One hash of verdict lines: the same on every processor, in any company, with any threads."""

import os
import subprocess
import sys

import pytest
import torch

from kernels import cpp
from kernels.cpp import build
from tests.verdict_lines import ALL_LINES, FEW, FEW_LINES, ROOT, ROWS, hash_of_lines

pytestmark = pytest.mark.skipif(
    not cpp.runs_cpp(torch.zeros(1)), reason="only C++ promises bits on a CPU"
)


@pytest.mark.parametrize(("threads", "max_batch"), [(1, 256), (3, 8)])
def test_any_batch_and_any_threads(threads: int, max_batch: int) -> None:
    assert hash_of_lines(FEW, max_batch, threads) == FEW_LINES


@pytest.mark.soak
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("max_batch", [8, 256])
def test_all_lines_in_any_company(threads: int, max_batch: int) -> None:
    assert hash_of_lines(ROWS, max_batch, threads) == ALL_LINES


@pytest.mark.soak
def test_a_smaller_instruction_set_gives_the_same() -> None:
    """Built for AVX2 where the processor has more."""
    if build.instruction_set() != "avx512":
        pytest.skip("this processor has no other set")
    assert printed([sys.executable], ROWS, QUORUM_ISA="avx2") == ALL_LINES


@pytest.mark.soak
def test_arm_gives_the_same() -> None:
    """A few rows, under qemu, with the Python that tests/cpp/aarch64.sh makes."""
    folder = os.environ.get("QUORUM_AARCH64")
    if folder is None:
        pytest.skip("QUORUM_AARCH64 names no folder that tests/cpp/aarch64.sh has made")
    assert printed([f"{folder}/python"], FEW, CXX="aarch64-linux-gnu-g++") == FEW_LINES


def printed(python: list[str], rows: int, **environment: str) -> str:
    """The hash of lines that another process prints."""
    program = f"from tests.verdict_lines import *; print(hash_of_lines({rows}, 256, 2))"
    run = subprocess.run(
        [*python, "-c", program],
        cwd=ROOT, env={**os.environ, **environment}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return run.stdout.strip()
