"""A hash of the pocket model's verdict lines: the same on every processor."""

import hashlib
from pathlib import Path

import torch

from engine import Judge
from engine.verdict import to_line
from train.rollout import split_rows

ROOT = Path(__file__).parents[1]
ROWS, FEW = 64, 4
# SHA-256 of the lines of 64 rows, and of the first 4, of models/pocket at k = 32 in float32. They
# change with the model, its templates and the format of lines, never with the machine.
ALL_LINES = "e706e4e5f250254480082df2d7563086bd6bab59a6e87afabfa4659f36f2c317"
FEW_LINES = "4a90560a139d38859750becd8003c4cdeda5c00acb1028d62ea4bb81e394f766"


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
