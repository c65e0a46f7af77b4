"""Adapters against their formula, merged weights, and the model underneath, which stays."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from models import load
from models.config import read_config
from models.lora import (
    BLOCK_TARGETS,
    TARGETS,
    AdaptedLinear,
    adapters_off,
    add_adapters,
    merged_weight,
    save_adapter,
)
from models.scalar_head import ScalarModel, decoder_of
from models.transformer import Transformer, causal_attend
from models.weights import load_weights, save_pretrained
from tests.tiny import FAMILIES, write_checkpoint, write_model
from train.meta_rm import scalar_of

TOKENS = torch.arange(5, 25)
SOME = [("q_proj",), ("v_proj", "q_proj"), ("k_proj", "o_proj", "up_proj"), ("down_proj",)]


@pytest.fixture(params=["qwen2", "gemma2"])  # biases; norms around
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Transformer:
    write_model(tmp_path, request.param)
    return load(tmp_path, dtype=torch.float64)[0]


def hidden(model: Transformer) -> Tensor:
    return model(TOKENS, torch.arange(len(TOKENS)), causal_attend(model.config))


def adapted(model: Transformer, seed: int = 3, targets: Sequence[str] = TARGETS) -> Transformer:
    """A copy with adapters that do something."""
    copy = deepcopy(model)
    add_adapters(copy, 3, 6.0, targets=targets)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(0, 0.1, generator=generator)
    return copy


def test_it_begins_as_the_model_and_stays_it_with_its_adapters_off(model: Transformer) -> None:
    fresh = deepcopy(model)
    add_adapters(fresh, 3, 6.0)
    assert hidden(fresh).equal(hidden(model))
    moved = adapted(model)
    assert not torch.allclose(hidden(moved), hidden(model))
    with adapters_off(moved):
        assert hidden(moved).equal(hidden(model))
        layers = [layer for layer in moved.modules() if isinstance(layer, AdaptedLinear)]
        assert all(layer.merged() is layer.weight for layer in layers)
        with pytest.raises(KeyError), adapters_off(moved):
            raise KeyError
    assert not torch.allclose(hidden(moved), hidden(model))


def test_every_layer_is_its_formula_and_can_be_merged(model: Transformer) -> None:
    moved, merged = adapted(model), deepcopy(model)
    layers = {n: m for n, m in moved.named_modules() if isinstance(m, AdaptedLinear)}
    assert len(layers) == 4 * model.config.num_layers
    for name, layer in layers.items():
        x = torch.randn(7, layer.in_features, dtype=torch.float64)
        low = torch.einsum("tk,rk->tr", x, layer.lora_a)
        expected = x @ layer.weight.T + 2.0 * torch.einsum("tr,nr->tn", low, layer.lora_b)
        if layer.bias is not None:
            expected = expected + layer.bias
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
        plain = merged.get_submodule(name)
        weight = merged_weight(layer.weight, layer.lora_a, layer.lora_b, layer.scale)
        plain.weight = torch.nn.Parameter(weight)
    torch.testing.assert_close(hidden(merged), hidden(moved), rtol=1e-10, atol=1e-10)


def test_adapters_alone_learn(model: Transformer) -> None:
    moved = adapted(model)
    hidden(moved).square().sum().backward()
    for name, parameter in moved.named_parameters():
        learns = name.rpartition(".")[2] in ("lora_a", "lora_b")
        assert parameter.requires_grad == learns
        assert (parameter.grad is not None and bool(parameter.grad.any())) == learns


def test_a_merged_weight_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (
        torch.randn(s, generator=generator).bfloat16() for s in ((8, 5), (2, 5), (8, 2))
    )
    exact = weight.double() + 0.3 * b.double() @ a.double()
    merged = merged_weight(weight, a, b, 0.3)
    assert merged.dtype == torch.bfloat16
    assert merged.equal(exact.float().bfloat16())


@pytest.mark.parametrize(("rank", "alpha"), [(0, 1.0), (-1, 1.0), (2, 0.0), (2, float("nan"))])
def test_adapters_without_sense_are_refused(model: Transformer, rank: int, alpha: float) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} and alpha"):
        add_adapters(model, rank, alpha)


@pytest.mark.parametrize("targets", SOME)
def test_what_is_no_target_is_not_adapted_by_a_bit(
    model: Transformer, targets: Sequence[str], tmp_path: Path
) -> None:
    """Nor does it learn: a fused layer is the sum of its projections, adapted or not."""
    moved = adapted(model, targets=targets)
    optimizer = torch.optim.SGD([p for p in moved.parameters() if p.requires_grad], lr=1e-4)
    hidden(moved).square().sum().backward()
    optimizer.step()
    merged, layers = deepcopy(model), 0
    for name, layer in moved.named_modules():
        if isinstance(layer, AdaptedLinear):
            layers += 1
            assert layer.lora_b.any() and len(layer.lora_b) == sum(layer.targets.values())
            wide = layer.spread(layer.lora_b)
            weight = merged_weight(layer.weight, layer.lora_a, wide, layer.scale)
            merged.get_submodule(name).weight = torch.nn.Parameter(weight)
    fused = {"k_proj": "qkv", "q_proj": "qkv", "v_proj": "qkv"}
    assert layers == model.config.num_layers * len({fused.get(name, name) for name in targets})
    torch.testing.assert_close(hidden(merged), hidden(moved), rtol=1e-10, atol=1e-10)
    save_pretrained(model, tmp_path / "began_as")
    save_pretrained(merged, tmp_path / "merged")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("began_as", "merged"))
    for name, value in after.items():
        is_target = any(name.endswith(f".{target}.weight") for target in targets)
        assert value.equal(before[name]) != is_target, name
        if is_target:
            assert (value != before[name]).any(1).all()  # each of its rows


@pytest.mark.parametrize("targets", [("qkv_proj",), ("q_proj", "Q_proj"), ("lm_head",), ()])
def test_unknown_targets_are_refused(model: Transformer, targets: Sequence[str]) -> None:
    named = targets[-1] if targets else "nothing"
    with pytest.raises(ValueError, match=f"adapters of {named}: known are q_proj, .*, down_proj$"):
        add_adapters(model, 3, 6.0, targets=targets)


@pytest.mark.parametrize("targets", [TARGETS, ("v_proj", "gate_proj", "q_proj")])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_in_a_file_is_what_peft_makes_of_it(
    tmp_path: Path, family: str, scalar: bool, targets: Sequence[str]
) -> None:
    """Names are those of the modules in transformers; a weight becomes base + alpha / r B A."""
    base = tmp_path / "base"
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    model: Transformer | ScalarModel
    write_model(base, family)
    model = scalar_of(base)[0] if scalar else load(base, dtype=torch.float32)[0]
    merged = deepcopy(model)
    add_adapters(decoder_of(model), 3, 7.5, seed=1, targets=targets)
    generator = torch.Generator().manual_seed(2)
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in learnt.values():
            parameter.normal_(0, 0.1, generator=generator)
        for name, layer in model.named_modules():
            if isinstance(layer, AdaptedLinear):
                wide = layer.spread(layer.lora_b)
                weight = merged_weight(layer.weight, layer.lora_a, wide, layer.scale)
                merged.get_parameter(f"{name}.weight").copy_(weight)
        if isinstance(merged, ScalarModel):
            merged.score.weight.copy_(learnt["score.weight"])
    save_pretrained(merged, tmp_path, base)
    save_adapter(model, tmp_path / "adapter", base, torch.float32)

    theirs = auto.from_pretrained(
        base, dtype=torch.float32, **({"num_labels": 1} if scalar else {})
    )
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == str(base)
    assert config["task_type"] == ("SEQ_CLS" if scalar else "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"]) == (3, 7.5)
    own = {name.rpartition(".")[2] for name, _ in theirs.named_modules()} & {*targets}
    if any(decoder_of(model).config.experts):
        own -= BLOCK_TARGETS
    assert config["target_modules"] == [each for each in TARGETS if each in own]
    assert config["modules_to_save"] == (["score"] if scalar else None)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    with torch.no_grad():
        if scalar:
            theirs.score.weight.copy_(adapter.pop("base_model.model.score.weight"))
        without = theirs.eval()(TOKENS[None]).logits
        for name, module in theirs.named_modules():
            if name.rpartition(".")[2] in own:
                a, b = (adapter.pop(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
                assert a.shape == (3, module.in_features) and b.shape == (module.out_features, 3)
                module.weight.add_(7.5 / 3 * b.double() @ a.double())
        assert not adapter
        ours = auto.from_pretrained(tmp_path)
        expected, found = (each.eval()(TOKENS[None]).logits for each in (theirs, ours))
    assert (found - expected).abs().max() < 1e-3 * (expected - without).abs().max()


def test_targets_that_the_model_does_not_have(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "deepseek_v2")
    model = Transformer(read_config(tmp_path))
    with pytest.raises(ValueError, match=r"adapters of v_proj: the model has .*kv_a_proj_with_mqa"):
        add_adapters(model, 3, 6.0, targets=("v_proj",))
    add_adapters(model, 3, 6.0, targets=("v_proj", "q_proj"))
    names = {
        name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, AdaptedLinear)
    }
    assert names == {"qkv_proj"}


def test_an_adapter_in_a_file_has_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", "qwen3")
    model = load_weights(tmp_path / "base", read_config(tmp_path / "base"))
    add_adapters(model, 3, 7.5)
    adapted = model.layers[1].get_submodule("self_attn.qkv_proj")
    assert isinstance(adapted, AdaptedLinear)
    save_adapter(model, tmp_path, tmp_path / "base", torch.bfloat16)
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    for layer in ("q", "k", "v"):
        found = adapter[f"base_model.model.model.layers.1.self_attn.{layer}_proj.lora_A.weight"]
        assert found.equal(adapted.lora_a.bfloat16())


@pytest.mark.parametrize("scalar", [False, True])
def test_an_adapted_model_is_written_merged(tmp_path: Path, scalar: bool) -> None:
    """A fused layer is merged once for all its projections."""
    write_model(tmp_path / "base", "qwen2")
    model = scalar_of(tmp_path / "base")[0] if scalar else load(tmp_path / "base")[0]
    merged = deepcopy(model)
    add_adapters(decoder_of(model), 3, 7.5)
    asked: Counter[str] = Counter()
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, AdaptedLinear):
                layer.lora_b.normal_(0, 0.1)
                merged.get_parameter(f"{name}.weight").copy_(layer.merged())
                layer.merged = counting(layer.merged, asked, name)  # type: ignore[method-assign]
    for each, out in ((model, "adapted"), (merged, "merged")):
        save_pretrained(each, tmp_path / out, tmp_path / "base")
    assert set(asked.values()) == {1} and len(asked) == 4 * len(decoder_of(model).layers)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "adapted" / file).read_bytes() == (
            tmp_path / "merged" / file
        ).read_bytes()


def counting(merge: Callable[[], Tensor], asked: Counter[str], name: str) -> Callable[[], Tensor]:
    def counted() -> Tensor:
        asked[name] += 1
        return merge()

    return counted
