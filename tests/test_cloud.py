"""Critiques and their rewards: against transformers' tokens and hidden states."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from engine.cloud import CRITIQUE, CloudJudge
from engine.request import Row, make_row
from engine.sample import main
from engine.verdict import Verdict
from models import load_critique
from models.files import read_json
from tests import tiny
from tests.test_scalar_judge import ENDING, HISTORY

END = 2  # <|im_end|>
ASKED = CRITIQUE[CRITIQUE.index("The following") :]
ROWS = [
    make_row("What is 2 + 2?", ["4", "It is 5.", ""], id="a", label=0),
    make_row(HISTORY, ["Blue, as the sea is on a clear day."], id="b", label=1),
]
GREEDY: dict[str, Any] = {"k": 1, "temperature": 0.0, "max_new_tokens": 12}


def write(directory: Path, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """A model as the published ones are stored; its language model in transformers."""
    theirs = tiny.write_model(directory, "llama", max_shard_size="1GB", dtype=dtype, **config)
    base = directory / "base"
    base.mkdir()
    for name in ("config.json", "generation_config.json"):
        (directory / name).rename(base / name)
    path = directory / "model.safetensors"
    tensors = {f"reward_base_model.{name}": x for name, x in load_file(path).items()}
    size, generator = theirs.config.hidden_size, torch.Generator().manual_seed(7)
    shapes = {"dense.weight": (size, size), "dense.bias": (size,),
              "out_proj.weight": (1, size), "out_proj.bias": (1,)}  # fmt: skip
    for name, shape in shapes.items():
        tensors[f"reward_head.{name}"] = torch.randn(shape, generator=generator).to(dtype) * 0.3
    save_file(tensors, path, metadata={"format": "pt"})
    (directory / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["FeedbackRewardModel"],
                "base_model_name_or_path": "base",
                "feedback_method": "teacher",
            }
        )
    )
    (directory / "chat_template.jinja").write_text(ENDING)
    return theirs


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    directory = tmp_path_factory.mktemp("cloud")
    return directory, write(directory)


def prompt(directory: Path, row: Row, response: str) -> list[int]:
    """As the authors' code writes it."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    turns = [{"role": each.role, "content": each.content} for each in row.messages]
    turns.append({"role": "assistant", "content": response})
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": ASKED}], tokenize=False)
    text += asked.replace("<|im_end|>", "")
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


@torch.inference_mode()
def reward(directory: Path, theirs: PreTrainedModel, ids: list[int]) -> float:
    """Of what ends in the end token, by torch's own layers."""
    head = {
        name.removeprefix("reward_head."): x.float()
        for name, x in load_file(directory / "model.safetensors").items()
        if name.startswith("reward_head.")
    }
    assert ids[-1] == END
    hidden = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
    inner = torch.tanh(head["dense.weight"] @ hidden.float() + head["dense.bias"])
    return float(head["out_proj.weight"] @ inner + head["out_proj.bias"])


def test_greedy_critiques_and_rewards_are_those_of_transformers(
    written: tuple[Path, PreTrainedModel],
) -> None:
    directory, theirs = written
    judge = CloudJudge.load(directory)
    for row, verdict in zip(ROWS, judge.rows(ROWS, **GREEDY), strict=True):
        assert isinstance(verdict, Verdict)
        (sample,) = verdict.samples
        own, exact = list[int](), []
        for response in row.responses:
            ids = prompt(directory, row, response)
            with torch.inference_mode():
                whole = theirs.generate(
                    torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=[0, END]
                )
            critique = whole[0, len(ids) :].tolist()
            own += critique
            ended = critique[-1] in (0, END)
            exact.append(reward(directory, theirs, [*ids, *critique[: len(critique) - ended], END]))
        assert sample.token_ids == own and sample.tokens == len(own) > 0
        assert sample.scores == pytest.approx(exact, rel=0, abs=1e-5)
        assert len(set(exact)) == len(row.responses)
        assert verdict.best == exact.index(max(exact)) and verdict.score == "head"
        assert verdict.correct == (verdict.best == 0 if len(exact) > 1 else None)
        assert (sample.order, sample.invalid) == ((), None) and verdict.votes == 1


