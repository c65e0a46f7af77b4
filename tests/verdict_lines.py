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
ALL_LINES = "ca40c50acf64a4dca5f16b654e2bacda2abd5f6d9e2698049e5b086ab7be8596"
FEW_LINES = "82d6997837d9abfcf6241092195dc195b8b4bebffcfee18b8e86186dd8af1401"


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
