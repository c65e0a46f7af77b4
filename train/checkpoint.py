"""Training checkpoints: a directory that is whole or not there, never a pickle.

    step-00001000/ model.safetensors  optimizer.safetensors  state.json  manifest.json

Written into a temporary directory, the manifest with every other file's SHA-256 last, each file
fsynced, then renamed. `latest` returns the newest directory whose hashes hold. The model file has
the trainer's own (fused) parameter layout; a Hugging Face directory is `models.weights`' business.

One writer at a time: nothing here locks the directory.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

_FILES = frozenset({"model.safetensors", "optimizer.safetensors", "state.json"})


def save(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step`; of the earlier ones the newest `keep` - 1 stay.

    `state` must be plain JSON. Later checkpoints are removed: the run came from before them, so
    they are damaged. Returns the checkpoint's directory.
    """
    assert keep >= 1, keep
    final = root / f"step-{step:08d}"
    for torn in root.glob(".step-*.tmp"):
        shutil.rmtree(torn)
    temporary = root / f".{final.name}.tmp"
    temporary.mkdir(parents=True)
    save_file(dict(model.state_dict()), str(temporary / "model.safetensors"))
    moments: dict[str, torch.Tensor] = {}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            moments[f"{index}.{name}"] = value.contiguous()
    save_file(moments, str(temporary / "optimizer.safetensors"))
    content = json.dumps({"step": step, **state})
    (temporary / "state.json").write_text(content, encoding="utf-8")
    manifest = {name: sha256(temporary / name) for name in sorted(_FILES)}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in [*sorted(temporary.iterdir()), temporary]:
        _fsync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _fsync(root)
    found = sorted(root.glob("step-*"))
    earlier = [path for path in found if path.name < final.name]
    later = [path for path in found if path.name > final.name]
    for path in [*earlier[: max(0, len(earlier) - keep + 1)], *later]:
        shutil.rmtree(path)
    return final


def latest(root: Path) -> Path | None:
    """The newest checkpoint whose manifest and hashes hold, or None."""
    for directory in sorted(root.glob("step-*"), reverse=True):
        if _is_whole(directory):
            return directory
    return None


def read_state(directory: Path) -> dict[str, Any]:
    """The `state` that a checkpoint was saved with, and its `step`."""
    state: dict[str, Any] = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    return state


def restore(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load model and optimizer state in place; returns the saved `state` with its `step`."""
    model.load_state_dict(load_file(str(directory / "model.safetensors")))
    packed = optimizer.state_dict()
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(str(directory / "optimizer.safetensors")).items():
        index, name = key.split(".", 1)
        slots.setdefault(int(index), {})[name] = value
    packed["state"] = slots
    optimizer.load_state_dict(packed)
    return read_state(directory)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(directory: Path) -> bool:
    manifest = directory / "manifest.json"
    if not manifest.is_file():
        return False
    try:
        hashes = json.loads(manifest.read_bytes())
    except ValueError:
        return False
    return (
        isinstance(hashes, dict)
        and hashes.keys() == _FILES
        and all(
            (directory / name).is_file() and sha256(directory / name) == hashes[name]
            for name in _FILES
        )
    )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
