"""Mixtures of experts: configs, the blocks of DeepSeek-V2, checkpoints, and the C++ decoder."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from kernels import cpp, packed_linear
from kernels.route import Routing
from kernels.sample_token import SamplingOptions
from models.config import read_config
from models.experts_config import Experts, experts_values, read_experts
from models.files import Reader
from models.lora import TARGETS, AdaptedLinear, add_adapters
from models.transformer import ExpertsMLP, linear
from models.weights import load_weights, save_pretrained
from tests import tiny
from tests.rows import needs_cpp
from tests.test_cpp import assert_alike
from tests.test_generate import drawn, make_generator, make_groups, run
from tests.test_transformer import built, oracle_logits, tiny_config, token_ids
from train.packing import hidden_states, pack, packed_attention
from train.trajectories import Trajectory

QWEN3_MOE: dict[str, Any] = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True,
    "mlp_only_layers": [], "decoder_sparse_step": 1, "router_aux_loss_coef": 0.001,
}  # fmt: skip
# As DeepSeek-V2's authors spell it, but for the sizes; what V2-Lite has is its own.
DEEPSEEK_V2: dict[str, Any] = {
    "n_routed_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
    "n_shared_experts": 2, "norm_topk_prob": False, "scoring_func": "softmax",
    "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
    "routed_scaling_factor": 16.0, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "aux_loss_alpha": 0.001, "seq_aux": True,
}  # fmt: skip
LITE = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}


def experts_of(
    values: dict[str, Any], architecture: str = "qwen3_moe", layers: int = 4
) -> tuple[Experts | None, ...]:
    return read_experts(Reader(Path("config.json"), values), architecture, layers)


def test_experts_of_qwen3_moe() -> None:
    own = Experts(8, 24, Routing(2, normalise=True))
    assert experts_of(QWEN3_MOE) == (own,) * 4
    assert experts_of(QWEN3_MOE | {"mlp_only_layers": [0, 2]}) == (None, own, None, own)
    mixed = experts_of(QWEN3_MOE | {"mlp_only_layers": [3], "decoder_sparse_step": 2})
    assert mixed == (None, own, None, None)
    renamed = QWEN3_MOE | {"num_local_experts": 8}
    assert experts_of(renamed) == (own,) * 4
    del renamed["num_experts"], renamed["norm_topk_prob"], renamed["mlp_only_layers"]
    assert experts_of(renamed) == (Experts(8, 24, Routing(2)),) * 4


def test_experts_of_deepseek_v2() -> None:
    own = Experts(12, 24, Routing(3, False, 16.0, 4, 2), 48)
    assert experts_of(DEEPSEEK_V2, "deepseek_v2") == (None, own, own, own)
    plain = Experts(12, 24, Routing(3), 48)
    assert experts_of(DEEPSEEK_V2 | LITE, "deepseek_v2") == (None, plain, plain, plain)
    # The groups of a router that does not look at them say nothing.
    bare = {"topk_method": "greedy", "routed_scaling_factor": None, "first_k_dense_replace": 0}
    assert experts_of(DEEPSEEK_V2 | bare, "deepseek_v2") == (plain,) * 4
    alone = experts_of(DEEPSEEK_V2 | LITE | {"n_shared_experts": None}, "deepseek_v2")
    assert alone[1] == replace(plain, shared_intermediate_size=0)


def test_dense_layers_alone() -> None:
    """Of another family, and where the keys leave no layer with experts."""
    assert experts_of(QWEN3_MOE, "qwen3") == (None,) * 4
    assert experts_of({"mlp_only_layers": [0, 1, 2, 3]}) == (None,) * 4
    assert experts_of({"first_k_dense_replace": 4}, "deepseek_v2") == (None,) * 4


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("qwen3_moe", QWEN3_MOE | {"mlp_only_layers": [1, 3]}),
        ("qwen3_moe", QWEN3_MOE | {"decoder_sparse_step": 2, "norm_topk_prob": False}),
        ("deepseek_v2", DEEPSEEK_V2),
        ("deepseek_v2", DEEPSEEK_V2 | LITE | {"first_k_dense_replace": 0}),
        ("deepseek_v2", DEEPSEEK_V2 | {"n_shared_experts": None}),
        ("deepseek_v2", DEEPSEEK_V2 | {"first_k_dense_replace": 4}),
        ("qwen3_moe", QWEN3_MOE | {"decoder_sparse_step": 5}),
    ],
)
def test_written_experts_read_back(architecture: str, values: dict[str, Any]) -> None:
    experts = experts_of(values, architecture)
    assert experts_of(experts_values(architecture, experts), architecture) == experts


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("qwen3_moe", {"num_experts": None}, "one of num_experts, num_local_experts, n_routed_ex"),
        ("qwen3_moe", {"num_local_experts": 9}, "num_experts 8, num_local_experts 9 contradict"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts must be a positive integer, got 0"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok must be at most 8, got 9"),
        ("qwen3_moe", {"num_experts_per_tok": None}, "num_experts_per_tok must be a positive"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size must be a positive"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers must be a list of integers, got 1"),
        ("qwen3_moe", {"mlp_only_layers": [True]}, "mlp_only_layers must be a list of integers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive"),
        ("qwen3_moe", {"scoring_func": "sigmoid"}, "scoring_func must be 'softmax', got 'sigmoid'"),
        ("qwen3_moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor has no meaning for q"),
        ("qwen3_moe", {"n_shared_experts": 1}, "n_shared_experts has no meaning for qwen3_moe"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func must be 'softmax'"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method must be 'greedy' or .*noaux_tc"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is not supported for deepseek"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq other than 1 is not supported"),
        ("deepseek_v2", {"n_group": 5}, "n_group 5 does not divide 12 experts"),
        ("deepseek_v2", {"n_group": None}, "n_group must be a positive integer"),
        ("deepseek_v2", {"topk_group": 5}, "topk_group must be at most 4, got 5"),
        ("deepseek_v2", {"num_experts_per_tok": 7}, "7 exceeds the experts of topk_group 2 groups"),
        ("deepseek_v2", {"n_shared_experts": -1}, "n_shared_experts must be a positive integer"),
        ("deepseek_v2", {"routed_scaling_factor": 0}, "routed_scaling_factor must be a positive"),
    ],
)
def test_what_is_not_understood_is_refused(
    architecture: str, change: dict[str, Any], message: str
) -> None:
    values = QWEN3_MOE if architecture == "qwen3_moe" else DEEPSEEK_V2
    with pytest.raises(ValueError, match=f"^config.json: .*{message}"):
        experts_of(values | change, architecture)


def test_a_window_of_qwen3_moe_is_refused(tmp_path: Path) -> None:
    """Transformers slides in all layers there, whatever max_window_layers says."""
    values = tiny.hf_config("qwen3_moe").to_dict() | {
        "architectures": ["Qwen3MoeForCausalLM"], "use_sliding_window": True, "sliding_window": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="use_sliding_window is not supported"):
        read_config(tmp_path)


@pytest.mark.parametrize("in_cpp", [False, pytest.param(True, marks=needs_cpp)])
@pytest.mark.parametrize("change", [{}, LITE, {"n_shared_experts": 1, "topk_group": 1}], ids=str)
def test_a_block_of_deepseek_v2_is_that_of_transformers(
    tmp_path: Path, change: dict[str, Any], in_cpp: bool, request: pytest.FixtureRequest
) -> None:
    if not in_cpp:
        request.getfixturevalue("in_torch")
    values = DEEPSEEK_V2 | change
    config = DeepseekV2Config(hidden_size=64, hidden_act="silu", **values)
    config._experts_implementation = "eager"
    theirs = DeepseekV2Moe(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    own = experts_of(values, "deepseek_v2")[1]
    assert own is not None
    ours = ExpertsMLP(replace(tiny_config(tmp_path, "qwen3"), hidden_size=64), own)
    state = theirs.state_dict()
    for halves in [name for name in state if "shared_experts.gate_proj" in name]:
        rows = state.pop(halves), state.pop(halves.replace("gate_proj", "up_proj"))
        state[halves.replace("gate_proj", "gate_up_proj")] = torch.cat(rows)
    ours.load_state_dict(state)
    x = torch.randn(50, 64, generator=generator)
    with torch.no_grad():
        found, expected = ours(x, linear), theirs(x[None])[0]
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    assert expected.abs().max() > 0.1


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny.write_checkpoint(tmp_path, "qwen3_moe", max_shard_size="1GB")
    return tmp_path


def gate_up(directory: Path) -> Tensor:
    weight = (
        load_weights(directory, read_config(directory))
        .layers[2]
        .get_parameter("mlp.experts.gate_up_proj")
    )
    return weight.detach()


def test_every_expert_has_its_place(checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    weight = gate_up(checkpoint)
    assert weight.shape == (5, 80, 64)
    for expert, own in enumerate(weight):
        names = [f"model.layers.2.mlp.experts.{expert}.{p}_proj.weight" for p in ("gate", "up")]
        assert own.equal(torch.cat([stored[name] for name in names]))


DOWN = "model.layers.2.mlp.experts.3.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(DOWN), f"missing tensor {DOWN} "),
        (lambda t: t.pop(DOWN.replace("3.down", "0.up")), r"missing tensor .*experts\.0\.up_proj"),
        (lambda t: t.pop("model.layers.0.mlp.gate.weight"), r"missing tensor .*0\.mlp\.gate"),
        (lambda t: t.update({DOWN.replace("3", "5"): t[DOWN] + 0}), r"extra .*experts\.5\.down_p"),
        (lambda t: t.update({DOWN: t[DOWN][:, :-1].clone()}), r"must have shape \(64, 40\), got"),
        (lambda t: t[DOWN].fill_(torch.inf), f"{DOWN} is not finite"),
        (lambda t: t.update({DOWN.replace("3.down_proj.weight", "down_proj"): t[DOWN][None] + 0}),
         r"extra tensor .*mlp\.experts\.down_proj"),
    ],
)  # fmt: skip
def test_a_checkpoint_without_all_of_an_expert_is_refused(
    checkpoint: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_weights(checkpoint, read_config(checkpoint))


def test_what_is_saved_has_a_tensor_for_each_expert(checkpoint: Path, tmp_path: Path) -> None:
    """Under the names of the published checkpoints, and with the same logits in transformers."""
    model = load_weights(checkpoint, read_config(checkpoint))
    with torch.no_grad():
        model.get_parameter("layers.2.mlp.experts.gate_up_proj")[4, 1] += 3
    save_pretrained(model, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    kinds = Counter(re.sub(r"\.\d+\.", ".N.", name) for name in stored if ".mlp." in name)
    assert kinds["model.layers.N.mlp.gate.weight"] == 2
    assert kinds["model.layers.N.mlp.gate_proj.weight"] == 1
    for part in ("gate", "up", "down"):
        assert kinds[f"model.layers.N.mlp.experts.N.{part}_proj.weight"] == 10
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager", experts_implementation="eager"
    )
    expected = oracle_logits(theirs, token_ids(60))
    torch.testing.assert_close(model.logits(token_ids(60)), expected, atol=1e-5, rtol=0)


@needs_cpp
def test_the_decoder_with_groups_and_a_shared_block(tmp_path: Path) -> None:
    """As DeepSeek-V2 has them, in C++ and in torch: tokens and log-probs."""
    config = tiny_config(tmp_path, "qwen3_moe")
    own = Experts(6, 40, Routing(2, False, 2.5, 3, 2), 72)
    model = built(replace(config, experts=(None, own, replace(own, shared_intermediate_size=0))))
    groups = make_groups(3, k=4, longest=40)

    def sample() -> list:
        generator = make_generator(model, max_batch=7, options=SamplingOptions(0.8))
        return [drawn(result) for result in run(generator, groups)]

    ours = sample()
    with cpp.torch_only():
        assert_alike(sample(), ours)


@pytest.mark.parametrize("targets", [TARGETS, ("up_proj", "o_proj", "q_proj")])
def test_adapters_are_those_of_attention(checkpoint: Path, targets: Sequence[str]) -> None:
    """In dense layers too: peft would take their names for those of routed experts."""
    model = load_weights(checkpoint, read_config(checkpoint))
    add_adapters(model, 2, 4.0, targets=targets)
    adapted = [name for name, m in model.named_modules() if isinstance(m, AdaptedLinear)]
    assert len(adapted) == 2 * model.config.num_layers
    assert not any("mlp" in name for name in adapted)


def test_adapters_of_blocks_alone_are_refused(tmp_path: Path) -> None:
    model = built(tiny_config(tmp_path, "qwen3_moe"))
    has = "the model has k_proj, o_proj, q_proj, v_proj"
    with pytest.raises(ValueError, match=f"adapters of up_proj, down_proj: {has}$"):
        add_adapters(model, 2, 4.0, targets=("up_proj", "down_proj"))


@needs_cpp
def test_training_keeps_no_packed_copy_of_an_expert(checkpoint: Path) -> None:
    model = load_weights(checkpoint, read_config(checkpoint))
    batch = pack([Trajectory([(5, 6, 7)], (8, 9, 10))])
    own = {id(parameter) for parameter in model.parameters()}
    kept = lambda: own & {id(weight) for weight in packed_linear._packed}  # noqa: E731
    with torch.no_grad():
        found = hidden_states(model, batch)
        assert not kept()
        attend = packed_attention(model.config, batch)
        sampled = model(batch.token_ids, batch.positions, attend)[batch.predicting]
    assert len(kept()) > 2 and sampled.equal(found)
