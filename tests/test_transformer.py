import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kernels.forest_attention import AttentionOptions
from models.config import ModelConfig, read_config
from models.layers import RMSNorm
from models.transformer import Transformer, causal_attend
from models.weights import load_weights, save_pretrained
from tests import tiny

TOKENS = 150  # past every window and past the original length of the llama3 rope


def token_ids(count: int = TOKENS, seed: int = 5) -> Tensor:
    return torch.randint(tiny.VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed))


def oracle_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids[None]).logits[0]
    return logits


def built(config: ModelConfig, dtype: torch.dtype = torch.float32, std: float = 0.1) -> Transformer:
    """A decoder with random weights, norms and biases perturbed."""
    generator = torch.Generator().manual_seed(0)
    model = Transformer(config)
    model.init_weights(generator, std=std)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype)


def tiny_config(tmp_path: Path, family: str, **overrides: Any) -> ModelConfig:
    tiny.hf_config(family, **overrides).save_pretrained(tmp_path)
    return read_config(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_equal_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    oracle = tiny.write_checkpoint(tmp_path, family, tie_word_embeddings=tied)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3, "the checkpoint must be sharded"
    config = read_config(tmp_path)
    assert config.tied == tied
    if family in ("qwen2", "gemma2"):
        assert any(layer.window for layer in config.attention)
    ours = load_weights(tmp_path, config).logits(token_ids())
    expected = oracle_logits(oracle, token_ids())
    assert ours.dtype == torch.float32
    assert expected.abs().max() > 1, "logits near zero would prove little"
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_old_spelling_of_the_config(tmp_path: Path, family: str) -> None:
    tiny.write_checkpoint(tmp_path, family)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    if family == "gemma3_text":
        values["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        values["sliding_window_pattern"] = 2
        rope = rope["full_attention"]
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = None
    if family in ("llama", "gemma3_text", "deepseek_v2"):
        kind = "type" if family == "llama" else "rope_type"
        values["rope_scaling"] = {kind: rope.pop("rope_type")} | rope
    values["torch_dtype"] = values.pop("dtype")
    values.pop("layer_types", None)
    if family == "qwen3_moe":
        values["num_experts"] = values.pop("num_local_experts")
    path.write_text(json.dumps(values))
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ours = load_weights(tmp_path, read_config(tmp_path)).logits(token_ids())
    torch.testing.assert_close(ours, oracle_logits(oracle, token_ids()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
        ("gemma3_text", {"rope_parameters": None, "sliding_window_pattern": 3}),
        ("gemma3_text", {"attn_logit_softcapping": None, "num_key_value_heads": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": False}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("llama", {"head_dim": 32, "num_key_value_heads": 1}),
        ("qwen2", {"num_key_value_heads": 4}),
        ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [], "num_experts_per_tok": 5}),
        ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [], "head_dim": 16}),
        ("deepseek_v2", {"q_lora_rank": 20}),
        ("deepseek_v2", tiny.DEEPSEEK),
    ],
)
def test_variants_equal_transformers(
    tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    oracle = tiny.write_checkpoint(tmp_path, family, **overrides)
    ours = load_weights(tmp_path, read_config(tmp_path)).logits(token_ids(60))
    torch.testing.assert_close(ours, oracle_logits(oracle, token_ids(60)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("published", [False, True])
def test_the_text_model_of_one_that_sees_images(tmp_path: Path, published: bool) -> None:
    """As transformers writes it, and in the names of the published checkpoints. What is saved is
    the text model alone."""
    theirs = tiny.write_with_images(tmp_path / "both", published)
    config = read_config(tmp_path / "both")
    ours = load_weights(tmp_path / "both", config)
    expected = oracle_logits(theirs, token_ids(60))
    torch.testing.assert_close(ours.logits(token_ids(60)), expected, atol=1e-5, rtol=0)
    save_pretrained(ours, tmp_path / "text", tmp_path / "both")
    assert read_config(tmp_path / "text") == config
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager")
    torch.testing.assert_close(oracle_logits(alone, token_ids(60)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_scaled_rope_equals_transformers(
    tmp_path: Path, family: str, scaling: dict[str, Any]
) -> None:
    """Past the original length; `dynamic` up to the end of the context, where ours ends."""
    parameters: dict[str, Any] = {"rope_theta": 10000.0} | scaling
    if family == "gemma3_text":
        plain = {"rope_type": "default", "rope_theta": 500.0}
        parameters = {"full_attention": parameters, "sliding_attention": plain}
    oracle = tiny.write_checkpoint(
        tmp_path, family, rope_parameters=parameters, max_position_embeddings=TOKENS
    )
    ours = load_weights(tmp_path, read_config(tmp_path))
    logits, expected = ours.logits(token_ids()), oracle_logits(oracle, token_ids())
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    more = token_ids(TOKENS + 1)
    if scaling["rope_type"] == "yarn":
        expected = oracle_logits(oracle, more)
        torch.testing.assert_close(ours.logits(more), expected, atol=1e-5, rtol=0)
    else:
        with pytest.raises(ValueError, match=f"{TOKENS + 1} tokens exceed max_position_embeddin"):
            ours.logits(more)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bfloat16_is_no_worse_than_transformers(tmp_path: Path, family: str) -> None:
    oracle = tiny.write_checkpoint(tmp_path, family, dtype=torch.bfloat16)
    config = read_config(tmp_path)
    assert config.dtype == torch.bfloat16
    # With the same bfloat16 weights: what is exact, and what bfloat16 arithmetic costs a token. The
    # median, since a token between two experts may go to the other.
    exact = load_weights(tmp_path, config, torch.float64).logits(token_ids())
    ours = load_weights(tmp_path, config).logits(token_ids())
    assert ours.dtype == torch.float32
    error, theirs = (
        (logits.double() - exact).square().mean(1).sqrt().median()
        for logits in (ours, oracle_logits(oracle, token_ids()))
    )
    assert error <= 1.25 * theirs


def test_embedding_scale_is_rounded_to_the_dtype(tmp_path: Path) -> None:
    """sqrt(72) = 8.485 is 8.5 in bfloat16, and Gemma was trained so."""
    config = tiny_config(tmp_path, "gemma2", hidden_size=72)
    model = built(config, torch.bfloat16)
    seen: list[Tensor] = []
    norm = next(module for module in model.modules() if isinstance(module, RMSNorm))
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.logits([1, 2, 3])
    assert torch.equal(seen[0], model.embed_tokens.weight[1:4] * 8.5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_equal_transformers(tmp_path: Path, family: str) -> None:
    oracle = tiny.write_checkpoint(tmp_path, family).double()
    config = read_config(tmp_path)
    model = load_weights(tmp_path, config, torch.float64)
    ids, positions = token_ids(40), torch.arange(40)
    logits = model.head(model(ids, positions, causal_attend(config)))
    assert logits.dtype == torch.float64
    loss = F.cross_entropy(logits[:-1], ids[1:])
    theirs = oracle(ids[None]).logits[0].double()
    F.cross_entropy(theirs[:-1], ids[1:]).backward()
    loss.backward()
    # Under the names of a checkpoint both have the same.
    for each in (oracle, model):
        with torch.no_grad():
            for name, parameter in each.named_parameters():
                assert parameter.grad is not None, name
                parameter.copy_(parameter.grad)
    oracle.save_pretrained(tmp_path / "theirs", max_shard_size="1GB")
    save_pretrained(model, tmp_path / "ours")
    expected, grads = (load_file(tmp_path / of / "model.safetensors") for of in ("theirs", "ours"))
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        # transformers takes the softmax and norms in float32 even in a float64 model.
        torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v2"])
def test_autocast_trains(family: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, family)
    model = built(config)
    ids, positions = token_ids(40), torch.arange(40)
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model.head(model(ids, positions, causal_attend(config)))
            assert logits.dtype == torch.float32
            F.cross_entropy(logits[:-1], ids[1:]).backward()
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert torch.nn.functional.cosine_similarity(grads[0], grads[1], dim=0) > 0.99


def test_attend_is_called_once_per_layer_with_separate_value_size(tmp_path: Path) -> None:
    config = replace(tiny_config(tmp_path, "qwen3"), v_head_dim=10)
    model = built(config)
    calls: list[int] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(layer)
        assert q.shape == (7, 4, 24) and k.shape == (7, 2, 24) and v.shape == (7, 2, 10)
        return v.repeat_interleave(2, 1)

    hidden = model(token_ids(7), torch.arange(7), attend)
    assert hidden.shape == (7, 64) and calls == [0, 1, 2]


def test_rows_stand_at_the_positions_given(tmp_path: Path) -> None:
    """Two sequences side by side, one of them shifted, equal each alone."""
    config = tiny_config(tmp_path, "llama")
    model = built(config)
    first, second = token_ids(16), token_ids(16, seed=6)
    alone = causal_attend(config)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat(
            [alone(layer, q[i : i + 16], k[i : i + 16], v[i : i + 16]) for i in (0, 16)]
        )

    positions = torch.cat((torch.arange(16), torch.arange(16) + 1000))
    both = model.head(model(torch.cat((first, second)), positions, attend))
    torch.testing.assert_close(both[:16], model.logits(first), atol=1e-5, rtol=0)
    # Rope is relative: a shift changes nothing but float32 rounding of angles up to 1016 radians.
    torch.testing.assert_close(both[16:], model.logits(second), atol=1e-2, rtol=0)


@pytest.mark.parametrize("window", [None, 1, 7, 200])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_causal_attention_in_blocks(
    tmp_path: Path, window: int | None, softcap: float | None
) -> None:
    config = replace(
        tiny_config(tmp_path, "llama"), attention=(AttentionOptions(0.3, softcap, window),)
    )
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(53, 4, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(53, 2, 8, generator=generator, dtype=torch.float64)
    v = torch.randn(53, 2, 6, generator=generator, dtype=torch.float64)
    expected = torch.empty(53, 4, 6, dtype=torch.float64)
    for row in range(53):
        first = 0 if window is None else max(0, row - window + 1)
        for head in range(4):
            scores = 0.3 * k[first : row + 1, head // 2] @ q[row, head]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            expected[row, head] = scores.softmax(0) @ v[first : row + 1, head // 2]
    for max_scores in (1, 4 * 53 * 10, 1 << 24):
        out = causal_attend(config, max_scores)(0, q, k, v)
        torch.testing.assert_close(out, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_do_not_depend_on_each_other(tmp_path: Path, family: str) -> None:
    """The whole forward and head, with an attention that looks at its own row only."""
    config = tiny_config(tmp_path, family, num_hidden_layers=1, intermediate_size=600)
    model = built(config, torch.float64)
    ids, positions = token_ids(), torch.arange(TOKENS).flip(0)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        return v * (q * k).sum(-1, keepdim=True).tanh()

    def run(rows: slice) -> Tensor:
        with torch.no_grad():
            hidden = model(ids[rows], positions[rows], attend)
            return torch.cat((hidden, model.head(hidden)), -1)

    together = run(slice(None))
    assert together.isfinite().all()
    for rows in (slice(0, 1), slice(3, 20), slice(100, TOKENS)):
        torch.testing.assert_close(run(rows), together[rows], rtol=1e-12, atol=1e-12)


def test_init_weights(tmp_path: Path) -> None:
    for family in tiny.FAMILIES:
        model = Transformer(tiny_config(tmp_path, family))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        model.init_weights(torch.Generator().manual_seed(0))
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
        norm = model.norm.weight + (1 if model.config.norm_plus_one else 0)
        assert torch.equal(norm, torch.ones(64))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], r"got \(0,\)"),
        ([[1, 2]], r"got \(1, 2\)"),
        ([1.5], "must be"),
        ([0, tiny.VOCAB_SIZE], f"id {tiny.VOCAB_SIZE} is outside"),
        ([-1], "id -1 is outside"),
        ([1] * 33, "33 tokens exceed max_position_embeddings 32"),
    ],
)
def test_bad_token_ids(tmp_path: Path, ids: list[Any], message: str) -> None:
    model = built(tiny_config(tmp_path, "qwen3", max_position_embeddings=32))
    with pytest.raises(ValueError, match=message):
        model.logits(ids)


def test_logits_take_lists_and_tensors_and_keep_no_graph(tmp_path: Path) -> None:
    model = built(tiny_config(tmp_path, "qwen3"))
    logits = model.logits([3, 1, 2])
    assert torch.equal(logits, model.logits(torch.tensor([3, 1, 2], dtype=torch.int32)))
    assert logits.shape == (3, tiny.VOCAB_SIZE) and not logits.requires_grad


def test_peak_memory_of_long_sequences_is_bounded(tmp_path: Path) -> None:
    """No score block exceeds the bound, counted at the softmax."""
    config = tiny_config(tmp_path, "llama")
    sizes: list[int] = []
    softmax: Callable[..., Tensor] = Tensor.softmax

    def counted(self: Tensor, *args: Any) -> Tensor:
        sizes.append(self.numel())
        return softmax(self, *args)

    q, k = torch.randn(700, 4, 8), torch.randn(700, 2, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "softmax", counted)
        causal_attend(config, max_scores=20000)(0, q, k, k)
    assert max(sizes) <= 20000 and sum(sizes) > 4 * 700 * 700 / 2
