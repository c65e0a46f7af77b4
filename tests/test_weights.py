import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import models
from models.config import read_config
from models.transformer import Transformer
from models.weights import load_weights, save_pretrained, write_tensors
from tests import tiny

INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def load(directory: Path, dtype: torch.dtype | None = None) -> Transformer:
    return load_weights(directory, read_config(directory), dtype)


def single(directory: Path, family: str = "qwen3", **options: Any) -> Path:
    """A checkpoint in one file."""
    tiny.write_checkpoint(directory, family, max_shard_size="1GB", **options)
    assert not (directory / INDEX).exists()
    return directory / "model.safetensors"


def edit(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = directory / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def shard_of(directory: Path, name: str) -> Path:
    return directory / str(json.loads((directory / INDEX).read_text())["weight_map"][name])


def refused(directory: Path, message: str, file: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(directory)
    assert str(directory / file) in str(caught.value)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_single_file_equals_shards(tmp_path: Path, family: str) -> None:
    tiny.write_checkpoint(tmp_path / "shards", family)
    single(tmp_path / "one", family)
    shards, one = load(tmp_path / "shards"), load(tmp_path / "one")
    for (name, a), (_, b) in zip(shards.named_parameters(), one.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_saved_models_open_here_and_in_transformers(
    tmp_path: Path, family: str, tied: bool
) -> None:
    original = tiny.write_checkpoint(tmp_path / "a", family, tie_word_embeddings=tied)
    model = load(tmp_path / "a")
    save_pretrained(model, tmp_path / "b")
    assert sorted(os.listdir(tmp_path / "b")) == ["config.json", "model.safetensors"]
    again = load(tmp_path / "b")
    assert again.config == model.config
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    for name, value in original.state_dict().items():
        assert torch.equal(oracle.state_dict()[name], value), name
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_the_config_of_the_base_says_is_kept(tmp_path: Path, family: str) -> None:
    """So that transformers can generate with a padded batch, which takes a pad token."""
    tiny.write_checkpoint(tmp_path / "a", family, dtype=torch.bfloat16)
    path = tmp_path / "a" / "config.json"
    values = json.loads(path.read_text()) | {"custom": {"dtype": "int4", "of": [{"a": None}]}}
    values["torch_dtype"] = values.pop("dtype")
    path.write_text(json.dumps(values))
    save_pretrained(load(tmp_path / "a", torch.float32), tmp_path / "b", tmp_path / "a")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert list(written.items()) == list((values | {"torch_dtype": "float32"}).items())
    assert {"pad_token_id", "bos_token_id", "transformers_version", "use_cache"} <= set(written)

    began_as, saved = (AutoModelForCausalLM.from_pretrained(tmp_path / d).float() for d in "ab")
    ids, mask = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1], [1] * 4])
    for model in (began_as, saved):
        model.eval()
    logits = [model(ids, attention_mask=mask).logits for model in (began_as, saved)]
    assert torch.equal(*logits)
    longer = saved.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert longer.shape == (2, 7)


def test_dtypes(tmp_path: Path) -> None:
    single(tmp_path, dtype=torch.bfloat16)
    assert load(tmp_path).embed_tokens.weight.dtype == torch.bfloat16
    wide = load(tmp_path, torch.float32)
    assert wide.config.dtype == wide.embed_tokens.weight.dtype == torch.float32
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "dtype"}))
    assert load(tmp_path).config.dtype == torch.bfloat16, "where config.json is silent, the stored"
    with pytest.raises(ValueError, match=r"torch\.int8"):
        load(tmp_path, torch.int8)


