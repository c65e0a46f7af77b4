"""Adapters against their formula, merged weights, and the model underneath, which stays."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import load
from models.lora import AdaptedLinear, adapters_off, add_adapters, merged_weight
from models.transformer import Transformer, causal_attend
from tests.tiny import write_model

TOKENS = torch.arange(5, 25)


@pytest.fixture(params=["qwen2", "gemma2"])  # biases; norms around
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Transformer:
    write_model(tmp_path, request.param)
    return load(tmp_path, dtype=torch.float64)[0]


def hidden(model: Transformer) -> Tensor:
    return model(TOKENS, torch.arange(len(TOKENS)), causal_attend(model.config))


def adapted(model: Transformer, seed: int = 3) -> Transformer:
    """A copy with adapters that do something."""
    copy = deepcopy(model)
    add_adapters(copy, 3, 6.0)
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
