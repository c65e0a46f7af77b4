"""Every family through the commands, on tiny checkpoints: judging, reinforcement learning, a meta
model; and lines that are the same on every processor."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import Judge
from engine.request import Row, make_row
from engine.sample import POCKET
from engine.verdict import Sample, Verdict, to_line
from kernels import cpp
from tests.args import args_of
from tests.tiny import FAMILIES, write_model
from train import grpo, meta_rm
from train.world.pocket import JUDGE_TEMPLATE

pytestmark = pytest.mark.usefixtures("one_thread")
# SHA-256 of the verdict lines of a tiny model of each family. They change with the templates and
# the format of lines, never with the machine.
LINES = {
    "qwen3": "3a5ba1836a3fb2ea3e8e60d5f94254f96e1eb52f1fedfb2f489aee1e1f59ea20",
    "qwen3_moe": "e1ca6887414fcfa5de2c9bcfb2502fd517138eef26bf39292587b6f2f8dbc2a4",
    "qwen2": "2e1744019c5f900cb7efbf805325686b18a8ee73d8a09a5a5d4871d3bf76afbf",
    "llama": "2140124c5d83ed0ed6f1208e270f3d5fd6cc7f95c149ddd8bd79b69b739b5f71",
    "gemma2": "880daf408c27d3cdf9997d60c0dbea6935e83aa3224292a6df7802bc325165c5",
    "gemma3_text": "7cca0a6d23ca5398d902f716cc5348a3aaae5b6c218e522208f44c76bc3c44b6",
    "deepseek_v2": "d482fcfc3e233ad3cc101f227e636e35f22f9394301d41906a2feef360a0cb45",
}
STEP = {"steps": 1, "warmup": 1, "rows": 2, "max_new_tokens": 12, "eval_rows": 2, "eval_k": 2}


# Those whose training differs most; the others in the soak.
META = [
    pytest.param(family, marks=() if family == "deepseek_v2" else pytest.mark.soak)
    for family in FAMILIES
]


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are whole numbers of 1/512, drawn alike on every processor."""
    root = tmp_path_factory.mktemp(request.param)
    write_model(root, request.param, max_shard_size="1GB")
    (root / "judge_template.jinja").write_text(JUDGE_TEMPLATE)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, tensor in sorted(load_file(root / "model.safetensors").items()):
        whole = torch.from_numpy(rng.integers(-96, 97, tensor.shape)).float()
        is_norm = tensor.ndim == 1 and not name.endswith("bias")
        tensors[name] = (1.0 if is_norm else 0.0) + whole / 512
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    return root


def rows() -> list[Row]:
    return [make_row(f"task {i}", ["a b c", "d " * (i + 2)], id=f"row-{i}") for i in range(3)]


@pytest.mark.skipif(not cpp.runs_cpp(torch.zeros(1)), reason="only C++ promises bits on a CPU")
def test_lines_are_the_same_everywhere(directory: Path, request: pytest.FixtureRequest) -> None:
    judge = Judge.load(directory, dtype="float32")
    verdicts = list(judge.rows(rows(), k=4, seed=0, max_new_tokens=24, force_scores=True))
    for verdict in verdicts:
        assert isinstance(verdict, Verdict) and verdict.valid == 4
    lines = b"".join(json.dumps({**json.loads(to_line(v)), "key": None}).encode() for v in verdicts)
    family = request.node.callspec.params["directory"]
    assert hashlib.sha256(lines).hexdigest() == LINES[family]


def by_place(row: Row, samples: Sequence[Sample], threshold: float) -> list[float]:
    """A reward that differs within a group."""
    return [float(i) for i in range(len(samples))]


def test_reinforcement_learning(directory: Path, tmp_path: Path) -> None:
    args = args_of(
        grpo.Args, model=directory, out=tmp_path / "out", group=2,
        reward="tests.test_families:by_place", **STEP,
    )  # fmt: skip
    before = weights(directory)
    grpo.train(args)
    after = weights(args.out)
    assert before.keys() == after.keys()
    assert learnt(before, after) == kinds(before)


@pytest.mark.parametrize("directory", META, indirect=True)
def test_a_meta_model_is_trained(directory: Path, tmp_path: Path) -> None:
    """Of the pocket model's judgements."""
    args = args_of(
        meta_rm.Args, model=directory, judge=POCKET, out=tmp_path / "out", samples=3,
        **STEP | {"steps": 2, "max_new_tokens": 220},  # the score begins as zeros
    )  # fmt: skip
    meta_rm.train(args)
    before, after = weights(directory), weights(args.out)
    assert after.keys() - before.keys() == {"score.weight"}
    del after["score.weight"]
    assert learnt(before, after) == kinds(after)


def kinds(weights: Iterable[str]) -> set[str]:
    """Their names without the numbers of experts, to some of which no token may go."""
    return {re.sub(r"experts\.\d+", "experts", name) for name in weights}


def learnt(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The kinds of those that differ."""
    return kinds(name for name in after if not torch.equal(before[name], after[name]))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")
