"""What every training run shares: its settings, and a directory of metrics and checkpoints.

    OUT/metrics.jsonl    a line every so many steps; nothing in it varies from run to run
    OUT/timings.jsonl    beside it: seconds by phase, peak memory in bytes, speed
    OUT/tensorboard/     both, where tensorboard is installed
    OUT/checkpoints/     the last few, see train/checkpoint.py
    OUT/best/            the best model of all evaluations so far, and OUT/best.json which that was
    OUT/*                the finished model, a Hugging Face directory
    OUT/adapter/         with --lora-rank: its adapters, as peft loads them

A run continues from the newest whole checkpoint and ends as if it had never stopped: same
parameters, same metrics. With other settings, model or data it is refused; but one that is finished
may go on to more steps. Whose directory OUT is, is told in train/directory.py. Under torchrun the
first rank writes. (With another number of ranks or threads, device or version of torch a run
continues too, though not to the bit.)
"""

import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TextIO, TypeVar

import torch
from tqdm import tqdm

from engine import command
from engine.options import PromptOptions
from engine.stopping import Stopped, Stopping
from models.files import read_json
from models.weights import replace_file
from train import checkpoint, parallel
from train.directory import RunDirectory, replace_text
from train.evaluation import EvalArgs
from train.learner import Learner, LearnerArgs, M
from train.settings import MODEL_FILES, check_at_least, differences, settings_of

