"""What loading and training hold at most, against what the sizes of their tensors come to."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import weights
from models.config import read_config
from models.transformer import Transformer
from models.weights import load_weights, save_pretrained
from tests.resident import resident_peak
from tests.tiny import hf_config, write_tokenizer
from train.scalar import scalar_of

MB = 1 << 20
SLACK = 4 * MB  # what Python and torch take beside tensors, and pages that are read ahead


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint in shards of about 30 MB, its largest tensors half of that."""
    root = tmp_path_factory.mktemp("shards")
    hf = hf_config(
        "qwen3", hidden_size=512, intermediate_size=2048, vocab_size=16000, num_hidden_layers=8,
        tie_word_embeddings=False,
    )  # fmt: skip
    hf.save_pretrained(root)
    model = Transformer(read_config(root))
    model.init_weights()
    save_pretrained(model.bfloat16(), root, root)
    whole = root / "model.safetensors"
    parts: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in load_file(whole).items():
        if sum(each.nbytes for each in parts[-1].values()) + tensor.nbytes > 30 * MB:
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
    shards: Path, dtype: torch.dtype, device: str
) -> None:
    """A device other than the host's has no part in it: "meta" stands for one."""
    config = read_config(shards)
    load_weights(shards, config)  # whatever is done once
    files = [path.stat().st_size for path in shards.glob("*.safetensors")]
    assert len(files) >= 3
    peak, model = resident_peak(lambda: load_weights(shards, config, dtype, device))
    held = sum(p.nbytes for p in model.parameters()) if device == "cpu" else 0
    block = weights._BLOCK * dtype.itemsize if dtype != torch.bfloat16 else 0
    assert max(p.nbytes for p in model.parameters()) > 12 * MB
    assert max(held, max(files) // 2) < peak < held + max(files) + block + SLACK


def test_a_scalar_model_takes_over_the_weights_of_its_decoder(shards: Path) -> None:
    write_tokenizer(shards)
    load_weights(shards, read_config(shards))
    peak, (model, _) = resident_peak(lambda: scalar_of(shards, torch.bfloat16))
    decoder = load_weights(shards, read_config(shards))
    kept = dict(model.model.named_parameters())
    assert kept.keys() == {name for name, _ in decoder.named_parameters()} - {"lm_head.weight"}
    assert all(kept[name].equal(p) for name, p in decoder.named_parameters() if name in kept)
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
    assert not model.score.weight.any()
    held = sum(p.nbytes for p in decoder.parameters())  # its head goes when the rest is there
    largest = max(path.stat().st_size for path in shards.glob("*.safetensors"))
    assert held / 2 < peak < held + largest + SLACK
