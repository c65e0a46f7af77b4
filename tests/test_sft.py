"""Supervised training: its loss against transformers, and runs that are killed and resumed."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.command import with_values
from engine.prompt import PromptBuilder
from engine.settings import read_judge_settings
from models import load
from models.transformer import Transformer
from tests.args import args_of
from tests.tiny import FAMILIES, write_model
from train import checkpoint, sft
from train.packing import PackedBatch, pack
from train.trajectories import Trajectory
from train.world.pocket import JUDGE_TEMPLATE

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sharded model directory with a short judge template."""
    directory = tmp_path_factory.mktemp("base")
    write_model(directory, "qwen3")
    (directory / "judge_template.jinja").write_text(JUDGE_TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five trajectories whose verdict follows from the prompt."""
    path = tmp_path_factory.mktemp("data") / "trajectories.jsonl"
    with path.open("w") as file:
        for i in range(5):
            scores = "10, 1" if i % 2 else "1, 10"
            row = {"prompt": f"task {i}", "responses": ["a" * i, "b"]}
            file.write(json.dumps(row | {"judgement": f"Scores: \\boxed{{{scores}}}"}) + "\n")
    return path


@pytest.fixture
def args(base: Path, data: Path, tmp_path: Path) -> sft.Args:
    return args_of(sft.Args,
        model=base, out=tmp_path / "out", data=data, steps=7, rows=2, lr=3e-3, warmup=2,
        log_every=2, save_every=3,
    )  # fmt: skip


def outcome(out: Path) -> tuple[bytes, bytes]:
    """The bytes of the trained parameters and of the metrics."""
    return (out / "model.safetensors").read_bytes(), (out / "metrics.jsonl").read_bytes()


def trajectories(count: int, seed: int = 0) -> list[Trajectory]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(320, (length,), generator=generator).tolist()

    return [Trajectory([tuple(ids(3, 20))], ids(2, 12)) for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    write_model(tmp_path, family)
    model, _ = load(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for trajectory in trajectories(4):
        prompt, completion = list(trajectory.prompt[0]), list(trajectory.completion)
        ids = torch.tensor([prompt + completion])
        labels = torch.tensor([[-100] * len(prompt) + completion])
        expected = theirs(ids, labels=labels).loss
        # The loss moves by at most twice the error of a logit, for which the contract says 1e-5.
        assert abs(sft.loss_of(model, pack([trajectory])) - expected) < 2e-5


def test_packed_loss_and_gradients_are_the_mean_of_single_ones(base: Path) -> None:
    model, _ = load(base)
    batch = trajectories(5, seed=1)
    packed = sft.loss_of(model, pack(batch))
    packed.backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    count = sum(len(t.completion) for t in batch)
    single = [sft.loss_of(model, pack([t])) * len(t.completion) / count for t in batch]
    mean = torch.stack(single).sum()
    mean.backward()
    assert abs(packed - mean) < 16 * EPS * mean
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is not None and grad is not None
        assert (p.grad - grad).norm() < 64 * EPS * (p.grad.norm() + grad.norm())


def test_a_few_steps_learn_a_fixed_batch(args: sft.Args) -> None:
    sft.train(with_values(args, steps=30, rows=5, lr=1e-2, log_every=1, save_every=1000))
    lines = (args.out / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 30
    assert losses[-1] < 0.3 * losses[0]


def test_chat_lines_are_learnt(args: sft.Args, tmp_path: Path) -> None:
    """The assistant's turns, with their end tokens, and nothing else; a step has whole lines."""
    said = [f"word {i}" for i in range(4)]
    turns = [[{"role": "user", "content": f"task {i}"}, {"role": "assistant", "content": text}]
             for i, text in enumerate(said)]  # fmt: skip
    data = tmp_path / "chat.jsonl"
    with data.open("w") as file:
        for messages in (turns[0] + turns[1], turns[2], turns[3]):
            file.write(json.dumps({"messages": messages}) + "\n")
    targets: list[str] = []

    def spy(batch: list[Trajectory], *rest: object) -> PackedBatch:
        packed = pack(batch)
        targets.append(tokenizer.show(packed.target.tolist()))
        return packed

    _, tokenizer = load(args.model)
    args = with_values(args, data=data, steps=30, rows=3, lr=1e-2, log_every=1, save_every=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "pack", spy)
        sft.train(args)
    for target in targets:
        assert sorted(target.split("<|im_end|>")) == ["", *(f"\n{text}" for text in said)]
    losses = [json.loads(line)["loss"] for line in (args.out / "metrics.jsonl").open()]
    assert len(losses) == 30 and losses[-1] < 0.3 * losses[0]
    model, _ = load(args.out)
    shown = "<|im_start|>user\ntask 3<|im_end|><|im_start|>assistant"
    ids = tokenizer.encode_template(shown)
    for token in (expected := [*tokenizer.encode_text("\nword 3"), 2]):
        assert model.logits(ids)[-1].argmax() == token, expected
        ids.append(token)


def test_metrics_say_what_happened(args: sft.Args, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[PackedBatch] = []

    def spy(batch: list[Trajectory], *rest: object) -> PackedBatch:
        packed.append(pack(batch))
        return packed[-1]

    monkeypatch.setattr(sft, "pack", spy)
    sft.train(args)
    lines = [json.loads(line) for line in (args.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[1]["tokens"] == packed[3].num_tokens
    assert lines[0]["lr"] == args.learning.lr  # the last step of the warm-up
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    # The end token is the tokenizer's own, of the two that the model knows.
    ends = [batch.target[-1].item() for batch in packed]
    assert ends == [2] * 7 and load(args.model)[0].config.eos_token_ids == {0, 2}


def test_the_finished_directory_is_whole(args: sft.Args) -> None:
    sft.train(args)
    names = {path.name for path in args.out.iterdir()}
    assert not any("index" in name or "-of-" in name for name in names)
    assert names >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json",
                     "judge_template.jinja", "config.json", "model.safetensors"}  # fmt: skip
    model, tokenizer = load(args.out)
    settings = read_judge_settings(args.out)
    assert not (args.model / "judge.json").exists() and settings.anchor_nonce is False
    PromptBuilder(tokenizer, JUDGE_TEMPLATE, settings)
    start, _ = load(args.model)
    assert not torch.equal(model.head_weight, start.head_weight)
    assert model.config.eos_token_ids == start.config.eos_token_ids
    theirs = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    ids = list(range(40))
    assert (theirs(torch.tensor([ids])).logits[0] - model.logits(ids)).abs().max() < 1e-5


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Make the run stop in its `call`-th step from now."""
    calls = 0

    def spy(model: Transformer, batch: PackedBatch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return loss_of(model, batch)

    loss_of = sft.loss_of
    monkeypatch.setattr(sft, "loss_of", spy)


@pytest.mark.parametrize("stops", [(2,), (5, 3), (7,)], ids=str)
def test_an_interrupted_run_ends_as_if_it_never_stopped(
    args: sft.Args, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    whole = with_values(args, out=tmp_path / "whole")
    sft.train(whole)
    for stop in stops:
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, stop)
            with pytest.raises(KeyboardInterrupt):
                sft.train(args)
    with (args.out / "metrics.jsonl").open("a") as log:
        log.write('{"step": 9')  # a torn line
    assert not (args.out / "model.safetensors").exists()
    sft.train(args)
    assert outcome(args.out) == outcome(whole.out)


def test_a_finished_run_has_nothing_left_to_do(args: sft.Args) -> None:
    sft.train(args)
    done = outcome(args.out)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 1)
        sft.train(args)
    assert outcome(args.out) == done


def test_a_damaged_checkpoint_costs_steps_and_nothing_else(args: sft.Args, tmp_path: Path) -> None:
    whole = with_values(args, out=tmp_path / "whole")
    sft.train(whole)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            sft.train(args)
    newest = checkpoint.latest(args.out / "checkpoints")
    assert newest and newest.name == "step-00000006"
    os.truncate(next(newest.glob("shard-*")), 200)
    sft.train(args)
    assert outcome(args.out) == outcome(whole.out)


@pytest.mark.parametrize(
    "change", [{"lr": 1e-4}, {"seed": 1}, {"steps": 6}, {"rows": 3}, {"data": None}], ids=str
)
def test_other_settings_are_refused(args: sft.Args, change: dict[str, object]) -> None:
    sft.train(args)
    done = outcome(args.out)
    (name,) = change
    with pytest.raises(ValueError, match=f"other settings: {name} = "):
        sft.train(with_values(args, **change))
    assert outcome(args.out) == done


def test_files_count_by_what_they_hold(args: sft.Args, tmp_path: Path) -> None:
    sft.train(args)
    assert args.data
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in args.model.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    (moved / "data").mkdir()
    lines = moved / "data" / "lines"
    lines.write_bytes(args.data.read_bytes())
    sft.train(with_values(args, model=moved, data=lines, save_every=50, log_every=3))
    lines.write_text(lines.read_text().replace("task 3", "task 4"))
    with pytest.raises(ValueError, match="other settings: data = "):
        sft.train(with_values(args, model=moved, data=lines))
    (moved / "judge_template.jinja").write_text(JUDGE_TEMPLATE + "!")
    with pytest.raises(ValueError, match=r"other settings: model/judge_template\.jinja = "):
        sft.train(with_values(args, model=moved))


def test_a_loss_that_is_not_finite_stops_the_run(
    args: sft.Args, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    loss_of = sft.loss_of

    def spoil(model: Transformer, batch: PackedBatch) -> Tensor:
        nonlocal calls
        calls += 1
        return loss_of(model, batch) * (float("nan") if calls == 5 else 1.0)

    monkeypatch.setattr(sft, "loss_of", spoil)
    with pytest.raises(FloatingPointError, match=r"step 4: loss nan, .*; rows line \d, line \d$"):
        sft.train(args)
    newest = checkpoint.latest(args.out / "checkpoints")
    assert newest and newest.name == "step-00000003"
    assert not (args.out / "model.safetensors").exists()


def test_a_learning_rate_that_explodes_stops_the_run(args: sft.Args) -> None:
    with pytest.raises(FloatingPointError, match=r"step 1: .*(nan|inf)"):
        sft.train(with_values(args, lr=1e37))


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"rows": 0}, {"save_every": 0}, {"log_every": -1}, {"clip": -1.0}, {"clip": 0.0},
     {"lr": 0.0}, {"lr": float("inf")}, {"warmup": -1}, {"lora_rank": -1}, {"eval_every": -1}],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(args: sft.Args, change: dict[str, float]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} = "):
        sft.train(with_values(args, **change))
    with pytest.raises(ValueError, match="directory of the model itself"):
        sft.train(with_values(args, out=args.model))
    assert not args.out.exists()


def test_autocast_trains_as_well(args: sft.Args, tmp_path: Path) -> None:
    args = with_values(args, steps=2)
    sft.train(args)
    sft.train(with_values(args, autocast=True, out=tmp_path / "autocast"))
    exact, rounded = (
        json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for out in (args.out, tmp_path / "autocast")
    )
    assert exact != rounded and abs(exact - rounded) < 0.05 * exact
