"""Training checkpoints: a directory that is whole or not there, never a pickle.

    step-00001000/ model.safetensors  optimizer.safetensors  state.json  manifest.json

Written into a temporary directory, each file fsynced, the manifest with every file's SHA-256 last,
then renamed. `latest` returns the newest directory whose hashes hold. The model file has the
trainer's own (fused) parameter layout; a Hugging Face directory is `models.weights`' business.
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


def save(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step` and drop all but the newest `keep`.

    `state` must be plain JSON. Returns the checkpoint's directory.
    """
    final = root / f"step-{step:08d}"
    temporary = root / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(dict(model.state_dict()), str(temporary / "model.safetensors"))
    moments: dict[str, torch.Tensor] = {}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            moments[f"{index}.{name}"] = value.contiguous()
    save_file(moments, str(temporary / "optimizer.safetensors"))
    (temporary / "state.json").write_text(json.dumps({"step": step, **state}))
    files = sorted(temporary.iterdir())
    manifest = {path.name: _sha256(path) for path in files}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for path in [*files, temporary / "manifest.json", temporary]:
        _fsync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _fsync(root)
    for old in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def latest(root: Path) -> Path | None:
    """The newest checkpoint whose manifest and hashes hold, or None."""
    for directory in sorted(root.glob("step-*"), reverse=True):
        manifest = directory / "manifest.json"
        if not manifest.exists():
            continue
        hashes = json.loads(manifest.read_text())
        if all(
            (directory / name).exists() and _sha256(directory / name) == digest
            for name, digest in hashes.items()
        ):
            return directory
    return None


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
    state: dict[str, Any] = json.loads((directory / "state.json").read_text())
    return state


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
