"""What every training run shares: its settings, and a directory of metrics and checkpoints.

    OUT/metrics.jsonl    a line every so many steps; nothing in it varies from run to run
    OUT/timings.jsonl    beside it: seconds by phase, peak memory in bytes, speed
    OUT/tensorboard/     both, where tensorboard is installed
    OUT/checkpoints/     the last few, see train/checkpoint.py
    OUT/best/            the best model of all evaluations so far, and OUT/best.json which that was
    OUT/*                the finished model, a Hugging Face directory

A run continues from the newest whole checkpoint and ends as if it had never stopped: same
parameters, same metrics. With other settings, model or data it is refused. Under torchrun the first
rank writes. (With another number of ranks or threads, device or version of torch a run continues
too, though not to the bit.)
"""

import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TextIO, TypeVar

import torch
from tqdm import tqdm

from engine import command
from models.config import read_json
from models.weights import save_pretrained
from train import checkpoint, parallel
from train.learner import Learner, LearnerArgs, M
from train.settings import MODEL_FILES, differences, settings_of

# The options of all training commands as their help shows them.
GROUPS = {
    "model": ("model", "judge", "dtype", "lora_rank", "lora_alpha"),
    "rows": ("data", "skip_easy", "judgements", "rows", "judged_rows", "split"),
    "output": ("out", "log_every", "save_every", "keep"),
    "sampling": (
        "group", "samples", "hinted", "keep_hint", "sample_only", "chunk_rows", "temperature",
        "max_new_tokens", "orders", "deterministic", "seed",
    ),
    "loss": (
        "loss", "labels", "reward", "drop_zero_spread", "clip_low", "clip_high", "beta", "kl",
        "scaling",
    ),
    "learning": (
        "steps", "lr", "warmup", "weight_decay", "clip", "step_rows", "epochs", "minibatches",
        "micro_rows", "recompute", "autocast",
    ),
    "evaluation": (
        "eval_every", "eval_data", "eval_rows", "eval_k", "eval_samples", "eval_temperature",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunArgs(LearnerArgs):
    """The settings of a run."""

    model: Path  # directory in Hugging Face layout, which training begins with
    out: Path  # directory of the finished model, the metrics and the checkpoints
    log_every: int = 20  # steps between lines of metrics
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints that are kept, the newest


A = TypeVar("A", bound=RunArgs)


class Run(Generic[M]):
    """A run under way, as a context. `first` is the number of steps done, `state` what the newest
    checkpoint was saved with, besides the learner's tensors, which are put back."""

    def __init__(self, args: RunArgs, learner: Learner[M]) -> None:
        """Raises ValueError for settings other than those of the checkpoint."""
        self._started = time.monotonic()
        self._args = args
        self._learner: Learner[M] = learner
        self._settings = settings_of(asdict(args), args.model)
        self._checkpoints = args.out / "checkpoints"
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        self.state: dict[str, Any] = {"step": 0}
        if newest := checkpoint.latest(self._checkpoints):
            made_with = checkpoint.read_state(newest)["settings"]
            if made_with != self._settings:
                differ = differences(made_with, self._settings)
                raise ValueError(f"{newest} was made with other settings: {differ}")
            self.state = checkpoint.restore(newest, learner.optimizer.tensors())
            learner.loaded()
        self.first: int = self.state["step"]
        self.judge_settings: dict[str, Any] = {}  # for the judge.json of models that are written
        self._best: dict[str, Any] | None = self.state.get("best")
        self._bar: Any = None
        self._files: list[TextIO] = []
        self._board: Any = None

    def __enter__(self) -> "Run[M]":
        if parallel.is_first():
            out = self._args.out
            if self._best is None:  # what is there is another run's, which left no checkpoint
                (out / "best.json").unlink(missing_ok=True)
                shutil.rmtree(out / "best", ignore_errors=True)
            for path in (out / "metrics.jsonl", out / "timings.jsonl"):
                _cut_metrics(path, self.first)
                self._files.append(path.open("a", encoding="utf-8"))
            self._board = _tensorboard(out / "tensorboard", self.first)
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()
        if self._board is not None:
            self._board.close()

    def steps(self) -> Iterator[int]:
        """The 0-based steps that are left, with a progress bar."""
        total = self._args.steps
        command.begin_work()
        with tqdm(
            initial=self.first, total=total, unit="step", disable=not parallel.is_first()
        ) as self._bar:
            for step in range(self.first, total):
                yield step
                self._bar.update()

    def record(
        self,
        step: int,
        metrics: dict[str, Any],
        timings: dict[str, float],
        *,
        shown: tuple[str, ...] = ("loss",),
        score: float | None = None,
        **state: Any,
    ) -> None:
        """After `step` steps: log and save, where it is time to.

        timings: seconds by phase, and what else varies from run to run. shown: the metrics beside
        the progress bar. score: what an evaluation has come to, higher is better. state: for the
        checkpoint. All ranks have to call it.
        """
        self._bar.set_postfix({name: f"{metrics[name]:.3g}" for name in shown})
        if step % self._args.log_every == 0 or score is not None:
            self._log(step, metrics, timings | {"memory": peak_memory()})
        if (
            score is not None
            and math.isfinite(score)
            and (self._best is None or score > self._best["score"])
        ):
            self._best = {"step": step, "score": score}
            self._write_model(self._args.out / "best")
            if parallel.is_first():
                text = json.dumps(self._best) + "\n"
                replace_text(self._args.out / "best.json", text)
        if step % self._args.save_every == 0 or step == self._args.steps:
            for file in self._files:
                os.fsync(file.fileno())
            kept = {"settings": self._settings, "best": self._best, **state}
            tensors = self._learner.optimizer.tensors()
            checkpoint.save(self._checkpoints, step, tensors, kept, self._args.keep)

    def _log(self, step: int, metrics: dict[str, Any], timings: dict[str, float]) -> None:
        for file, values in zip(self._files, (metrics, timings), strict=False):
            file.write(json.dumps({"step": step, **values}) + "\n")
            file.flush()
        if self._board is not None:
            for group, values in (("metrics", metrics), ("timings", timings)):
                for name, value in values.items():
                    self._board.add_scalar(f"{group}/{name}", value, step)

    def finish(self, **summary: Any) -> None:
        """Write the finished model, with all that its directory holds besides weights; and a line
        of JSON that sums the run up, with what is given."""
        self._write_model(self._args.out)
        steps = {"steps": self._args.steps, "steps_run": self._args.steps - self.first}
        seconds = {"seconds": round(time.monotonic() - self._started, 1)}
        if parallel.is_first():
            print(json.dumps(steps | summary | seconds), file=sys.stderr)

    def _write_model(self, directory: Path) -> None:
        self._learner.refresh()
        if parallel.is_first():
            directory.mkdir(exist_ok=True)
            for name in MODEL_FILES:
                if (self._args.model / name).exists():
                    shutil.copyfile(self._args.model / name, directory / name)
            # Without a judge.json a nonce would be asked for, which it has not learnt to write.
            path, began_with = directory / "judge.json", self._args.model / "judge.json"
            if self.judge_settings or not began_with.exists():
                settings = read_json(began_with) if began_with.exists() else {}
                replace_text(path, json.dumps(settings | self.judge_settings) + "\n")
            save_pretrained(self._learner.plain, directory)
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


def check_args(args: RunArgs, *at_least_one: str) -> None:
    """Raise ValueError where one of these fields is below 1, where a rate or a bound is no positive
    number, or where `out` is the model's directory."""
    for name in ("steps", "log_every", "save_every", "keep", *at_least_one):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} = {getattr(args, name)} is less than 1")
    for name in ("lr", "clip"):
        if not (getattr(args, name) > 0 and math.isfinite(getattr(args, name))):
            raise ValueError(f"{name} = {getattr(args, name)} is not a positive number")
    for name in ("warmup", "weight_decay", "lora_rank", "eval_every"):
        if getattr(args, name, 0) < 0:
            raise ValueError(f"{name} = {getattr(args, name)} is less than 0")
    if args.out.resolve() == args.model.resolve():
        raise ValueError(f"out is the directory of the model itself, {args.model}")


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _tensorboard(directory: Path, step: int) -> Any:
    """A writer of what comes after `step`, or None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=step + 1)


def _cut_metrics(path: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint, a torn line included."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    replace_text(path, "".join(kept))
