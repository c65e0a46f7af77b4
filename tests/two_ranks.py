"""The runs of `test_resume.py`, as each of several processes runs them under torchrun:

torchrun --nproc-per-node 2 -m tests.two_ranks DIR
"""

import sys
from dataclasses import replace
from pathlib import Path

from tests.test_resume import ROUNDED, RUNS, SAMPLED, TRAIN
from train import parallel, rft, sft

if __name__ == "__main__":
    root = Path(sys.argv[1])
    with parallel.ranks():
        for name, args in RUNS.items():
            TRAIN[name](replace(args, out=root / name))
        sft.train(replace(ROUNDED, out=root / "rounded"))
        rft.sample(replace(SAMPLED, out=root / "rft"))
