"""models/tensor_parallel.py: processes that have a share each compute what one process does."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from engine import Judge, to_line
from engine.request import make_row
from engine.verdict import Verdict
from kernels import cpp
from models import load_share, read_config
from models.lora import add_adapters
from models.tensor_parallel import SplitTransformer, _share_config, split
from models.weights import load_weights
from tests import forks, tiny
from tests.test_transformer import built, tiny_config, token_ids
from train.world.pocket import JUDGE_TEMPLATE

pytestmark = pytest.mark.usefixtures("one_thread")


def as_rank(work: Callable[..., Any], out: Path, *arguments: Any) -> None:
    """In a fork: one of several processes, which leaves what `work` returns."""
    dist.init_process_group("gloo")
    torch.save(work(*arguments), out / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


def in_ranks(ranks: int, work: Callable[..., Any], out: Path, *arguments: Any) -> list[Any]:
    """What `work` returns in each of several processes, in the environment that torchrun makes."""
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    processes = [
        forks.start(as_rank, work, out, *arguments, environment=common | {"RANK": str(rank)})
        for rank in range(ranks)
    ]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * ranks
    return [torch.load(out / f"{rank}.pt") for rank in range(ranks)]


def logits_of(root: Path, names: list[str]) -> dict[str, tuple[Tensor, int, int]]:
    """For each model its logits, what its own parameters and the cells of its cache take."""
    found = {}
    for name in names:
        model = split(load_weights(root / name, read_config(root / name)))
        assert isinstance(model, SplitTransformer)
        numbers = sum(p.numel() for p in model.parameters())
        found[name] = model.logits(token_ids()), numbers, model.config.cell_width
    return found


def is_whole(name: str) -> bool:
    """Whether all have a parameter; of the head each has some rows."""
    return "norm" in name or name.startswith("embed") or name.endswith("mlp.gate.weight")


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in tiny.FAMILIES}
VARIANTS |= {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "one key head": ("qwen2", {"num_key_value_heads": 1}),
    "latents of queries": ("deepseek_v2", tiny.DEEPSEEK),
    "an odd vocabulary": ("qwen3", {"vocab_size": 323}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, (family, given) in VARIANTS.items():
        tiny.write_checkpoint(root / name, family, max_shard_size="1GB", **given)
    return root


@pytest.fixture(scope="module")
def of_two(root: Path) -> list[dict[str, tuple[Tensor, int, int]]]:
    (root / "two").mkdir()
    return in_ranks(2, logits_of, root / "two", root, [*VARIANTS])


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_give_the_logits_of_one(
    name: str, root: Path, of_two: list[dict[str, tuple[Tensor, int, int]]]
) -> None:
    model = load_weights(root / name, read_config(root / name))
    expected = model.logits(token_ids())
    (first, numbers, cells), (second, *_) = (each[name] for each in of_two)
    assert torch.equal(first, second)
    assert expected.abs().max() > 1
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=0)
    # Half of all that is divided; the cache of latents is not, nor a key head that all have.
    whole = sum(p.numel() for n, p in model.named_parameters() if is_whole(n))
    divided = sum(p.numel() for n, p in model.layers.named_parameters() if not is_whole(n))
    own_head = -(-model.config.vocab_size // 2) * model.config.hidden_size
    if name == "one key head":
        names = [n for n, _ in model.named_parameters() if n.endswith("qkv_proj.weight")]
        kept = sum(model.get_parameter(name).numel() for name in names)
        assert whole + divided / 2 + own_head < numbers < whole + divided / 2 + own_head + kept / 2
    elif name not in ("deepseek_v2", "latents of queries"):  # whose projection to latents is whole
        assert numbers == whole + divided / 2 + own_head
    halves = name not in ("deepseek_v2", "latents of queries", "one key head")
    assert cells == (model.config.cell_width // 2 if halves else model.config.cell_width)


def test_more_ranks_than_key_heads(root: Path) -> None:
    """Each of two has the keys of two heads of four."""
    (root / "four").mkdir()
    found = in_ranks(4, logits_of, root / "four", root, ["qwen3"])
    expected = load_weights(root / "qwen3", read_config(root / "qwen3")).logits(token_ids())
    for each in found:
        torch.testing.assert_close(each["qwen3"][0], expected, atol=1e-5, rtol=0)
        assert torch.equal(each["qwen3"][0], found[0]["qwen3"][0])


# Judging


def lines_of(root: Path, torch_only: bool) -> tuple[list[bytes], list[str]]:
    """The lines of a judge that is divided among all processes, and the texts of their samples."""
    group = dist.group.WORLD
    assert group is not None
    judge = Judge.load(root, dtype="float32", cache_bytes=1 << 24, max_batch=4, group=group)
    assert isinstance(judge.model, SplitTransformer)
    if torch_only:
        with cpp.torch_only():
            return judged(judge)
    return judged(judge)


def judged(judge: Judge) -> tuple[list[bytes], list[str]]:
    rows = [make_row(f"task {i}", ["a b c", "d " * (i + 2)], id=f"row-{i}") for i in range(3)]
    verdicts = list(judge.rows(rows, k=2, seed=3, max_new_tokens=10, force_scores=True))
    assert all(isinstance(verdict, Verdict) and verdict.votes == 2 for verdict in verdicts)
    texts = [sample.text for verdict in verdicts for sample in verdict.samples]  # type: ignore[union-attr]
    return [to_line(verdict) for verdict in verdicts], texts


@pytest.mark.parametrize(
    ("family", "torch_only"),
    [
        ("qwen3_moe", False),
        pytest.param("gemma2", True, marks=pytest.mark.soak),
        pytest.param("deepseek_v2", False, marks=pytest.mark.soak),
    ],
)
def test_two_ranks_draw_the_samples_of_one(family: str, torch_only: bool, tmp_path: Path) -> None:
    """More samples than are decoded together, from a row's prompt and its kept ends, and forced."""
    tiny.write_model(tmp_path, family)
    (tmp_path / "judge_template.jinja").write_text(JUDGE_TEMPLATE)
    (lines, texts), second = in_ranks(2, lines_of, tmp_path, tmp_path, torch_only)
    assert (lines, texts) == second
    whole, expected = judged(Judge.load(tmp_path, dtype="float32", max_batch=4))
    assert texts == expected and len({*texts}) == 6
    keys = [{json.loads(line)["key"] for line in each} for each in (lines, whole)]
    assert keys[0].isdisjoint(keys[1])  # their bits differ


