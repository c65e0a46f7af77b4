"""`python -m engine.cluster`: many rows, judged on many machines with Ray Data.

Rows are cut into blocks (`engine/blocks.py`). Each worker is an actor of Ray with a judge of its
own, and takes one block after another. The directories of the rows, of the model and OUT have to be
the same on all machines. `OUT/verdicts.jsonl` is, byte for byte, what `engine.sample --out` writes
where a row's line does not depend on its batch: in float32 on CPUs, and on GPUs of one kind with
--deterministic.

Without a cluster (RAY_ADDRESS, or `ray start` on this machine) Ray runs on this machine alone.

A worker that dies loses the block that it was at, and Ray starts another. The same command
continues a run that was stopped. The first SIGINT, SIGTERM or SIGHUP lets the blocks under way
finish for --drain-seconds. The exit status is that of `engine.sample`.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `Drain`: no traceback of half an import

import json
import logging
import os
import pickle
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine import command, sample
from engine.blocks import Block, BlockDirectory, BlockJudge, Report, Work, plan
from engine.sample import Drain, Interrupted, RowOptions, first_prompt, in_vain, summary_of
from engine.summary import Tally

GROUPS = sample.GROUPS | {
    "output": ("out", "drain_seconds", "show_prompt"),
    "workers": ("workers", "cpus", "block_rows"),
}
EXAMPLE = "--model DIR --data rows.jsonl --out runs/verdicts --workers 8 --k 32"
Outcome = Report | str  # of a block; a string is an error
# Judges blocks, in any order; yields no outcome of those that were not begun.
Run = Callable[[Work, Sequence[Block]], Iterator[Outcome]]


@dataclass(frozen=True)
class Options(RowOptions):
    """Judge many rows on many machines with Ray: k judgements a row, then a vote."""

    out: Path | None = None
    """Directory for the verdicts; where an earlier run of the same rows and options was stopped, it
    is continued."""
    workers: int | None = None
    """Judges; by default one for each GPU of the cluster, or --cpus processors."""
    cpus: int = 1
    """Processors that a worker takes, each for a thread."""
    block_rows: int = 256
    """Rows that a worker judges and commits together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("workers", "cpus", "block_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value} is less than 1")


def main(arguments: Sequence[str] | None = None, prog: str = "python -m engine.cluster") -> int:
    """Run the command line and return its exit status."""
    return command.run(lambda: _judge(arguments, prog))


def _judge(arguments: Sequence[str] | None, prog: str) -> int:
    options = command.parse(Options, GROUPS, prog=prog, example=EXAMPLE, arguments=arguments)
    if options.show_prompt:
        with ExitStack() as stack:
            print(first_prompt(options, stack))
        return 0
    if options.out is None:
        raise ValueError("--out DIR is needed")
    if options.data == "-":
        raise ValueError("--data - cannot be read by every worker: give a file or a directory")
    with on_ray(options) as run:
        status, summary = judge(options, options.out, run)
    if summary is not None:
        print(json.dumps(summary), file=sys.stderr)
        if status == 3:
            print(in_vain(summary), file=sys.stderr)
    return status


def judge(options: Options, out: Path, run: Run) -> tuple[int, dict[str, Any] | None]:
    """Have all blocks judged by `run`, and join them; the exit status, and what the closing summary
    is made of, None where no row was to be judged."""
    work = Work(options, out.absolute(), options.block_rows)
    with ExitStack() as stack:
        folder = stack.enter_context(closing(BlockDirectory(work.out)))
        drain = stack.enter_context(closing(Drain(options.drain_seconds, folder.stop)))
        try:
            with drain.loading():
                blocks = plan(work.entries(), options.block_rows)
                folder.claim(blocks, options.block_rows)
        except Interrupted:
            assert drain.signal is not None
            return 128 + drain.signal, None
        start = time.perf_counter()
        reports = _reports(run(work, blocks), blocks, drain)
        if len(reports) == len(blocks):
            folder.join(blocks)
        elif drain.signal is None:
            raise OSError(f"blocks without an outcome: {len(blocks) - len(reports)}")
        seconds = time.perf_counter() - start
        tally, usage = Tally(), Counter[str](prefill_tokens=0, decode_tokens=0, idle_tokens=0)
        for _, report in sorted(reports.items()):  # in the order of the rows, as one process counts
            tally += report.tally
            usage.update(report.usage)
        naive_tokens = sum(report.naive_tokens for report in reports.values())
        is_cut = drain.signal is not None
        summary = summary_of(tally, dict(usage), naive_tokens, seconds, is_cut)
        summary |= {"blocks": len(blocks), "blocks_done": len(reports)}
        if drain.signal is not None:
            return 128 + drain.signal, summary
        return 3 if tally.is_in_vain else 1 if tally.errors else 0, summary