def test_saving_keeps_the_dtype_of_the_model(tmp_path: Path) -> None:
    single(tmp_path / "a", dtype=torch.bfloat16)
    save_pretrained(load(tmp_path / "a", torch.float32), tmp_path / "b")
    assert read_config(tmp_path / "b").dtype == torch.float32
    assert load_file(tmp_path / "b" / "model.safetensors")[EMBEDDING].dtype == torch.float32


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = single(tmp_path)
    model, before = load(tmp_path), file.read_bytes()

    def full_disk(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("models.weights.write_tensors", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(model, tmp_path)
    assert file.read_bytes() == before
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_loaded_models_can_be_trained(tmp_path: Path) -> None:
    single(tmp_path)
    assert all(parameter.requires_grad for parameter in load(tmp_path).parameters())


def test_a_tied_head_may_be_stored_if_equal(tmp_path: Path) -> None:
    file = single(tmp_path, tie_word_embeddings=True)
    expected = load(tmp_path).logits([1, 2, 3])
    edit(file, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    assert torch.equal(load(tmp_path).logits([1, 2, 3]), expected)
    edit(file, lambda tensors: tensors["lm_head.weight"][5, 6].add_(1))
    refused(tmp_path, "lm_head.weight differs from the tied embedding", "model.safetensors")


def test_inverse_frequencies_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    file = single(tmp_path, "llama")
    names = ("model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq")
    edit(file, lambda tensors: tensors.update({name: torch.ones(8) for name in names}))
    load(tmp_path)


def test_links_into_the_blobs_of_a_cache(tmp_path: Path) -> None:
    snapshot, blobs = (
        tmp_path / "models--x" / "snapshots" / "1a2b",
        tmp_path / "models--x" / "blobs",
    )
    tiny.write_checkpoint(snapshot, "qwen3")
    blobs.mkdir()
    for file in snapshot.glob("*.safetensors"):
        shutil.move(file, blobs / f"hash-{file.name}")
        file.symlink_to(Path("../../blobs") / f"hash-{file.name}")
    load(snapshot)


def test_pickles_are_refused(tmp_path: Path) -> None:
    tiny.hf_config("qwen3").save_pretrained(tmp_path)
    refused(tmp_path, "holds neither", "")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(tmp_path, "pickled weights are refused", "pytorch_model.bin")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: "pytorch_model.bin"}}))
    refused(tmp_path, "'pytorch_model.bin' is not a safetensors file", INDEX)


@pytest.mark.parametrize(
    "entry", ["../outside.safetensors", "/outside.safetensors", "sub/../../outside.safetensors"]
)
def test_index_entries_that_leave_the_directory(tmp_path: Path, entry: str) -> None:
    directory = tmp_path / "model"
    tiny.write_checkpoint(directory, "qwen3")
    (directory / "sub").mkdir()
    shutil.copy(shard_of(directory, EMBEDDING), tmp_path / "outside.safetensors")
    entry = entry.replace("/outside", f"{tmp_path}/outside") if entry.startswith("/") else entry
    edit_index(directory, lambda weight_map: weight_map.update({EMBEDDING: entry}))
    refused(directory, "leaves the directory", INDEX)


