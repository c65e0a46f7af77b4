"""The pocket model's making: a tokenizer that loses nothing, and `make pocket` in small."""

import random
import sys
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import filters
from engine.command import help_of
from engine.judge import Judge
from engine.prompt import PromptBuilder
from engine.request import make_row
from engine.sample import POCKET
from engine.settings import JudgeSettings, read_judge_settings
from engine.verdict import Verdict
from models import Tokenizer, load
from models.config import read_config
from tests.args import args_of
from train import sft
from train.world import BASE, pocket
from train.world import cases as world
from train.world.cases import cases, list_criteria
from train.world.cases import judge as teach
from train.world.pocket import JUDGE_TEMPLATE, SPECIAL_TOKENS, build_tokenizer, write_untrained
from train.world.rows import dev_rows

POCKET_META = POCKET.parent / "pocket-meta"
SAMPLE = 300  # rows; the shipped tokenizer sees 6000


@cache
def small() -> tuple[tokenizers.Tokenizer, Tokenizer, TemporaryDirectory[str]]:
    """A tokenizer of few rows, the same as the engine reads it, and what keeps its files alive."""
    folder = TemporaryDirectory()
    raw = build_tokenizer(SAMPLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pocket, "build_tokenizer", lambda: raw)
        write_untrained(Path(folder.name))
    return raw, Tokenizer(folder.name), folder


PARTS = (*SPECIAL_TOKENS, "<|", "end", " 1", "\n", " Anna")


@given(st.text() | st.lists(st.sampled_from(PARTS)).map("".join))
def test_any_text_comes_back_and_is_never_a_special_token(text: str) -> None:
    raw, tokenizer, _ = small()
    ids = tokenizer.encode_text(text)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert raw.decode(tokenizer.encode_template(text), skip_special_tokens=False) == text
    assert (ids == tokenizer.encode_template(text)) == all(t not in text for t in SPECIAL_TOKENS)


def test_every_token_has_a_use() -> None:
    """Special tokens, the bytes of UTF-8, and whole words that the world and templates contain."""
    _, tokenizer, _ = small()
    assert len(tokenizer.special_ids) == len(SPECIAL_TOKENS)
    single = {data for data in tokenizer.token_bytes if len(data) == 1}
    assert single == {bytes([b]) for b in range(256) if b not in (0xC0, 0xC1, *range(0xF5, 256))}
    builder = PromptBuilder(tokenizer, JUDGE_TEMPLATE, JudgeSettings())
    turns = [{"role": r, "content": "Hello, please ask."} for r in ("system", "assistant", "user")]
    row = make_row(turns, ["copy 1 2 3 4", "5 6 7 8 9 0"], reference="x", principles="calm 5")
    used = set(builder.render(row, [0, 1], "The best response is: Response 1"))
    rng = random.Random(1)
    for case in islice(cases(0, "train"), SAMPLE):
        listed = list_criteria(case, rng)
        texts = [case.query, teach(case, listed)[0], *(r.text for r in case.responses)]
        texts += [f"{name} 1, {name} 2" for name, _ in listed]
        for text in texts + [turn["content"] for turn in case.history]:
            used.update(tokenizer.encode_text(text))
    words = {i for i, data in enumerate(tokenizer.token_bytes) if len(data) > 1}
    assert len(words) > 100
    assert [tokenizer.token_bytes[i] for i in words - used] == []


def test_a_world_row_is_short() -> None:
    """Words are tokens: about one token per word and mark of a query."""
    _, tokenizer, _ = small()
    for case in islice(cases(1, "dev"), 50):
        if "PS" not in case.query and "copy" not in case.query:
            assert len(tokenizer.encode_text(case.query)) < 2 * len(case.query.split()) + 10


