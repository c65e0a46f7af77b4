"""Scalar models: the logit of transformers' sequence classification, and what is refused."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import models
from models.config import read_config
from models.scalar_head import ScalarModel
from models.transformer import causal_attend
from models.weights import load_scalar_weights, save_pretrained
from tests import tiny
from tests.rows import ROWS, check_rows
from train.meta_rm import scalar_of

PAD = 0
LENGTHS = (1, 8, 12, 40)  # within and past the windows of 9 and 11


def load(directory: Path, dtype: torch.dtype | None = None) -> ScalarModel:
    return load_scalar_weights(directory, read_config(directory, scalar=True), dtype)


@torch.no_grad()
def logit(model: ScalarModel, ids: Sequence[int]) -> float:
    decoder = model.model
    positions = torch.arange(len(ids))
    hidden = decoder(torch.tensor(ids), positions, causal_attend(decoder.config))
    return float(model.logits(hidden[-1:])[0])


@torch.no_grad()
def their_logits(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """One batch, padded on the right."""
    longest = max(map(len, sequences))
    ids = [[*sequence, *[PAD] * (longest - len(sequence))] for sequence in sequences]
    mask = [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]
    return model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, 0]


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, tiny.VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_transformers_before_and_after_saving(
    tmp_path: Path, family: str, tied: bool
) -> None:
    theirs = tiny.write_checkpoint(tmp_path / "a", family, scalar=True, tie_word_embeddings=tied)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 3
    ours = load(tmp_path / "a")
    expected = their_logits(theirs, sequences())
    found = torch.tensor([logit(ours, ids) for ids in sequences()])
    assert (found - expected).abs().max() < 1e-5 < expected.std()

    save_pretrained(ours, tmp_path / "b")
    assert sorted(os.listdir(tmp_path / "b")) == ["config.json", "model.safetensors"]
    again = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "b", attn_implementation="eager"
    )
    assert torch.equal(their_logits(again.eval(), sequences()), expected)
    reloaded = load(tmp_path / "b")
    assert reloaded.model.config == ours.model.config
    for (name, a), (_, b) in zip(ours.named_parameters(), reloaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_began_as_a_language_model_opens_as_a_classifier(tmp_path: Path, family: str) -> None:
    """Under the config of that model, whose labels were those of another head."""
    tiny.write_model(tmp_path / "a", family)
    path = tmp_path / "a" / "config.json"
    labels = {"num_labels": 3, "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0}}
    values = json.loads(path.read_text()) | labels
    path.write_text(json.dumps(values | {"problem_type": "single_label_classification"}))
    ours, _ = scalar_of(tmp_path / "a")
    torch.nn.init.normal_(ours.score.weight, generator=torch.Generator().manual_seed(0))
    save_pretrained(ours, tmp_path / "b", tmp_path / "a")
    theirs, told = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "b", attn_implementation="eager", output_loading_info=True
    )
    assert not any(told.values()) and theirs.config.num_labels == 1
    expected = their_logits(theirs.eval(), sequences())
    found = torch.tensor([logit(load(tmp_path / "b"), ids) for ids in sequences()])
    assert (found - expected).abs().max() < 1e-5 < expected.std()
    for key in ("transformers_version", "bos_token_id", "pad_token_id", "tie_word_embeddings"):
        assert json.loads((tmp_path / "b" / "config.json").read_text())[key] == values[key]


def test_without_a_pad_token_it_is_saved_without_one(tmp_path: Path) -> None:
    theirs = tiny.write_checkpoint(tmp_path / "a", "qwen3", scalar=True, pad_token_id=None)
    save_pretrained(load(tmp_path / "a"), tmp_path / "b")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b")
    assert again.config.pad_token_id is None and theirs.config.pad_token_id is None
    ids = sequences()[2]
    assert abs(their_logits(again.eval(), [ids])[0] - logit(load(tmp_path / "b"), ids)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_sum_is_in_float32_or_wider(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny.write_checkpoint(tmp_path, "qwen3", scalar=True)
    model = load(tmp_path, dtype)
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = hidden.double() @ model.score.weight[0].detach().double()
    found = model.logits(hidden).detach()
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    # 64 products, each and each addition rounded once, by at most half an epsilon of the sum of
    # magnitudes.
    bound = 64 * torch.finfo(found.dtype).eps * (hidden * model.score.weight).abs().sum(1).double()
    assert ((found.double() - exact).abs() <= bound).all()


def test_rows_do_not_depend_on_each_other_or_on_their_place(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, "qwen3", scalar=True, hidden_size=800)
    model = load(tmp_path)
    hidden = torch.randn(ROWS, 800, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        check_rows(lambda rows: model.logits(hidden[:rows])[:, None])
        for shift in range(1, 16):
            assert torch.equal(
                model.logits(hidden.roll(shift, 0)).roll(-shift), model.logits(hidden)
            )


def test_gradients_reach_the_decoder(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, "llama", scalar=True)
    model = load(tmp_path)
    decoder, ids = model.model, torch.tensor(sequences()[3])
    hidden = decoder(ids, torch.arange(len(ids)), causal_attend(decoder.config))
    model.logits(hidden[-1:]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


# Refusals


def test_each_kind_is_refused_by_name_in_the_place_of_the_other(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "judge", "gemma2")
    tiny.write_model(tmp_path / "meta", "gemma2", scalar=True)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM is a language model") as judge:
        models.load_scalar(tmp_path / "judge")
    with pytest.raises(ValueError, match=r"Gemma2ForSequenceClassification .* a meta") as meta:
        models.load(tmp_path / "meta")
    assert str(tmp_path / "judge" / "config.json") in str(judge.value)
    assert str(tmp_path / "meta" / "config.json") in str(meta.value)
    model, tokenizer = models.load_scalar(tmp_path / "meta")
    assert tokenizer.size <= model.model.config.vocab_size


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "bad", "1": "good"}}, "has one label"),
        ({"id2label": "absent"}, "has one label"),
        ({"id2label": "absent", "num_labels": 3}, "has one label"),
        ({"num_labels": 2}, "has one label"),
        ({"pad_token_id": -1}, "pad_token_id -1"),
        ({"pad_token_id": tiny.VOCAB_SIZE}, "pad_token_id 320"),
        ({"pad_token_id": True}, "pad_token_id True"),
        ({"architectures": ["BertForSequenceClassification"]}, "is not supported"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "contradicts model_type"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    tiny.hf_config("qwen3", num_labels=1).save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["Qwen3ForSequenceClassification"])
    read_config(tmp_path, scalar=True)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(tmp_path, scalar=True)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lm_head.weight", (tiny.VOCAB_SIZE, 64), "extra tensor lm_head.weight"),
        ("score.bias", (1,), "extra tensor score.bias"),
        ("model.score.weight", (1, 64), "extra tensor model.score.weight"),
        ("score.weight", (2, 64), r"score.weight must have shape \(1, 64\)"),
        ("score.weight", None, "missing tensor score.weight"),
        ("model.norm.weight", None, "missing tensor model.norm.weight"),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_consumed_once(
    tmp_path: Path, name: str, shape: tuple[int, ...] | None, message: str, tied: bool
) -> None:
    tiny.write_checkpoint(
        tmp_path, "qwen3", scalar=True, max_shard_size="1GB", tie_word_embeddings=tied
    )
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    if shape is None:
        del tensors[name]
    elif name == "lm_head.weight":  # not even where it equals the embedding
        tensors[name] = tensors["model.embed_tokens.weight"].clone()
    else:
        tensors[name] = torch.zeros(shape)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