# The options of training commands that are in no group of their own, as their help shows them.
GROUPS = {
    "model": ("model", "judge"),
    "rows": ("data", "skip_easy", "judgements", "rows", "judged_rows"),
    "judgements": (
        "group",
        "samples",
        "hinted",
        "keep_hint",
        "rejection",
        "chunk_rows",
        "sample_only",
    ),
    "loss": ("reads", "labels", "loss"),
    "work": ("out", "step_rows", "micro_rows", "autocast"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LogArgs:
    """When a run writes."""

    log_every: int = 20  # steps between lines of metrics
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints that are kept, the newest

    def __post_init__(self) -> None:
        check_at_least(1, self, "log_every", "save_every", "keep")


@dataclass(frozen=True, kw_only=True)
class RunArgs:
    """The settings of a run."""

    command: ClassVar[str]  # whose run it is
    model: Path  # directory in Hugging Face layout, which training begins with
    out: Path  # directory of the finished model, the metrics and the checkpoints
    prompts: PromptOptions = PromptOptions()
    learning: LearnerArgs = LearnerArgs()
    evaluation: EvalArgs = EvalArgs()
    logging: LogArgs = LogArgs()

    def __post_init__(self) -> None:
        if self.out.resolve() == self.model.resolve():
            raise ValueError(f"out is the directory of the model itself, {self.model}")


A = TypeVar("A", bound=RunArgs)


class Run(Generic[M]):
    """A run under way, as a context. `first` is the number of steps done."""

    def __init__(self, args: RunArgs, learner: Learner[M]) -> None:
        """Raises ValueError for settings other than those of the checkpoint, for a directory that
        is not this run's, and for one whose checkpoints are gone."""
        self._started = time.monotonic()
        self._args = args
        self._learner: Learner[M] = learner
        self._settings = settings_of(command.flat(args), args.model)
        self._checkpoints = args.out / "checkpoints"
        self._directory: RunDirectory | None = None
        with ExitStack() as stack:
            if parallel.is_first():
                self._directory = RunDirectory(args.out, args.command)
                stack.enter_context(closing(self._directory))
            parallel.barrier()
            state = self._resume()
            self._stack = stack.pop_all()
        self.first: int = state["step"]
        # For the judge.json of models that are written.
        self.judge_settings: dict[str, Any] = state.get("judge_settings", {})
        self._best: dict[str, Any] | None = state.get("best")
        self._since_best: int = state.get("since_best", 0)
        self._steps_run = 0
        self._bar: Any = None
        self._files: list[TextIO] = []
        self._board: Any = None
        self._stopping = Stopping()

    def _resume(self) -> dict[str, Any]:
        """Put the newest checkpoint's tensors back; returns its state, or that of a beginning."""
        self._checkpoints.mkdir(exist_ok=True)
        newest = checkpoint.latest(self._checkpoints)
        if newest is None:
            if self._directory is not None and self._directory.was_saved:
                raise ValueError(
                    f"{self._checkpoints} has no whole checkpoint any more: "
                    "begin in another directory"
                )
            return {"step": 0}
        state = checkpoint.read_state(newest)
        self._check_settings(newest, state)
        checkpoint.restore(newest, self._learner.optimizer.tensors())
        self._learner.loaded()
        return state

    def _check_settings(self, newest: Path, state: dict[str, Any]) -> None:
        made_with, now = state["settings"], self._settings
        if made_with == now:
            return
        is_finished = state["step"] == made_with["steps"] < now["steps"]
        if not (is_finished and made_with | {"steps": now["steps"]} == now):
            differ = differences(made_with, now)
            raise ValueError(f"{newest} was made with other settings: {differ}")
        self._say(
            f"a finished run of {made_with['steps']} steps goes on to {now['steps']}, "
            "with the learning rates of a run of so many"
        )

    def __enter__(self) -> "Run[M]":
        if parallel.is_first():
            out = self._args.out
            # A run that was killed before its first checkpoint may have left one.
            if self._best is None:
                (out / "best.json").unlink(missing_ok=True)
            for path in (out / "metrics.jsonl", out / "timings.jsonl"):
                _cut_metrics(path, self.first)
                self._files.append(self._stack.enter_context(path.open("a", encoding="utf-8")))
            self._board = _tensorboard(out / "tensorboard", self.first)
            if self._board is not None:
                self._stack.enter_context(closing(self._board))
        self._stack.enter_context(self._stopping)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def steps(self) -> Iterator[int]:
        """The 0-based steps that are left, with a progress bar on a terminal."""
        total = self._args.learning.steps
        command.begin_work()
        with tqdm(
            initial=self.first, total=total, unit="step",
            disable=None if parallel.is_first() else True,
        ) as self._bar:  # fmt: skip
            for step in range(self.first, total):
                if self._is_exhausted:
                    return
                self._steps_run += 1
                yield step
                self._bar.update()

    @property
    def _is_exhausted(self) -> bool:
        return 0 < self._args.evaluation.patience <= self._since_best

    def record(
        self,
        step: int,
        metrics: dict[str, Any],
        timings: dict[str, float],
        *,
        shown: tuple[str, ...] = ("loss",),
        score: float | None = None,
    ) -> None:
        """After `step` steps: log and save, where it is time to.

        timings: seconds by phase, and what else varies from run to run. shown: the metrics that a
        person is told. score: what an evaluation has come to, higher is better. All ranks have to
        call it. Raises Stopped, with all saved, after a signal.
        """
        logging = self._args.logging
        if step % logging.log_every == 0 or score is not None:
            self._log(step, metrics, timings | {"memory": peak_memory()})
            told = {name: metrics[name] for name in shown if name in metrics}
            told |= {name: metrics[name] for name in metrics if name.startswith("dev_")}
            words = [f"{name} {value:.4g}" for name, value in told.items()]
            passed = f"{time.monotonic() - self._started:.0f} s"
            self._say(f"step {step}/{self._args.learning.steps}", *words, passed)
        if score is not None:
            self._rate(step, score)
        stops = any(parallel.gather([self._stopping.number is not None]))
        is_last = step == self._args.learning.steps or self._is_exhausted
        if step and (step % logging.save_every == 0 or is_last or stops):
            self._save(step)
        if stops:
            where = f"saved after step {step}" if step else "nothing is done yet"
            self._say(f"stopped, {where}: the same command continues")
            raise Stopped(self._stopping.number or signal.SIGTERM)

    def _rate(self, step: int, score: float) -> None:
        """Keep the model, if it is the best so far; of equals the last."""
        best = -math.inf if self._best is None else self._best["score"]
        self._since_best += 1
        if math.isfinite(score) and score >= best:
            if score > best:
                self._since_best = 0
            self._best = {"step": step, "score": score}
            self._write_model(self._args.out / "best")
            if parallel.is_first():
                replace_text(self._args.out / "best.json", json.dumps(self._best) + "\n")

    def _save(self, step: int) -> None:
        for file in self._files:
            os.fsync(file.fileno())
        kept = {
            "settings": self._settings,
            "judge_settings": self.judge_settings,
            "best": self._best,
            "since_best": self._since_best,
        }
        tensors = self._learner.optimizer.tensors()
        checkpoint.save(self._checkpoints, step, tensors, kept, self._args.logging.keep)
        if self._directory is not None:
            self._directory.saved()

    def _log(self, step: int, metrics: dict[str, Any], timings: dict[str, float]) -> None:
        for file, values in zip(self._files, (metrics, timings), strict=False):
            file.write(json.dumps({"step": step, **values}) + "\n")
            file.flush()
        if self._board is not None:
            for group, values in (("metrics", metrics), ("timings", timings)):
                for name, value in values.items():
                    self._board.add_scalar(f"{group}/{name}", value, step)

    def _say(self, *words: str) -> None:
        if parallel.is_first():
            tqdm.write("  ".join(words), file=sys.stderr)

    def finish(self, **summary: Any) -> None:
        """Write the finished model, with all that its directory holds besides weights; and a line
        of JSON that sums the run up, with what is given."""
        self._write_model(self._args.out)
        steps = {"steps": self._args.learning.steps, "steps_run": self._steps_run}
        seconds = {"seconds": round(time.monotonic() - self._started, 1)}
        if parallel.is_first():
            print(json.dumps(steps | {"best": self._best} | summary | seconds), file=sys.stderr)

    def _write_model(self, directory: Path) -> None:
        if parallel.is_first():
            directory.mkdir(exist_ok=True)
            args, prompts = self._args, self._args.prompts
            sources = {name: args.model / name for name in MODEL_FILES}
            sources |= {
                name: path for name, path in (
                    ("judge_template.jinja", prompts.template),
                    ("chat_template.jinja", prompts.chat_template),
                ) if path is not None
            }  # fmt: skip
            for name, path in sources.items():
                if path.exists():
                    shutil.copyfile(path, directory / name)
            # Without a judge.json a nonce would be asked for, which it has not learnt to write.
            began_with = args.model / "judge.json"
            settings = read_json(began_with) if began_with.exists() else {}
            settings |= prompts.settings | self.judge_settings
            if settings or not began_with.exists():
                replace_text(directory / "judge.json", json.dumps(settings) + "\n")
        self._learner.save(directory, self._args.model)
        parallel.barrier()


def command_line(
    settings: type[A],
    train: Callable[[A], None],
    *,
    prog: str,
    example: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """Train with the settings of the command line, as one of torchrun's ranks if it is one. Returns
    the exit status; what it is, and prog and example, are told in engine/command.py."""

    def run() -> None:
        args = command.parse(
            settings, GROUPS, prog=prog, example=example, arguments=arguments, flags_in_pairs=True
        )
        with parallel.ranks():
            train(args)

    return command.run(run)


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        """What has passed since the last lap belongs to this phase."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def peak_memory() -> int:
    """The most bytes that this process has had so far: of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _tensorboard(directory: Path, step: int) -> Any:
    """A writer of what comes after `step`, or None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=step + 1)


def _cut_metrics(path: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint, a torn line included. Raises
    ValueError naming file and line where one is no line of a run."""
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            logged = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}, is no line of a run") from None
        if logged:
            kept.append(line)
    replace_file(path, lambda temporary: temporary.write_bytes(b"".join(kept)))