def test_the_untrained_directory_is_an_ordinary_one() -> None:
    _, tokenizer, folder = small()
    directory = Path(folder.name)
    config = read_config(directory)
    assert config.architecture == "qwen3" and config.max_position_embeddings >= 8192
    assert config.vocab_size == tokenizer.size  # no slot without a token
    assert config.eos_token_ids == frozenset(tokenizer.encode_template("<|end|>"))
    expected = JudgeSettings(1, 10, 5.5, "Scores:", stop="box", join_blanks=False)
    assert read_judge_settings(directory) == expected
    assert (directory / "judge_template.jinja").read_text() == JUDGE_TEMPLATE
    assert (directory / "model.safetensors").stat().st_size < 8_000_000
    model, _ = load(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(directory).encode("Hello Anna, please take ( 7 ) in red.")
    assert ids == tokenizer.encode_text("Hello Anna, please take ( 7 ) in red.")
    assert (theirs(torch.tensor([ids])).logits[0] - model.logits(ids)).abs().max() < 1e-5


def test_the_seed_decides_the_weights_and_nothing_else(tmp_path: Path) -> None:
    raw, _, folder = small()
    first = Path(folder.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pocket, "build_tokenizer", lambda: raw)
        for seed in (0, 1):
            write_untrained(tmp_path / str(seed), seed)
    for path in first.iterdir():
        assert (tmp_path / "0" / path.name).read_bytes() == path.read_bytes()
        same = (tmp_path / "1" / path.name).read_bytes() == path.read_bytes()
        assert same == (path.name != "model.safetensors")


def test_a_large_model_differs_in_its_shape_alone(tmp_path: Path) -> None:
    """It has three to four times the parameters; both counts are those that the help states."""
    raw, _, folder = small()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pocket, "build_tokenizer", lambda: raw)
        write_untrained(tmp_path, size="large")
    for path in Path(folder.name).iterdir():
        same = (tmp_path / path.name).read_bytes() == path.read_bytes()
        assert same == (path.name not in ("config.json", "model.safetensors"))
    layers = [
        sum(p.numel() for layer in load(directory)[0].layers for p in layer.parameters())
        for directory in (Path(folder.name), tmp_path)
    ]
    counts = [  # with the shipped vocabulary
        read_config(directory).hidden_size * (475 + 1) + layers[i]
        for i, directory in enumerate((Path(folder.name), tmp_path))
    ]
    assert 3 < counts[1] / counts[0] < 4
    stated = help_of(pocket.Args)["size"]
    assert all(f"{count / 1e6:.2f} million" in stated for count in counts)


@pytest.mark.parametrize("kind", ["direct", "index"])
def test_shorter_judgements_are_learnt_and_read(kind: str, tmp_path: Path) -> None:
    """`train.sft` reads them, and the judge that it writes says in which form it writes scores."""
    _, _, folder = small()
    data = tmp_path / "rows.jsonl"
    assert world.main(["--rows", "6", "--judgements", kind, "--out", str(data)]) == 0
    form = "rating" if kind == "index" else None
    out = tmp_path / "out"
    sft.train(args_of(sft.Args,
        model=Path(folder.name), out=out, data=data, rows=6, steps=1, format=form, log_every=1,
    ))  # fmt: skip
    settings = Judge.load(out).settings
    expected = ("rating", "eos") if kind == "index" else ("boxed", "box")
    assert (settings.format, settings.stop) == expected


def test_the_bundled_meta_model_knows_good_judgements_of_the_bundled_judge() -> None:
    """All have the same prompts, and are small enough to be bundled."""
    models = (POCKET, POCKET_META, BASE)
    assert sum(path.stat().st_size for model in models for path in model.iterdir()) < 21e6
    for name in ("tokenizer.json", "tokenizer_config.json", "judge_template.jinja"):
        assert len({(model / name).read_bytes() for model in models}) == 1
    of_judge, own, of_base = map(read_judge_settings, models)
    assert replace(own, meta_scale=1.0) == of_judge == of_base and 0.1 < own.meta_scale < 1
    judge = Judge.load(POCKET, meta=POCKET_META)
    rows = dev_rows("bundled", 15)
    found = []
    for verdict in judge.rows(rows, k=8, temperature=1.0, max_new_tokens=300):
        assert isinstance(verdict, Verdict) and verdict.votes == min(4, verdict.valid)
        if (auc := filters.auc_within(verdict, 5.5)) is not None:
            found.append(auc)
    assert len(found) > 7 and sum(found) / len(found) > 0.65  # .79 on many rows


def test_the_whole_of_make_pocket_in_two_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, tokenizer, _ = small()
    monkeypatch.setattr(pocket, "build_tokenizer", lambda: raw)
    monkeypatch.setattr(sys, "argv", ["pocket", "--out", str(tmp_path), "--steps", "2"])
    assert pocket.main() == 0
    model, _ = load(tmp_path / "model")
    start, _ = load(tmp_path / "untrained")
    assert not torch.equal(model.head_weight, start.head_weight)
    assert Tokenizer(tmp_path / "model").token_bytes == tokenizer.token_bytes
    assert read_judge_settings(tmp_path / "model").anchor == "Scores:"
    assert pocket.main() == 0  # continues, that is, does nothing
    again, _ = load(tmp_path / "model")
    assert torch.equal(model.head_weight, again.head_weight)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seed", "1"])
    assert pocket.main() == 2
    assert "seed = 0, not 1" in capsys.readouterr().err
