"""What loading and training hold at most, against what the sizes of their tensors come to."""

import gc
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

from engine.kv_cache import KVCache
from kernels.extract_scores import ScoreAutomaton
from models import weights
from models.config import read_config
from models.transformer import Transformer
from models.weights import load_weights, save_pretrained
from tests.allocations import peak_bytes
from tests.args import args_of
from tests.rows import needs_cpp
from tests.tiny import hf_config, write_tokenizer
from train import grpo
from train.scalar import scalar_of

MB = 1 << 20
SLACK = MB // 2  # headers of files, and single numbers


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint in shards of about 30 MB: the embedding, the head, and the layers."""
    root = tmp_path_factory.mktemp("shards")
    hf = hf_config(
        "qwen3", hidden_size=512, intermediate_size=2048, vocab_size=32000, num_hidden_layers=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    hf.save_pretrained(root)
    model = Transformer(read_config(root))
    model.init_weights()
    save_pretrained(model.bfloat16(), root, root)
    whole = root / "model.safetensors"
    parts: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in load_file(whole).items():
        if sum(each.nbytes for each in parts[-1].values()) + tensor.nbytes > 32 * MB:
            parts.append({})
        parts[-1][name] = tensor
    whole.unlink()
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts):
        save_file(part, root / f"{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"{number}.safetensors")
    index = json.dumps({"weight_map": weight_map})
    (root / "model.safetensors.index.json").write_text(index)
    return root


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loading_takes_the_model_a_shard_and_a_block(
    shards: Path, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device other than the host's has no part in it: "meta" stands for one."""
    monkeypatch.setattr(weights, "_BLOCK", MB)
    config = read_config(shards)
    files = [path.stat().st_size for path in shards.glob("*.safetensors")]
    assert len(files) >= 3
    peak, model = peak_bytes(lambda: load_weights(shards, config, dtype, device))
    held = sum(p.nbytes for p in model.parameters()) if device == "cpu" else 0
    block = 0 if dtype == torch.bfloat16 else MB * dtype.itemsize
    largest = max(p.nbytes for p in model.parameters())
    assert largest > 30 * MB * dtype.itemsize // 2 and largest > 2 * (block + SLACK)
    assert held + max(files) - SLACK < peak < held + max(files) + block + SLACK


def test_a_scalar_model_takes_over_the_weights_of_its_decoder(shards: Path) -> None:
    write_tokenizer(shards)
    peak, (model, _) = peak_bytes(lambda: scalar_of(shards, torch.bfloat16))
    decoder = load_weights(shards, read_config(shards))
    kept = dict(model.model.named_parameters())
    assert kept.keys() == {name for name, _ in decoder.named_parameters()} - {"lm_head.weight"}
    assert all(kept[name].equal(p) for name, p in decoder.named_parameters() if name in kept)
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
    assert not model.score.weight.any()
    held = sum(p.nbytes for p in decoder.parameters())  # its head goes when the rest is there
    largest = max(path.stat().st_size for path in shards.glob("*.safetensors"))
    assert held < peak < held + largest + SLACK


def live() -> set[tuple[int, int]]:
    """The storages of all tensors that Python knows of, gradients and packed weights included; but
    for caches, and the automata that read scores."""
    gc.collect()
    objects = gc.get_objects()
    known = [each for each in objects if issubclass(type(each), torch.Tensor)]
    known += [each.grad for each in known if each.is_leaf and each.grad is not None]
    others = [vars(each) for each in objects if type(each) in (KVCache, ScoreAutomaton)]
    return storages(known).items() - storages(tree_leaves(others)).items()


def storages(objects: Iterable[object]) -> dict[int, int]:
    """The addresses and sizes of the storages of those that are tensors on the CPU."""
    tensors = [each for each in objects if isinstance(each, torch.Tensor) and each.is_cpu]
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@pytest.mark.soak
@needs_cpp
def test_under_adapters_the_base_is_there_once(tmp_path: Path) -> None:
    """For learner, reference and judge. What is packed for sampling goes with the sampling, but for
    the head, which no adapter changes."""
    before = live()
    args = args_of(
        grpo.Args, out=tmp_path, rows=1, group=2, lora_rank=4, max_new_tokens=16,
        dtype="bfloat16",
    )  # fmt: skip
    trainer = grpo.GrpoTrainer(args)
    trainer.judge.cache_bytes = 2 * MB
    base = adapters = learning = linear = 0
    for name, parameter in trainer.learner.model.named_parameters():
        if parameter.requires_grad:
            adapters += parameter.nbytes
            learning += parameter.numel()
        else:
            base += parameter.nbytes
        linear += parameter.nbytes if name.endswith("_proj.weight") else 0
    head = trainer.learner.model.head_weight.nbytes

    def held() -> int:
        return sum(size for _, size in live() - before)

    states = learning * 4 * 4  # float32 masters, their gradients and two moments
    rest = MB // 2  # states of live samples, cosines and sines, partial attention
    assert 0 < held() - base - adapters < states + rest
    trainer.step(0)
    assert trainer.reference is not None
    assert head <= held() - base - adapters - states < head + rest

    verdicts = trainer.judge.rows(trainer.rows(0), k=2, max_new_tokens=16)
    next(verdicts)
    assert linear <= held() - base - adapters - states - head < linear + rest
    del verdicts
    assert held() - base - adapters - states < head + rest
