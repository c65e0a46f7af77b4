"""One hash of verdict lines: the same on every processor, in any company, with any threads."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import Judge
from engine.verdict import to_line
from kernels import cpp
from kernels.cpp import build
from train.rollout import split_rows

ROOT = Path(__file__).parents[1]
ROWS, FEW = 64, 4
# SHA-256 of the lines of 64 rows, and of the first 4, of models/pocket at k = 32 in float32. They
# change with the model, its templates and the format of lines, never with the machine.
ALL_LINES = "7170c63469322065b96116e06532e5a8e853358754ce12a575475f22d8b4769e"
FEW_LINES = "fe1e7731c6dbbee0a2b2f6f0894702d1f06d1982f3fec6fbe53ddacdc7a2044c"

pytestmark = pytest.mark.skipif(
    not cpp.runs_cpp(torch.zeros(1)), reason="only C++ promises bits on a CPU"
)


def hash_of_lines(rows: int, max_batch: int, threads: int) -> str:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        judge = Judge.load(ROOT / "models/pocket", dtype="float32", max_batch=max_batch)
        lines = judge.rows(split_rows("same-bits", "final", rows, "final"), k=32, seed=0)
        digest = hashlib.sha256()
        for outcome in lines:
            digest.update(to_line(outcome))
    finally:
        torch.set_num_threads(before)
    return digest.hexdigest()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("max_batch", [8, 256])
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
    program = f"from tests.test_same_bits import *; print(hash_of_lines({ROWS}, 256, 2))"
    environment = {**os.environ, "QUORUM_ISA": "avx2"}
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout.strip() == ALL_LINES
