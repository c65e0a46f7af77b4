"""Checkpoints: whole or not there, restored to the bit, the good ones never thrown away."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from train import checkpoint
from train.optimizer import Optimizer

SHARD = "shard-00000.safetensors"


def make(seed: int = 0) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 2))
    return model, Optimizer(model, 0.1)


def bits(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    tensors = [*model.state_dict().values(), *optimizer.tensors().values()]
    return [tensor.tolist() for tensor in tensors]


def save(root: Path, number: int, state: dict[str, Any] | None = None, keep: int = 2) -> Path:
    state = {"settings": {}, **(state or {})}
    return checkpoint.save(root, number, make()[1].tensors(), state, keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_run_continues_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of bfloat16 it is the float32 masters that count."""

    def made(seed: int) -> tuple[nn.Module, Optimizer]:
        model = make(seed)[0].to(dtype)
        return model, Optimizer(model, 0.1)

    def one(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step(1e-3, 1e9, 0.0)

    model, optimizer = made(0)
    for seed in range(3):
        one(model, optimizer, seed)
    state = {"settings": {"lr": 0.1}, "tokens": 12}
    saved = checkpoint.save(tmp_path, 3, optimizer.tensors(), state)
    assert checkpoint.latest(tmp_path) == saved == tmp_path / "step-00000003"
    assert checkpoint.read_state(saved) == {"step": 3, **state}
    at_save = bits(model, optimizer)

    other, other_optimizer = made(9)
    assert checkpoint.restore(saved, other_optimizer.tensors()) == {"step": 3, **state}
    other_optimizer.loaded()
    assert bits(other, other_optimizer) == at_save
    for seed in range(3, 6):
        one(model, optimizer, seed)
        one(other, other_optimizer, seed)
    assert bits(other, other_optimizer) == bits(model, optimizer) != at_save


def test_the_newest_are_kept_and_nothing_else_is_left(tmp_path: Path) -> None:
    torn = tmp_path / ".step-00000001.tmp"  # left by a killed run
    torn.mkdir()
    for name in (SHARD, "state.json", "manifest.json"):
        (torn / name).write_bytes(b"{")
    for number in (1, 2, 10):
        save(tmp_path, number, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000010"]
    save(tmp_path, 10, {"again": True}, keep=1)
    assert os.listdir(tmp_path) == ["step-00000010"]
    again = {"step": 10, "settings": {}, "again": True}
    assert checkpoint.read_state(tmp_path / "step-00000010") == again


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_manifest(change: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        path = directory / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda d: (d / "manifest.json").unlink(),
    "torn manifest": lambda d: (d / "manifest.json").write_text('{"model.safe'),
    "binary manifest": lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe\0"),
    "manifest of another kind": lambda d: (d / "manifest.json").write_text("[]"),
    "empty manifest": lambda d: (d / "manifest.json").write_text("{}"),
    "manifest without the tensors": edit_manifest(lambda m: m.pop(SHARD)),
    "another hash": edit_manifest(lambda m: m.update({"state.json": "0" * 64})),
    "no tensors": lambda d: (d / SHARD).unlink(),
    "truncated tensors": lambda d: os.truncate(d / SHARD, 100),
    "a flipped bit": lambda d: flip(d / SHARD),
    "empty tensors": lambda d: os.truncate(d / SHARD, 0),
    "tensors of another rank": lambda d: (d / "shard-00002.safetensors").write_bytes(b""),
    "a file of someone else": lambda d: (d / "notes.txt").write_text("mine"),
    "manifest of more": edit_manifest(lambda m: m.update({"../step-00000005/state.json": ""})),
    "edited state": lambda d: (d / "state.json").write_text('{"step": 70}'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_ignored(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    assert checkpoint.latest(tmp_path) is None
    for number in (5, 6, 7):
        save(tmp_path, number, keep=3)
    damage(tmp_path / "step-00000007")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000006"
    damage(tmp_path / "step-00000006")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000005"
    damage(tmp_path / "step-00000005")
    assert checkpoint.latest(tmp_path) is None


def test_damaged_checkpoints_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    """A run that goes on from step 5, because 8 and 9 are damaged, keeps 5 and what it saves."""
    for number in (5, 8, 9):
        save(tmp_path, number, keep=3)
    for number in (8, 9):
        flip(tmp_path / f"step-{number:08d}" / SHARD)
    save(tmp_path, 6, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000005", "step-00000006"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000006"


@pytest.mark.parametrize("when", ["write_tensors", "_fsync", "replace"])
def test_a_save_that_dies_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    save(tmp_path, 1)

    def die(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os if when == "replace" else checkpoint, when, die)
        with pytest.raises(OSError, match="disk full"):
            save(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000001"
    save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]


def directory_of_another(manifest: str | None = None) -> Callable[[Path], object]:
    def put(path: Path) -> None:
        path.mkdir()
        (path / "thesis.tex").write_text("mine")
        if manifest is not None:
            (path / "manifest.json").write_text(manifest)

    return put


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a directory": directory_of_another(),
    "a file": lambda path: path.write_text("mine"),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "another manifest": directory_of_another('{"thesis.tex": "", "state.json": ""}'),
    "a manifest that leaves the directory": directory_of_another('{"../step-zzz": ""}'),
}


def tree(path: Path) -> object:
    """All that stands somewhere."""
    if path.is_symlink():
        return os.readlink(path)
    if not path.is_dir():
        return path.read_bytes()
    return {each.name: tree(each) for each in path.iterdir()}


@pytest.mark.parametrize("put", FOREIGN.values(), ids=FOREIGN.keys())
@pytest.mark.parametrize(
    "name", ["step-99999999", "step-00000001", "step-zzz", "step-000000005", ".step-00000009.tmp"]
)
def test_what_no_checkpoint_has_written_stays(
    tmp_path: Path, name: str, put: Callable[[Path], object]
) -> None:
    put(tmp_path / name)
    before = tree(tmp_path / name)
    for number in (4, 5, 6):
        save(tmp_path, number, keep=1)
        assert checkpoint.latest(tmp_path) == tmp_path / f"step-{number:08d}"
    assert sorted(os.listdir(tmp_path)) == sorted([name, "step-00000006"])
    assert tree(tmp_path / name) == before


@pytest.mark.parametrize("put", FOREIGN.values(), ids=FOREIGN.keys())
@pytest.mark.parametrize("name", ["step-00000004", ".step-00000004.tmp"])
def test_what_stands_in_the_place_of_a_checkpoint_is_renamed(
    tmp_path: Path, name: str, put: Callable[[Path], object]
) -> None:
    """Each time under another name."""
    (tmp_path / f"{name}.1.old").write_text("older")
    put(tmp_path / name)
    before = tree(tmp_path / name)
    assert checkpoint.latest(tmp_path) is None
    whole = save(tmp_path, 4)
    assert checkpoint.latest(tmp_path) == whole
    assert tree(tmp_path / f"{name}.1.old") == b"older"
    assert tree(tmp_path / f"{name}.2.old") == before
    assert len(os.listdir(tmp_path)) == 3


def test_of_a_removed_checkpoint_the_files_of_others_stay(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    (first / "notes.txt").write_text("mine")
    (first / "state.json").unlink()  # as if a removal had been killed
    save(tmp_path, 2, keep=1)
    assert tree(first) == {"notes.txt": b"mine"}
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000002"
    save(tmp_path, 1)
    assert tree(tmp_path / "step-00000001.1.old") == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "step None is not that of step-00000007"),
        ("[]", "must hold a JSON object"),
        ("{", "not JSON"),
        ('{"step": 7}', "settings must be an object, not NoneType"),
        ('{"step": 7, "settings": [1]}', "settings must be an object, not list"),
        ('{"step": "7", "settings": {}}', "step '7' is not that"),
        ('{"step": true, "settings": {}}', "step True is not that"),
        ('{"step": 7.0, "settings": {}}', "step 7.0 is not that"),
        ('{"step": -7, "settings": {}}', "step -7 is not that"),
        ('{"step": 100000007, "settings": {}}', "step 100000007 is not that"),
    ],
)
def test_a_state_without_sense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """Under a manifest that fits."""
    directory = save(tmp_path, 7)
    path = directory / "state.json"
    path.write_text(text)
    edit_manifest(lambda m: m.update({"state.json": checkpoint.sha256(path)}))(directory)
    assert checkpoint.latest(tmp_path) == directory
    tensors = make(3)[1].tensors()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for read in (checkpoint.read_state, lambda each: checkpoint.restore(each, tensors)):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            read(directory)
        assert str(path) in str(caught.value)
    assert all(before[name].equal(tensor) for name, tensor in tensors.items())


def test_the_manifest_has_the_hash_of_each_file(tmp_path: Path) -> None:
    directory = save(tmp_path, 7)
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest.keys() == {SHARD, "state.json"}
    for name, digest in manifest.items():
        assert digest == hashlib.sha256((directory / name).read_bytes()).hexdigest()


def most_memory(run: Callable[[], object]) -> int:
    """How many bytes a call has more than what was there, at most, from a reset of the system's
    own count."""
    Path("/proc/self/clear_refs").write_text("5")

    def count(name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
        assert found
        return int(found[1]) << 10

    before = count("VmRSS")
    run()
    return count("VmHWM") - before


def test_a_save_takes_the_memory_of_one_tensor_at_most(tmp_path: Path) -> None:
    tensors = {str(i): torch.full((1 << 21,), float(i)) for i in range(12)}  # 8 MiB each
    save(tmp_path, 1)  # what is imported and kept the first time
    state: dict[str, Any] = {"settings": {}}
    assert most_memory(lambda: checkpoint.save(tmp_path, 2, tensors, state)) < 12 << 20
    assert most_memory(lambda: [tensor.clone() for tensor in tensors.values()]) > 90 << 20