def test_links_that_leave_the_directory(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    tiny.write_checkpoint(directory, "qwen3")
    shard = shard_of(directory, EMBEDDING)
    shutil.move(shard, tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    refused(directory, "is a link that leaves the directory", INDEX)


def test_missing_shard(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, "qwen3")
    shard = shard_of(tmp_path, EMBEDDING)
    shard.unlink()
    refused(tmp_path, f"'{shard.name}' does not exist", INDEX)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{"])
def test_malformed_index(tmp_path: Path, text: str) -> None:
    tiny.write_checkpoint(tmp_path, "qwen3")
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, "weight_map|JSON", INDEX)


def test_an_index_that_repeats_a_tensor(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, "qwen3")
    path = tmp_path / INDEX
    path.write_text(path.read_text().replace(f'"{UP}"', f'"{EMBEDDING}"'))
    refused(tmp_path, f"repeated key '{EMBEDDING}'", INDEX)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, "qwen3")
    here, there = shard_of(tmp_path, EMBEDDING), shard_of(tmp_path, UP)
    assert here != there
    tensor = load_file(here)[EMBEDDING]
    edit(there, lambda tensors: tensors.update({EMBEDDING: tensor}))
    with pytest.raises(ValueError, match=f"{EMBEDDING} is also in|{EMBEDDING}.*puts elsewhere"):
        load(tmp_path)


def test_an_index_that_puts_a_tensor_elsewhere(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, "qwen3")
    shard, other = shard_of(tmp_path, UP), shard_of(tmp_path, EMBEDDING).name
    assert len(load_file(shard)) > 1, "the shard must be read for another tensor's sake"
    edit_index(tmp_path, lambda weight_map: weight_map.update({UP: other}))
    refused(tmp_path, f"extra tensor {UP}, which .* puts elsewhere", shard.name)


def test_a_tensor_that_the_index_does_not_name(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, "qwen3")
    shard = shard_of(tmp_path, UP)
    edit(shard, lambda tensors: tensors.update({"model.more": torch.ones(2)}))
    refused(tmp_path, "extra tensor model.more, which .* does not name", shard.name)


def test_a_tensor_that_the_shard_lacks(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, "qwen3")
    edit_index(tmp_path, lambda weight_map: weight_map.update({"model.more": weight_map[UP]}))
    refused(tmp_path, "model.more is missing from", INDEX)


def test_single_file_and_index_that_ignores_it(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path, "qwen3")
    shutil.copy(shard_of(tmp_path, UP), tmp_path / "model.safetensors")
    refused(tmp_path, "remove one of the two", "model.safetensors")


def test_the_index_alone_says_which_files_are_read(tmp_path: Path) -> None:
    """Downloads have other files beside the shards, and other facts in the index."""
    tiny.write_checkpoint(tmp_path, "qwen3")
    expected = load(tmp_path).logits([1, 2, 3])
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        save_file({"layers.0.attention.wq.weight": torch.ones(2)}, tmp_path / name)
    path = tmp_path / INDEX
    index = json.loads(path.read_text())
    index["metadata"] |= {"total_parameters": 7, "format": "pt"}
    path.write_text(json.dumps(index))
    assert torch.equal(load(tmp_path).logits([1, 2, 3]), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), f"missing tensor {UP}"),
        (lambda t: t.pop("lm_head.weight"), "missing tensor lm_head.weight, which tie_word_embed"),
        (lambda t: t.update({"\x1b]0;x\a": torch.ones(1)}), r"'\\x1b\]0;x\\x07' is no name"),
        (lambda t: t.update({"score.weight": torch.ones(1, 64)}), "extra tensor score.weight"),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t[UP].clone()}),
            "extra tensor model.layers.3",
        ),
        (lambda t: t.update({UP: t[UP].T.contiguous()}), r"shape \(96, 64\), got \(64, 96\)"),
        (lambda t: t.update({UP: t[UP][:-1].clone()}), r"shape \(96, 64\), got \(95, 64\)"),
        (lambda t: t.update({UP: t[UP][None].clone()}), r"got \(1, 96, 64\)"),
        (lambda t: t[UP][95, 63].fill_(float("nan")), f"{UP} is not finite"),
        (lambda t: t[UP][0, 0].fill_(float("-inf")), f"{UP} is not finite"),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), f"{UP} has dtype 'I8'"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), f"{UP} has dtype 'F8_E4M3'"),
    ],
)
def test_wrong_tensors(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    file = single(tmp_path, tie_word_embeddings=False)
    load(tmp_path)
    edit(file, change)
    refused(tmp_path, message, "")


def test_values_that_overflow_the_dtype(tmp_path: Path) -> None:
    file = single(tmp_path)
    edit(file, lambda tensors: tensors[UP][0, 0].fill_(1e6))
    load(tmp_path)
    with pytest.raises(ValueError, match=rf"{UP} is not finite in torch\.float16"):
        load(tmp_path, torch.float16)


def header(file: Path) -> tuple[str, bytes]:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length].decode(), raw[8 + length :]


def write_raw(file: Path, text: str, data: bytes) -> None:
    file.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1000, -1])
def test_truncated_files(tmp_path: Path, kept: int) -> None:
    file = single(tmp_path)
    file.write_bytes(file.read_bytes()[:kept])
    refused(tmp_path, "truncated", "model.safetensors")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    file = single(tmp_path)
    file.unlink()
    os.mkfifo(file)
    refused(tmp_path, "weights must be in a file", "model.safetensors")


def test_files_with_more_than_the_header_describes(tmp_path: Path) -> None:
    file = single(tmp_path)
    file.write_bytes(file.read_bytes() + b"more")
    refused(tmp_path, "overlong", "model.safetensors")


