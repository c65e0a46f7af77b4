"""A hash of the pocket model's verdict lines: the same on every processor."""

import hashlib
from pathlib import Path

import torch

from engine import Judge
from engine.verdict import to_line
from train.world import BASE
from train.world.rows import split_rows

ROOT = Path(__file__).parents[1]
ROWS, FEW = 64, 4
# SHA-256 of the lines of 64 rows, and of the first 4, of models/pocket-base at k = 32 in float32.
# They change with the model, its templates and the format of lines, never with the machine.
ALL_LINES = "91e15106475c14d7f1e1fe3a0ea6644cda0520afc6161a2faba4e0dfe052f505"
FEW_LINES = "89138f3430a04a3570ced7fd11b7a61370d6bba92d64b856a1465894c9884e85"


def hash_of_lines(rows: int, max_batch: int, threads: int) -> str:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        judge = Judge.load(BASE, dtype="float32", max_batch=max_batch)
        lines = judge.rows(split_rows("same-bits", "final", rows, "final"), k=32, seed=0)
        digest = hashlib.sha256()
        for outcome in lines:
            digest.update(to_line(outcome))
    finally:
        torch.set_num_threads(before)
    return digest.hexdigest()
