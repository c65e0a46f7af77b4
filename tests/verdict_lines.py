"""A hash of the pocket model's verdict lines: the same on every processor."""

import hashlib
from pathlib import Path

import torch

from engine import Judge
from engine.verdict import to_line
from train.world.rows import split_rows

ROOT = Path(__file__).parents[1]
ROWS, FEW = 64, 4
# SHA-256 of the lines of 64 rows, and of the first 4, of models/pocket at k = 32 in float32. They
# change with the model, its templates and the format of lines, never with the machine.
ALL_LINES = "5241d74a8babd3a304cd92f426d506fe7d4cfa00b9cf2856a8676e2333d918de"
FEW_LINES = "4e3f51890d6cfe2f4791353498a837cd4b471b9b13d9b712d686431a099fb5bc"


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