def test_a_header_that_repeats_a_tensor(tmp_path: Path) -> None:
    file = single(tmp_path)
    text, data = header(file)
    write_raw(file, text.replace(f'"{UP}"', f'"{EMBEDDING}"'), data)
    refused(tmp_path, f"repeated key '{EMBEDDING}'", "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [96, -64]}, "malformed shape"),
        ({"shape": "96"}, "malformed shape"),
        ({"data_offsets": [0]}, "malformed shape or data_offsets"),
        ({"data_offsets": [0, 4]}, "Error while deserializing"),
        ({"data_offsets": [0, 1 << 60]}, "truncated"),
        ({"dtype": None}, "dtype None"),
    ],
)
def test_malformed_header_entries(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = single(tmp_path)
    text, data = header(file)
    entries = json.loads(text)
    entries[UP] |= change
    write_raw(file, json.dumps(entries), data)
    refused(tmp_path, message, "model.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("\0\0", "not JSON"),
        ("[]", "must hold a JSON object"),
        ('{"a": 3}', "a is not described by an object"),
    ],
)
def test_malformed_headers(tmp_path: Path, text: str, message: str) -> None:
    file = single(tmp_path)
    write_raw(file, text, b"")
    refused(tmp_path, message, "model.safetensors")


def test_load_gives_model_and_tokenizer(tmp_path: Path) -> None:
    oracle = tiny.write_model(tmp_path, "qwen2", dtype=torch.bfloat16)
    model, tokenizer = models.load(tmp_path, device="cpu")
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.config.eos_token_ids == {0, 2}
    ids = tokenizer.encode_template("<|im_start|>the<|im_end|>")
    exact, _ = models.load(str(tmp_path), dtype="float32", device=torch.device("cpu"))
    expected = oracle.float()(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(exact.logits(ids), expected, atol=1e-5, rtol=0)
    assert torch.equal(
        models.load(tmp_path, torch.float32, "cpu")[0].logits(ids), exact.logits(ids)
    )
    for name in ("float8", "float64"):
        with pytest.raises(ValueError, match=f"dtype must be auto or one .*float32, got '{name}'"):
            models.load(tmp_path, dtype=name)


@pytest.mark.parametrize("named", [True, False])
def test_weights_in_float64_are_loaded_as_float32(tmp_path: Path, named: bool) -> None:
    oracle = tiny.write_model(tmp_path, dtype=torch.float64)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    assert values["dtype"] == "float64"
    if not named:
        path.write_text(json.dumps(values | {"dtype": None}))
    model, _ = models.load(tmp_path, device="cpu")
    assert model.embed_tokens.weight.dtype == model.config.dtype == torch.float32
    expected = oracle(torch.tensor([[1, 2, 3]])).logits[0].float()
    torch.testing.assert_close(model.logits([1, 2, 3]), expected, atol=1e-5, rtol=0)
    exact, _ = models.load(tmp_path, torch.float64, "cpu")
    assert exact.logits([1, 2, 3]).dtype == torch.float64, "for references and gradients"


def test_a_vocabulary_smaller_than_the_tokenizer(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "small", vocab_size=272)
    with pytest.raises(ValueError, match=r"vocab_size 272 .* id 272 of token '10'"):
        models.load(tmp_path / "small")
    tiny.write_model(tmp_path / "large", vocab_size=273)
    models.load(tmp_path / "large", device="cpu")


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
KINDS = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@given(st.dictionaries(st.text(min_size=1).filter("__metadata__".__ne__), st.tuples(KINDS, SHAPES)))
def test_files_of_tensors_are_read_by_safetensors(
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]],
) -> None:
    """Transposed ones and those of another dtype too, each aligned to its width, with the hash of
    what was written."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape[::-1], generator=generator).mT if len(shape) == 2
        else torch.randn(shape, generator=generator)
        for name, (_, shape) in shapes.items()
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        digest = write_tensors(path, shapes, tensors.__getitem__, {"a": "ä"})
        found = load_file(path)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "a": "ä"}
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
        text, _ = header(path)
    assert found.keys() == tensors.keys()
    for name, (dtype, _) in shapes.items():
        start = json.loads(text)[name]["data_offsets"][0]
        assert (8 + len(text) + start) % dtype.itemsize == 0
        assert found[name].dtype == dtype and found[name].equal(tensors[name].to(dtype))


def test_a_file_of_tensors_takes_one_of_them_at_a_time(tmp_path: Path) -> None:
    handed: list[weakref.ref[Tensor]] = []

    def fresh(name: str) -> Tensor:
        assert not any(each() is not None for each in handed[:-1])
        tensor = torch.full((4, 3), float(name))
        handed.append(weakref.ref(tensor))
        return tensor

    write_tensors(tmp_path / "file", {str(i): (torch.float16, (4, 3)) for i in range(5)}, fresh)
    assert len(handed) == 5
    assert load_file(tmp_path / "file")["3"].equal(torch.full((4, 3), 3.0).half())
