"""Checkpoints: whole or not there, restored to the bit, the good ones never thrown away."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from train import checkpoint
from train.optimizer import Optimizer

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def make(seed: int = 0) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 2))
    return model, Optimizer(model, 0.1)


def bits(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    tensors = [*model.state_dict().values(), *optimizer.tensors().values()]
    return [tensor.tolist() for tensor in tensors]


def save(root: Path, number: int, state: dict[str, Any] | None = None, keep: int = 2) -> Path:
    return checkpoint.save(root, number, make()[1].tensors(), state or {}, keep)


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
    (tmp_path / ".step-00000001.tmp").mkdir()  # left by a killed run
    for number in (1, 2, 10):
        save(tmp_path, number, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000010"]
    save(tmp_path, 10, {"again": True}, keep=1)
    assert os.listdir(tmp_path) == ["step-00000010"]
    assert checkpoint.read_state(tmp_path / "step-00000010") == {"step": 10, "again": True}


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


@pytest.mark.parametrize("when", ["sha256", "_fsync", "replace"])
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