def test_the_mean_of_sampled_critiques_decides(written: tuple[Path, PreTrainedModel]) -> None:
    """Every sample's reward is that of its own tokens, however it ended."""
    directory, theirs = written
    judge = CloudJudge.load(directory)
    row = ROWS[1]
    ids = prompt(directory, row, row.responses[0])
    options: dict[str, Any] = {"k": 12, "temperature": 1.0, "max_new_tokens": 60}
    (verdict,) = judge.rows([row], **options)
    assert isinstance(verdict, Verdict) and len({s.text for s in verdict.samples}) == 12
    assert {sample.finish for sample in verdict.samples} == {"eos", "length"}
    rewards = []
    for sample in verdict.samples:
        critique = sample.token_ids[: -1 if sample.finish == "eos" else None]
        rewards.append(reward(directory, theirs, [*ids, *critique, END]))
        assert sample.scores == pytest.approx(rewards[-1:], rel=0, abs=1e-5)
    assert verdict.mean_scores == pytest.approx([sum(rewards) / 12], rel=0, abs=1e-5)
    # A sample depends on neither k nor on what else is judged.
    fewer = list(judge.rows([ROWS[0], row], **(options | {"k": 3})))[1]
    assert isinstance(fewer, Verdict)
    assert [s.scores for s in fewer.samples] == [s.scores for s in verdict.samples[:3]]


def test_the_command_resumes_byte_for_byte(
    written: tuple[Path, PreTrainedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = written
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": "One?", "responses": ["Yes", "No"]}, {"prompt": "?"},
            {"prompt": "One?", "responses": ["1"] * 3, "reference": "one"}]  # fmt: skip
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", str(directory), "--data", str(data)]
    words += ["--k", "2", "--max-new-tokens", "6"]
    assert main([*words, "--out", str(out)]) == 1
    whole = out.read_bytes()
    first, bad, last = map(json.loads, whole.splitlines())
    assert first["score"] == "head" and first["k"] == 2 and len(first["samples"][0]["scores"]) == 2
    assert "error" in bad and len(last["scores"]) == 3
    out.write_bytes(whole[: whole.index(b"\n") + 9])
    assert main([*words, "--out", str(out), "--resume"]) == 1
    assert out.read_bytes() == whole
    capsys.readouterr()

    assert main([*words, "--show-prompt"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("<|im_start|>user\nOne?<|im_end|><|im_start|>assistant\nYes<|im_end|>")
    assert shown.endswith(f"<|im_start|>user\n{ASKED}\n")
    template = tmp_path / "own.jinja"
    template.write_text(CRITIQUE.replace(ASKED, "Is it right?"))
    assert main([*words, "--show-prompt", "--template", str(template)]) == 0
    assert capsys.readouterr().out.endswith("<|im_start|>user\nIs it right?\n")
    for more, message in (
        (["--orders", "random"], "orders = random has no meaning"),
        (["--format", "json"], "format = json has no meaning"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err


def test_weights_are_shared_and_what_is_wrong_is_named(
    written: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    directory, _ = written
    judge = CloudJudge.load(directory)
    assert judge.model is judge.critic.model and END in judge.model.config.eos_token_ids
    write(tmp_path, tie_word_embeddings=True)
    assert load_critique(tmp_path)[0].model.config.tied
    path = tmp_path / "config.json"
    values = read_json(path)
    for changes, message in (
        ({"base_model_name_or_path": "meta-llama/Meta-Llama-3-8B"}, "is no directory with a conf"),
        ({"feedback_method": "vanilla"}, "'vanilla' writes no critiques"),
    ):
        path.write_text(json.dumps(values | changes))
        with pytest.raises(ValueError, match=message):
            CloudJudge.load(tmp_path)
    path.write_text(json.dumps(values))
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="ends a turn with no token of its own"):
        CloudJudge.load(tmp_path)
