"""The runs of `test_resume.py`, as each of several processes runs them under torchrun:

torchrun --nproc-per-node 2 -m tests.two_ranks DIR
"""

import sys
from pathlib import Path

from engine.command import with_values
from tests.test_resume import ROUNDED, RUNS, SAMPLED, TRAIN
from train import parallel, rft, sft

if __name__ == "__main__":
    root = Path(sys.argv[1])
    with parallel.ranks():
        for name, args in RUNS.items():
            TRAIN[name](with_values(args, out=root / name))
        sft.train(with_values(ROUNDED, out=root / "rounded"))
        rft.sample(with_values(SAMPLED, out=root / "rft"))
