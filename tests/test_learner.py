"""What learners have in common: recomputed activations, dtypes, and the model that samples."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kernels import cpp, packed_linear
from models import decoder, load
from models.config import DTYPES, read_config
from models.lora import AdaptedLinear
from models.scalar_head import decoder_of
from models.transformer import Transformer
from models.weights import stored_dtype
from tests.rows import needs_cpp
from tests.test_generate import flat, make_generator, make_groups, run
from tests.tiny import FAMILIES, write_model
from train.learner import Learner, LearnerArgs
from train.meta_rm import scalar_of
from train.packing import pack
from train.sft import loss_of
from train.trajectories import Trajectory

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
pytestmark = pytest.mark.usefixtures("one_thread")
BATCH = [Trajectory([(5, 6, 7)], list(range(10, 60))), Trajectory([(5, 6, 7)], [8, 9, 2])]


def model_of(directory: Path, family: str = "qwen3", dtype: str = "float32") -> Transformer:
    write_model(directory, family)
    return load(directory, dtype=dtype)[0]


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """The bytes that autograd keeps for the backward, each storage once."""
    seen: dict[int, int] = {}
    total = [0]

    def pack_hook(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        total[0] = sum(seen.values())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        yield total


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_change_no_bit(family: str, tmp_path: Path) -> None:
    model = model_of(tmp_path, family)
    found, kept = [], []
    for recompute in (False, True):
        model.zero_grad()
        learner = Learner(model, LearnerArgs(recompute=recompute))
        with kept_bytes() as total:
            loss = loss_of(learner.model, pack(BATCH))
        kept.append(total[0])
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        assert one.equal(other)
    assert kept[1] < 0.7 * kept[0]  # of three layers, and what embedding and head keep


def test_a_learner_on_one_device_is_the_model_itself(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    learner = Learner(model, LearnerArgs())
    assert learner.model is learner.plain is model


@needs_cpp
@pytest.mark.parametrize("implementation", ["cpp", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_samples_is_the_adapted_model(
    dtype: str, implementation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C++ packs the merged weights, anew after every step; torch adds two thin products."""
    packing = Mock(wraps=packed_linear.pack)
    monkeypatch.setattr(decoder, "pack", packing)
    model = model_of(tmp_path, dtype=dtype)
    args = LearnerArgs(lora_rank=4, lr=1e-2, warmup=0, steps=9, dtype=dtype)  # type: ignore[arg-type]
    learner, untouched = Learner(model, args), load(tmp_path, dtype=dtype)[0]
    assert learner.model is learner.plain is model
    with cpp.torch_only() if implementation == "torch" else nullcontext():
        for step in range(2):
            packing.reset_mock()
            loss = loss_of(model, pack(BATCH))
            loss.backward()
            learner.update(step, loss.item())
            learner.optimizer.zero_grad()
            (result,) = run(make_generator(model), make_groups(1))
            layers = model.config.num_layers
            assert packing.call_count == (4 * layers if implementation == "cpp" else 0)
            off: list[float] = []
            moved: list[float] = []
            for prompt, sample in zip(result.group.prompts, result.generations, strict=True):
                for each, differences in ((model, off), (untouched, moved)):
                    ids = [*flat(list(prompt)), *sample.token_ids]
                    logp = each.logits(ids).log_softmax(-1)[-len(sample.token_ids) - 1 : -1]
                    of_drawn = logp.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
                    differences.append(
                        (of_drawn - torch.tensor(sample.logprobs)).abs().max().item()
                    )
            assert max(off) < (1e-5 if dtype == "float32" else 0.1) < max(moved), step


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
def test_under_adapters_the_dtype_of_the_base_is_written(
    tmp_path: Path, stored: torch.dtype, trained: str, scalar: bool
) -> None:
    """The merged model is the plain one, rounded once; the adapters say what they say in training.
    What none of them adapts is as the base has it, to the bit."""
    base, out = tmp_path / "base", tmp_path / "out"
    write_model(base, dtype=stored, max_shard_size="1GB")
    args = LearnerArgs(lora_rank=2, lora_targets=("v_proj",), dtype=trained, warmup=0)  # type: ignore[arg-type]
    learner: Learner[Any]
    if scalar:
        learner = Learner(scalar_of(base, trained)[0], args)
    else:
        learner = Learner(load(base, dtype=trained)[0], args)
    learning = [p for p in learner.model.parameters() if p.requires_grad]
    torch.stack([parameter.float().sum() for parameter in learning]).sum().backward()
    learner.update(0, 1.0)
    learner.save(out, base)
    kept = torch.float32 if stored == torch.float64 else stored
    config = read_config(out, scalar)
    merged, adapter = load_file(out / WEIGHTS), load_file(out / "adapter" / ADAPTER)
    assert config.dtype == kept == stored_dtype(out) == stored_dtype(base)
    assert {tensor.dtype for tensor in (*merged.values(), *adapter.values())} == {kept}
    v_rows = -config.num_kv_heads * config.v_head_dim
    for i in range(config.num_layers):
        projections = decoder_of(learner.plain).get_submodule(f"layers.{i}.self_attn.qkv_proj")
        assert isinstance(projections, AdaptedLinear)
        value = projections.merged()[v_rows:]
        assert merged[f"model.layers.{i}.self_attn.v_proj.weight"].equal(value.to(kept))
    for name, tensor in load_file(base / WEIGHTS).items():
        if name != "lm_head.weight" or not scalar:
            rounded = tensor.to(DTYPES[trained]).to(kept)
            assert merged[name].equal(rounded) == ("v_proj" not in name), name
    for name, parameter in learner.model.named_parameters():
        if name.endswith("lora_a"):
            layer = name.removeprefix("model.").removesuffix("qkv_proj.lora_a")
            found = adapter[f"base_model.model.model.{layer}v_proj.lora_A.weight"]
            assert found.equal(parameter.to(kept))
    assert ("base_model.model.score.weight" in adapter) == ("score.weight" in merged) == scalar


