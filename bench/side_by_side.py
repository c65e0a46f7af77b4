"""Two judges in two processes at the same time, against one after the other.

    python -m bench.side_by_side [--rows 32] [--k 32] [--threads 2] [--repeats 3]

Each process judges the same rows of the synthetic world with the pocket model on --threads threads,
after it has loaded and judged one row. Prints the median time of both at once and of one after the
other, in seconds, and their ratio: 1 where cores are shared without loss, more where threads wait
for each other. Ends in one JSON line.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from bench.provenance import print_json
from engine import command

_READY = "ready"


def work(rows: int, k: int, threads: int) -> None:
    """What one process does: says that it is ready, waits for a line, judges, and says so."""
    from engine import Judge
    from engine.sample import POCKET
    from train.world.rows import split_rows

    torch.set_num_threads(threads)
    judge = Judge.load(POCKET, dtype="float32")
    drawn = split_rows("side-by-side", "final", rows, "final")
    list(judge.rows(drawn[:1], k=k))
    print(_READY, flush=True)
    sys.stdin.readline()
    list(judge.rows(drawn, k=k))
    print("done", flush=True)


def start(args: argparse.Namespace) -> "subprocess.Popen[str]":
    """A process that is ready."""
    command = [sys.executable, "-m", "bench.side_by_side", "--work"]
    for name in ("rows", "k", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().strip() == _READY
    return process


def go(*processes: "subprocess.Popen[str]") -> float:
    """Seconds that ready processes take at once."""
    began = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert process.stdout is not None and process.stdout.readline().strip() == "done"
    seconds = time.perf_counter() - began
    for process in processes:
        process.communicate()
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("rows", 32), ("k", 32), ("threads", 2), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.work:
        work(args.rows, args.k, args.threads)
        return
    at_once, in_turn = [], []
    for _ in range(args.repeats):
        in_turn.append(go(start(args)) + go(start(args)))
        at_once.append(go(start(args), start(args)))
    seconds = statistics.median(at_once), statistics.median(in_turn)
    ratio = seconds[0] / seconds[1]
    print(f"at once {seconds[0]:.2f} s, in turn {seconds[1]:.2f} s: {ratio:.2f} times")
    print_json(
        {
            "rows": args.rows, "k": args.k, "threads": args.threads, "repeats": args.repeats,
            "at_once_s": at_once, "in_turn_s": in_turn, "ratio": ratio,
        }
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(command.run(main))