# Refused


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessGroup]:
    """The group of this process, and no other."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_share_of_one_is_the_model(alone: ProcessGroup, tmp_path: Path) -> None:
    tiny.write_model(tmp_path, "qwen3_moe")
    share, _ = load_share(tmp_path, alone)
    model = load_weights(tmp_path, read_config(tmp_path))
    torch.testing.assert_close(share.logits(token_ids()), model.logits(token_ids()))


@pytest.mark.parametrize(
    ("family", "ranks", "given", "words"),
    [
        ("llama", 3, {}, "attention heads, 4, cannot be divided among 3"),
        ("llama", 8, {"num_attention_heads": 8, "intermediate_size": 100}, "size, 100, cannot"),
        ("qwen3", 6, {"num_attention_heads": 12, "num_key_value_heads": 4},
         "4 key/value heads cannot be divided among 6"),
        ("qwen3_moe", 4, {"moe_intermediate_size": 42}, "of experts, 42"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided(
    family: str, ranks: int, given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        _share_config(tiny_config(tmp_path, family, **given), ranks)


def test_models_that_are_not_divided(alone: ProcessGroup, tmp_path: Path) -> None:
    model = built(tiny_config(tmp_path, "llama"))
    share = split(model)
    with pytest.raises(ValueError, match="a share of one, cannot be divided"):
        split(share)
    add_adapters(model, 2, 4.0)
    with pytest.raises(ValueError, match="with adapters"):
        split(model)


def test_a_judge_that_cannot_be_divided(alone: ProcessGroup, tmp_path: Path) -> None:
    tiny.write_model(tmp_path, "llama")
    with pytest.raises(ValueError, match="needs cache_bytes"):
        Judge.load(tmp_path, group=alone)
    with pytest.raises(ValueError, match="'fast' are not for"):
        Judge.load(tmp_path, group=alone, cache_bytes=1 << 24, numerics="fast")
    judge = Judge.load(tmp_path, group=alone, cache_bytes=1 << 24)
    with pytest.raises(ValueError, match="not what is submitted"):
        judge.submit(make_row("task", ["a", "b"]))


def test_no_processes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not initialized"):
        split(built(tiny_config(tmp_path, "llama")))
