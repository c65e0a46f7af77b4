"""Training checkpoints: a directory that is whole or not there, never a pickle.

    step-00001000/ shard-*.safetensors  state.json  manifest.json

Tensors are written by torch's distributed checkpoint as safetensors, a file for each rank, and can
be read by any number of ranks. All goes into a temporary directory, the manifest with every other
file's SHA-256 last, each file fsynced, then renamed. `latest` returns the newest directory whose
hashes hold. The tensors are those of the optimizer, not a model that could be loaded.

One run at a time: nothing here locks the directory. Ranks have to share the file system.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from train.parallel import barrier, from_first, is_first

_STATE, _MANIFEST = "state.json", "manifest.json"


def save(
    root: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write the checkpoint of `step`; of the earlier ones the newest `keep` - 1 stay.

    `state` must be plain JSON. Later checkpoints are removed: the run came from before them, so
    they are damaged. Returns the checkpoint's directory.
    """
    assert keep >= 1, keep
    final = root / f"step-{step:08d}"
    temporary = root / f".{final.name}.tmp"
    if is_first():
        for torn in root.glob(".step-*.tmp"):
            shutil.rmtree(torn)
        temporary.mkdir(parents=True)
    barrier()
    with _one_process_is_fine():
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        dcp.save(dict(tensors), storage_writer=writer)
    barrier()
    if is_first():
        _finish(root, temporary, final, {"step": step, **state}, keep)
    barrier()
    return final


def _finish(root: Path, temporary: Path, final: Path, state: dict[str, Any], keep: int) -> None:
    """Make the temporary directory the checkpoint, and remove those that are not kept."""
    (temporary / _STATE).write_text(json.dumps(state), encoding="utf-8")
    manifest = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
    (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
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


def latest(root: Path) -> Path | None:
    """The newest checkpoint whose manifest and hashes hold, or None; the same on every rank."""
    newest = None
    if is_first():
        found = sorted(root.glob("step-*"), reverse=True)
        newest = next((directory for directory in found if _is_whole(directory)), None)
    return from_first(newest)


def read_state(directory: Path) -> dict[str, Any]:
    """The `state` that a checkpoint was saved with, and its `step`."""
    state: dict[str, Any] = json.loads((directory / _STATE).read_text(encoding="utf-8"))
    return state


def restore(directory: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fill tensors in place; returns the saved `state` with its `step`."""
    with _one_process_is_fine():
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(directory)))
    return read_state(directory)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _is_whole(directory: Path) -> bool:
    try:
        hashes = json.loads((directory / _MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    if not isinstance(hashes, dict) or _STATE not in hashes or len(hashes) < 2:
        return False
    there = {path.name for path in directory.iterdir()}
    return there == {*hashes, _MANIFEST} and all(
        sha256(directory / name) == known for name, known in hashes.items()
    )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
