"""What every training run shares: a directory of metrics and checkpoints, and where it goes on.

    OUT/metrics.jsonl    a line every so many steps; nothing in it varies from run to run
    OUT/checkpoints/     see train/checkpoint.py
    OUT/*                the finished model, a Hugging Face directory

A run continues from the newest whole checkpoint and ends as if it had never stopped: same
parameters, same metrics. With other settings, model or data it is refused.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from engine.verdict import fingerprint_of
from models.scalar_head import ScalarModel
from models.transformer import Transformer
from models.weights import save_pretrained
from train import checkpoint

# What does not decide how a run ends: where its files are, and how often it writes.
_PLACES = frozenset({"model", "out", "log_every", "save_every"})


class Run:
    """A run under way, as a context. `first` is the number of steps done, `state` what the newest
    checkpoint was saved with, besides model and optimizer, which are put back."""

    def __init__(
        self,
        args: Any,
        model: Transformer | ScalarModel,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """args: a dataclass with model, out, steps, log_every and save_every among its fields.
        Raises ValueError for settings other than those of the checkpoint."""
        self._args, self._model, self._optimizer = args, model, optimizer
        self._settings = settings_of(asdict(args), args.model)
        self._checkpoints = args.out / "checkpoints"
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        self.state: dict[str, Any] = {"step": 0}
        if newest := checkpoint.latest(self._checkpoints):
            made_with = checkpoint.read_state(newest)["settings"]
            if made_with != self._settings:
                differ = differences(made_with, self._settings)
                raise ValueError(f"{newest} was made with other settings: {differ}")
            self.state = checkpoint.restore(newest, model, optimizer)
        self.first: int = self.state["step"]
        self._log: TextIO | None = None

    def __enter__(self) -> "Run":
        path = self._args.out / "metrics.jsonl"
        _cut_metrics(path, self.first)
        self._log = path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._log is not None
        self._log.close()

    def record(self, step: int, metrics: dict[str, Any], **state: Any) -> None:
        """After `step` steps: log and save, where it is time to. state: for the checkpoint."""
        assert self._log is not None
        if step % self._args.log_every == 0:
            self._log.write(json.dumps({"step": step, **metrics}) + "\n")
            self._log.flush()
        if step % self._args.save_every == 0 or step == self._args.steps:
            os.fsync(self._log.fileno())
            kept = {"settings": self._settings, **state}
            checkpoint.save(self._checkpoints, step, self._model, self._optimizer, kept)

    def finish(self) -> None:
        """Write the finished model, with all that its directory holds besides weights."""
        args = self._args
        for path in args.model.iterdir():
            if path.suffix in (".json", ".jinja") and not path.name.endswith(".index.json"):
                shutil.copyfile(path, args.out / path.name)
        save_pretrained(self._model, args.out)


def check_args(args: Any, *at_least_one: str) -> None:
    """Raise ValueError where one of these fields is below 1, or `out` is the model's directory."""
    for name in ("steps", "log_every", "save_every", *at_least_one):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} = {getattr(args, name)} is less than 1")
    if args.out.resolve() == args.model.resolve():
        raise ValueError(f"out is the directory of the model itself, {args.model}")


def settings_of(args: Mapping[str, Any], model: Path) -> dict[str, Any]:
    """All that decides how a run ends; of files, what they hold and not where they are."""
    settings: dict[str, Any] = {}
    for name, value in args.items():
        if name not in _PLACES:
            settings[name] = _digest(value) if isinstance(value, Path) else value
    for path in sorted(model.iterdir()):
        if path.is_file():
            settings[f"model/{path.name}"] = checkpoint.sha256(path)
    return settings


def _digest(path: Path) -> str:
    """Of a file, or of a model directory."""
    return fingerprint_of(path) if path.is_dir() else checkpoint.sha256(path)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two runs' settings, in words."""
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return ", ".join(f"{name} = {old.get(name)}, not {new.get(name)}" for name in names)


def _cut_metrics(path: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint, a torn line included."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
