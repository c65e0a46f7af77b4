"""The runs of `test_resume.py`, as each of several processes runs them under torchrun:

torchrun --nproc-per-node 2 -m tests.two_ranks DIR NAME...
"""

import sys
from pathlib import Path

from tests.test_resume import run_in
from train import parallel

if __name__ == "__main__":
    root = Path(sys.argv[1])
    with parallel.ranks():
        for name in sys.argv[2:]:
            run_in(root / name, name)