def test_without_adapters_the_dtype_of_training_is_written(tmp_path: Path) -> None:
    model = model_of(tmp_path / "base")
    write_model(tmp_path / "base", dtype=torch.bfloat16)
    Learner(model, LearnerArgs()).save(tmp_path / "out", tmp_path / "base")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {
        torch.float32
    }
    assert not (tmp_path / "out" / "adapter").exists()


def test_bfloat16_weights_follow_float32_ones(tmp_path: Path) -> None:
    """The same steps from the same rounded weights; what differs is the rounding of activations."""
    low = model_of(tmp_path, dtype="bfloat16")
    wide = load(tmp_path, dtype=torch.float32)[0]
    with torch.no_grad():
        for p, q in zip(wide.parameters(), low.parameters(), strict=True):
            p.copy_(q)
    losses = []
    for model in (wide, low):
        args = LearnerArgs(lr=3e-3, warmup=0, steps=12, weight_decay=0.0)
        learner, own = Learner(model, args), []
        for step in range(10):
            learner.optimizer.zero_grad()
            loss = loss_of(model, pack(BATCH))
            loss.backward()
            learner.update(step, loss.item())
            own.append(loss.item())
        losses.append(own)
        assert all(t.dtype == torch.float32 for t in learner.optimizer.tensors().values())
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert losses[0][-1] < losses[0][0] / 2
    for exact, rounded in zip(*losses, strict=True):
        assert abs(exact - rounded) < 0.03 * exact


def test_what_is_not_finite_names_step_and_rows(tmp_path: Path) -> None:
    learner = Learner(model_of(tmp_path), replace(LearnerArgs(), steps=3))
    with pytest.raises(FloatingPointError, match=r"step 2: loss nan, gradient norm .*; rows a, b$"):
        learner.update(2, float("nan"), ["a", "b"])