def _reports(
    outcomes: Iterator[Outcome], blocks: Sequence[Block], drain: Drain
) -> dict[int, Report]:
    """The reports by their block, in the order in which they came; raises ValueError for the first
    error of a worker."""
    found: dict[int, Report] = {}
    total = sum(block.rows for block in blocks)
    with tqdm(total=total, unit="row", disable=None) as bar:
        while (outcome := drain.judge(outcomes)) is not None:
            if isinstance(outcome, str):
                raise ValueError(outcome)
            command.begin_work()  # the options and the model are in order
            found[outcome.block.number] = outcome
            bar.update(outcome.block.rows)
    return found


# -- Ray -------------------------------------------------------------------------------------------


@contextmanager
def on_ray(options: Options) -> Iterator[Run]:
    """Connect to Ray; yields what judges blocks there, in any order. Raises ValueError where Ray is
    not installed, or the cluster has not what the options ask for."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f"engine.cluster needs the package ray[data]: {error}") from None
    ray.init(logging_level="WARNING")
    try:
        workers, gpus = room(options, ray.cluster_resources())
        # One block at a time: a worker that dies, or is slow, holds no other.
        pool = ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1)
        place = {"compute": pool, "num_cpus": options.cpus, "num_gpus": gpus}
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)

        def run(work: Work, blocks: Sequence[Block]) -> Iterator[Outcome]:
            if not blocks:
                return
            items = [{"number": b.number, "rows": b.rows, "digest": b.digest} for b in blocks]
            # A block of Ray for each of ours: the unit that it gives a worker, and gives again.
            reports = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                _Worker, fn_constructor_args=(work, os.getcwd()), batch_size=1, **place
            )
            try:
                for row in reports.iter_rows():
                    if (outcome := pickle.loads(row["outcome"])) is not None:
                        yield outcome
            except ray.exceptions.RayError as error:
                raise OSError(f"a worker failed: {error}") from None

        yield run
    finally:
        ray.shutdown()


def room(options: Options, resources: Mapping[str, float]) -> tuple[int, int]:
    """How many workers there are, and how many GPUs each takes. resources: those of the cluster, as
    Ray counts them. Raises ValueError where they do not suffice."""
    gpus = 0 if options.device == "cpu" else int(resources.get("GPU", 0))
    cpus = int(resources.get("CPU", 0))
    on_gpus = gpus > 0 or options.device == "cuda"
    most = min(cpus // options.cpus, gpus) if on_gpus else cpus // options.cpus
    workers = options.workers or most
    if not 1 <= workers <= most:
        raise ValueError(
            f"the cluster has room for {most} workers of {options.cpus} processors "
            f"({cpus} processors, {gpus} GPUs), not for {max(workers, 1)}"
        )
    return workers, int(on_gpus)


class _Worker:
    """What an actor runs: a judge, loaded at its first block. Errors that are the user's are
    outcomes, which stop the run with a line; of others Ray tells where they were raised."""

    def __init__(self, work: Work, folder: str) -> None:
        """folder: what paths are relative to."""
        self._work, self._folder = work, folder
        self._judge: BlockJudge | None = None
        warnings.filterwarnings("ignore", "line .* the judge does not see")  # said once, elsewhere

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        number, rows, digest = (batch[name][0] for name in ("number", "rows", "digest"))
        outcome: Outcome | None
        try:
            if self._judge is None:
                os.chdir(self._folder)
                self._judge = self._work.load()
            outcome = self._judge(Block(int(number), int(rows), str(digest)))
        except (ValueError, OSError, FloatingPointError) as error:
            outcome = str(error) or type(error).__name__
        return {"outcome": [pickle.dumps(outcome)]}


if __name__ == "__main__":
    # By its name: workers would not find what this module defines as __main__.
    sys.exit(import_module("engine.cluster").main())
