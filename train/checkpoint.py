"""Training checkpoints: a directory that is whole or not there, never a pickle.

    step-00001000/ shard-*.safetensors  state.json  manifest.json

Each rank writes its part of the tensors to a file of its own, as torch's distributed checkpoint
plans it, one tensor after another: a save needs the memory of one more tensor. Any number of ranks
can read the files. All goes into a temporary directory, the manifest with every other file's
SHA-256 last, each file fsynced, then renamed. `latest` returns the newest directory whose hashes
hold. The tensors are those of the optimizer, not a model that could be loaded.

Only what a manifest names is ever removed, or what a killed save has left. What else stands where a
checkpoint is to be written is renamed, to a name that ends in `.old`.

One run at a time: nothing here locks the directory. Ranks have to share the file system.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from models.files import read_json
from models.weights import write_tensors
from train.parallel import barrier, from_first, gather, is_first, rank

_STATE, _MANIFEST = "state.json", "manifest.json"
_CHECKPOINT = re.compile(r"step-(\d{8})")
_TORN = re.compile(r"\.step-\d{8}\.tmp")
_OWN_FILE = re.compile(r"shard-\d{5}\.safetensors|state\.json")


def save(
    root: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write the checkpoint of `step`; of the earlier ones the newest `keep` - 1 stay.

    `state` must be plain JSON, and its `settings` an object. Later checkpoints are removed: the run
    came from before them, so they are damaged. Returns the checkpoint's directory.
    """
    assert keep >= 1, keep
    final = root / f"step-{step:08d}"
    temporary = root / f".{final.name}.tmp"
    if is_first():
        for torn in root.glob(".step-*.tmp"):
            if _TORN.fullmatch(torn.name) and torn.is_dir():
                names = os.listdir(torn)
                if all(name == _MANIFEST or _OWN_FILE.fullmatch(name) for name in names):
                    _remove(torn, names)
        _set_aside(temporary)
        temporary.mkdir(parents=True)
    barrier()
    writer = _Writer(temporary)
    with _as_one_process():
        dcp.save(dict(tensors), storage_writer=writer)
    hashes = dict(gather([*writer.hashes.items()]))
    if is_first():
        _finish(root, temporary, final, hashes, {"step": step, **state}, keep)
    barrier()
    return final


class _Writer(HuggingFaceStorageWriter):
    """Its base copies all tensors of a rank before it writes them; this does not, and hashes what
    it writes."""

    def __init__(self, directory: Path) -> None:
        super().__init__(str(directory), save_distributed=True)
        self._file = directory / f"shard-{rank():05d}.safetensors"
        self.hashes: dict[str, str] = {}  # of this rank's file, by its name

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items = {item.index.fqn: item for item in plan.items}
        assert len(items) == len(plan.items), "a rank has one piece of a tensor"
        if items:
            pieces = {name: _piece(item) for name, item in items.items()}
            # What `HuggingFaceStorageReader` looks for: where each piece has its place.
            places = {name: {"saved_offsets": [*offset]} for name, (offset, _, _) in pieces.items()}

            def tensor_of(name: str) -> Tensor:
                tensor = planner.resolve_data(items[name])
                assert isinstance(tensor, Tensor)
                return tensor

            self.hashes[self._file.name] = write_tensors(
                self._file,
                {name: (dtype, shape) for name, (_, shape, dtype) in pieces.items()},
                tensor_of,
                {"DCP_SHARDING_INFO": json.dumps(places)},
            )
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done


def _piece(item: WriteItem) -> tuple[Any, Any, Any]:
    """Where a piece begins in its tensor, its shape and its dtype."""
    data = item.tensor_data
    assert data is not None, item.index
    return data.chunk.offsets, data.chunk.sizes, data.properties.dtype


def _finish(
    root: Path,
    temporary: Path,
    final: Path,
    hashes: dict[str, str],
    state: dict[str, Any],
    keep: int,
) -> None:
    """Make the temporary directory the checkpoint, and remove those that are not kept."""
    text = json.dumps(state).encode()
    (temporary / _STATE).write_bytes(text)
    manifest = {**hashes, _STATE: hashlib.sha256(text).hexdigest()}
    (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in [*sorted(temporary.iterdir()), temporary]:
        _fsync(path)
    if names := _manifest(final):
        _remove(final, names)
    _set_aside(final)
    os.replace(temporary, final)
    _fsync(root)
    found = _checkpoints(root)
    earlier = [path for path in found if path.name < final.name]
    later = [path for path in found if path.name > final.name]
    for path in [*earlier[: max(0, len(earlier) - keep + 1)], *later]:
        _remove(path, _manifest(path))


def latest(root: Path) -> Path | None:
    """The newest checkpoint whose manifest and hashes hold, or None; the same on every rank."""
    newest = None
    if is_first():
        newest = next((path for path in reversed(_checkpoints(root)) if _is_whole(path)), None)
    return from_first(newest)


def read_state(directory: Path) -> dict[str, Any]:
    """The `state` that a checkpoint was saved with, and its `step`. Raises ValueError naming the
    file where the step is another one than the directory's, or there are no settings."""
    path = directory / _STATE
    state = read_json(path)
    step, settings = state.get("step"), state.get("settings")
    if type(step) is not int or f"step-{step:08d}" != directory.name:
        raise ValueError(f"{path}: step {step!r} is not that of {directory.name}")
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: settings must be an object, not {type(settings).__name__}")
    return state


def restore(directory: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fill tensors in place; returns the saved `state` with its `step`. Raises as `read_state`."""
    state = read_state(directory)
    with _as_one_process():
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(directory)))
    return state


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _as_one_process() -> Iterator[None]:
    """One process is fine, and an error is what it is in one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise cause from None


def _checkpoints(root: Path) -> list[Path]:
    """The directories that are checkpoints, whole or damaged, the oldest first."""
    named = [path for path in root.glob("step-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(path for path in named if _manifest(path))


def _manifest(directory: Path) -> dict[str, str]:
    """The hashes of a checkpoint's files by their names; empty where there is no manifest, or one
    that names other files than a checkpoint has."""
    try:
        hashes = json.loads((directory / _MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(hashes, dict) or not all(map(_OWN_FILE.fullmatch, hashes)):
        return {}
    return hashes


def _is_whole(directory: Path) -> bool:
    hashes = _manifest(directory)
    return (
        len(hashes) > 1
        and _STATE in hashes
        and set(os.listdir(directory)) == {*hashes, _MANIFEST}
        and all(sha256(directory / name) == known for name, known in hashes.items())
    )


def _remove(directory: Path, names: Iterable[str]) -> None:
    """Remove these files and the manifest, which is the last to go, and the directory if nothing
    else is in it."""
    for name in (*names, _MANIFEST):
        (directory / name).unlink(missing_ok=True)
    with suppress(OSError):
        directory.rmdir()


def _set_aside(path: Path) -> None:
    """Rename what stands there, if anything does."""
    if os.path.lexists(path):
        names = (path.with_name(f"{path.name}.{number}.old") for number in count(1))
        os.rename(path, next(name for name in names if not os.path.lexists(name)))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
