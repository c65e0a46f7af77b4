"""The settings that decide how a run ends, and how two runs differ in them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.key import model_fingerprint
from train import checkpoint

# What a model directory holds besides weights.
MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "judge.json",
    "judge_template.jinja",
)  # fmt: skip
# What does not decide how a run ends: where its files are, how often it writes, how it saves room.
_PLACES = frozenset({"model", "out", "log_every", "save_every", "keep", "recompute"})


def check_at_least(least: float, args: object, *names: str) -> None:
    """Raise ValueError where one of these settings is less."""
    for name in names:
        if getattr(args, name) < least:
            raise ValueError(f"{name} = {getattr(args, name)} is less than {least}")


def check_positive(args: object, *names: str) -> None:
    """Raise ValueError where one of these settings is no positive number."""
    for name in names:
        value = getattr(args, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} = {value} is not a positive number")


def settings_of(args: Mapping[str, Any], model: Path) -> dict[str, Any]:
    """All settings that decide how a run ends; of files, what they hold and not where they are."""
    settings: dict[str, Any] = {}
    for name, value in args.items():
        if name not in _PLACES:
            value = list(value) if isinstance(value, tuple) else value  # as JSON reads it back
            settings[name] = _digest(value) if isinstance(value, Path) else value
    for path in sorted(model.iterdir()):
        if path.name in MODEL_FILES or ".safetensors" in path.suffixes:
            settings[f"model/{path.name}"] = checkpoint.sha256(path)
    return settings


def _digest(path: Path) -> str:
    """Of a file, or of a model directory."""
    return model_fingerprint(path) if path.is_dir() else checkpoint.sha256(path)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two runs' settings, in words."""
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return ", ".join(f"{name} = {old.get(name)}, not {new.get(name)}" for name in names)
