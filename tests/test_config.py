import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoConfig, Gemma2Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.kv_cache import cell_bytes
from kernels.forest_attention.schedule import keys_per_partial
from kernels.route import Routing
from models.config import (
    ARCHITECTURES,
    SCALAR_ARCHITECTURES,
    Latent,
    ModelConfig,
    hf_config,
    read_config,
)
from models.experts_config import Experts
from models.files import parse_json, read_text
from models.rope import DynamicScaling, LinearScaling, Llama3Scaling, Rope, YarnScaling
from tests import tiny

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 7,
    "torch_dtype": "bfloat16",
}
LLAMA = {
    **{key: value for key, value in QWEN3.items() if key != "head_dim"},
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
}
GEMMA2 = {
    **{key: value for key, value in QWEN3.items() if key not in ("hidden_act",)},
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 144,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 32,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALING = {key: value for key, value in tiny.LLAMA3_ROPE.items() if key != "rope_theta"}

DEEPSEEK_V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
    "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 1.0,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 1,
    "topk_method": "greedy", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 102400,
}  # fmt: skip


def write(
    directory: Path, values: dict[str, Any], generation: dict[str, Any] | None = None
) -> Path:
    (directory / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def windows(directory: Path, values: dict[str, Any]) -> list[int | None]:
    return [layer.window for layer in read_config(write(directory, values)).attention]


def test_qwen3(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, QWEN3))
    assert config.architecture == "qwen3"
    assert (config.num_heads, config.num_kv_heads) == (6, 3)
    assert (config.head_dim, config.v_head_dim) == (16, 16)
    assert config.rope[0] == Rope(1000000.0, None)
    assert config.attention[3].scale == 0.25
    assert config.attention[3].softcap is None and config.attention[3].window is None
    assert config.qk_norm and not config.attention_bias and not config.norm_plus_one
    assert config.tied and config.embedding_scale is None and config.final_softcap is None
    assert config.dtype == torch.bfloat16 and config.activation == "silu"


def test_gemma2(tmp_path: Path) -> None:
    values = {key: value for key, value in GEMMA2.items() if key != "tie_word_embeddings"}
    config = read_config(write(tmp_path, values))
    assert config.tied, "Gemma ties its head unless told otherwise"
    assert config.norm_plus_one and config.sandwich_norms and config.activation == "gelu_tanh"
    assert config.embedding_scale == pytest.approx(48**0.5)
    assert config.attention[0].scale == pytest.approx(1 / 12)
    assert config.attention[0].softcap == 50.0 and config.final_softcap == 30.0
    assert [layer.window for layer in config.attention] == [32, None, 32, None]


GEMMA3: dict[str, Any] = GEMMA2 | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 7,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


def test_gemma3(tmp_path: Path) -> None:
    """Every sixth layer sees all keys, and has a rope of its own."""
    config = read_config(write(tmp_path, GEMMA3))
    near, far = Rope(10000.0, None), Rope(1000000.0, LinearScaling(8.0))
    assert config.rope == (near, near, near, near, near, far, near)
    assert [layer.window for layer in config.attention] == [32] * 5 + [None, 32]
    assert config.qk_norm and config.norm_plus_one and config.sandwich_norms and config.tied
    assert config.attention[0].softcap is None and config.final_softcap is None
    bare = {key: value for key, value in GEMMA3.items() if "soft" not in key and "rope" not in key}
    config = read_config(write(tmp_path, bare))
    assert {config.rope[0], config.rope[5]} == {near, Rope(1000000.0, None)}
    # The published 4B says so much of its text model, and no more.
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "model_type": "gemma3_text", "sliding_window": 1024,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # fmt: skip
    both = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
            "eos_token_id": [1, 106], "torch_dtype": "bfloat16", "text_config": text}  # fmt: skip
    config = read_config(write(tmp_path, both))
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.vocab_size == 262208 and config.max_position_embeddings == 131072
    assert config.eos_token_ids == {1, 106} and config.dtype == torch.bfloat16 and config.tied
    assert config.rope[5] == far and config.attention[5].window is None
    for values, message in (
        ({"rope_parameters": {"sliding_attention": 7}}, "sliding_attention must be an object"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "text_config must be an object"),
        ({"rope_local_base_freq": -1}, "rope_theta must be a positive number, got -1"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern must be a positive integer"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}, "rope_scaling": None},
            "rope_theta 1000000.0 contradicts 5.0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            read_config(write(tmp_path, GEMMA3 | values))


def test_deepseek_v2_lite(tmp_path: Path) -> None:
    """Keys and values as its authors publish them, with code that is not run."""
    config = read_config(write(tmp_path, DEEPSEEK_V2_LITE))
    assert config.latent == Latent(None, 512, 128, 64)
    assert (config.head_dim, config.v_head_dim) == (192, 128)
    assert config.max_position_embeddings == 163840
    assert [own is None for own in config.experts] == [True] + [False] * 26
    assert config.experts[1] == Experts(64, 1408, Routing(6), 2816)
    assert config.attention[26].scale == pytest.approx(1.5896 * 192**-0.5, rel=1e-4)
    # 30.4 KiB of a token's latents and of what rope has turned.
    assert cell_bytes(config, torch.bfloat16) == 27 * (512 + 64) * 2
    assert "auto_map" not in hf_config(config, base=DEEPSEEK_V2_LITE)
    partial_bytes, key_bytes = 2 * 4 * 16 * (512 + 1), 2 * (512 + 64)
    keys = keys_per_partial(16, config.cached_value_dim, config.cell_width, torch.bfloat16)
    assert keys == partial_bytes // key_bytes


@pytest.mark.parametrize(
    ("code", "reads"),
    [
        ("modeling_deepseek.DeepseekV2Model", True),
        # As transformers writes what it read by a name.
        ("deepseek-ai/DeepSeek-V2-Lite--modeling_deepseek.DeepseekV2Model", True),
        ("modeling_own.DeepseekV2Model", False),
        ("modeling_deepseek.Own", False),
        ("a/b/c--modeling_deepseek.DeepseekV2Model", False),
    ],
)
def test_code_beside_a_deepseek_v2(tmp_path: Path, code: str, reads: bool) -> None:
    write(tmp_path, DEEPSEEK_V2_LITE | {"auto_map": {"AutoModel": code}})
    if reads:
        assert read_config(tmp_path).latent is not None
        return
    with pytest.raises(ValueError, match="auto_map names code"):
        read_config(tmp_path)


def test_no_mscale_may_be_written_as_0(tmp_path: Path) -> None:
    scaling: dict[str, Any] = DEEPSEEK_V2_LITE["rope_scaling"]
    ropes = []
    for changes in ({"mscale": 0, "mscale_all_dim": 0.0}, {"mscale": None, "mscale_all_dim": None}):
        values = DEEPSEEK_V2_LITE | {"rope_scaling": scaling | changes}
        ropes.append(read_config(write(tmp_path, values)).rope)
    assert ropes[0] == ropes[1]


def test_head_dim_and_kv_heads_have_the_usual_defaults(tmp_path: Path) -> None:
    values = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    config = read_config(write(tmp_path, values))
    assert (config.head_dim, config.num_kv_heads) == (8, 6)
    assert not config.tied or LLAMA["tie_word_embeddings"]


def test_soft_caps_may_be_null(tmp_path: Path) -> None:
    values = GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = read_config(write(tmp_path, values))
    assert config.attention[0].softcap is None and config.final_softcap is None


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500000.0, "rope_scaling": SCALING},
        {
            "rope_theta": 500000.0,
            "rope_scaling": {"type": "llama3"}
            | {key: value for key, value in SCALING.items() if key != "rope_type"},
        },
        {"rope_theta": None, "rope_parameters": tiny.LLAMA3_ROPE},
        {"rope_theta": 500000.0, "rope_parameters": tiny.LLAMA3_ROPE, "rope_scaling": None},
    ],
)
def test_every_spelling_of_llama3_rope(tmp_path: Path, spelling: dict[str, Any]) -> None:
    config = read_config(write(tmp_path, LLAMA | spelling))
    assert config.rope[0] == Rope(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 64))


def test_rope_theta_defaults_to_ten_thousand(tmp_path: Path) -> None:
    values = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    assert read_config(write(tmp_path, values)).rope[0] == Rope(10000.0, None)


SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.5},
    SCALING,
    SCALING | {"original_max_position_embeddings": 8192},
    YARN,
    YARN | {"original_max_position_embeddings": 32768},
    YARN | {"original_max_position_embeddings": 2**24},
    YARN | {"original_max_position_embeddings": 8192, "rope_theta": 10.0, "beta_fast": 1e3},
    YARN | {"factor": 0.5},
    YARN | {"factor": 1.0},
    YARN | {"attention_factor": 0.8},
    YARN | {"mscale": 1.0},
    YARN | {"factor": 40, "mscale": 1.0, "mscale_all_dim": 0.707},
    YARN | {"beta_fast": 16, "beta_slow": 2, "original_max_position_embeddings": 4096},
    YARN | {"truncate": False, "original_max_position_embeddings": 4096},
    YARN | {"beta_fast": 2, "beta_slow": 2.0, "truncate": False},
]


@pytest.mark.parametrize("dim", [16, 128])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_rope_is_that_of_transformers(tmp_path: Path, dim: int, scaling: dict[str, Any]) -> None:
    parameters = {"rope_theta": 500000.0} | scaling
    oracle = LlamaConfig(head_dim=dim, rope_parameters=dict(parameters))
    if scaling["rope_type"] == "default":
        exponents = torch.arange(0, dim, 2).float() / dim
        expected, factor = 1.0 / 500000.0**exponents, 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](oracle, torch.device("cpu"))
    values = LLAMA | {"rope_theta": None, "head_dim": dim, "rope_parameters": parameters}
    config = read_config(write(tmp_path, values))
    assert torch.equal(config.rope[0].inv_freq(dim), expected)
    assert config.rope[0].attention_factor == factor
    assert config.attention[0].scale == pytest.approx(dim**-0.5 * factor**2)
    if scaling["rope_type"] not in ("default", "dynamic") and scaling["factor"] != 1:
        assert not torch.equal(expected, Rope(500000.0, None).inv_freq(dim))
    written = hf_config(config)
    assert read_config(write(tmp_path, written)) == config
    again = LlamaConfig(**written)
    if scaling["rope_type"] != "default":
        found, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](again, torch.device("cpu"))
        assert torch.equal(found, expected) and factor == config.rope[0].attention_factor


def test_yarn_that_was_added_to_a_config(tmp_path: Path) -> None:
    """Model cards tell users to add this and leave max_position_embeddings as it was."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    config = read_config(write(tmp_path, QWEN3 | {"rope_scaling": yarn}))
    assert config.max_position_embeddings == 2048
    scaling = config.rope[0].scaling
    assert isinstance(scaling, YarnScaling) and scaling.truncate
    assert (scaling.factor, scaling.beta_fast, scaling.beta_slow) == (4.0, 32.0, 1.0)
    short: list[dict[str, Any]] = [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": None}},
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            "original_max_position_embeddings": 512,
        },
        {"rope_parameters": {"full_attention": yarn, "sliding_attention": yarn}},
        {
            "rope_parameters": {"rope_type": "yarn", "factor": None},
            "original_max_position_embeddings": 512,
            "max_position_embeddings": 2048,
        },
    ]
    for change in short:
        assert read_config(write(tmp_path, QWEN3 | change)) == config, change
    longer = QWEN3 | {"rope_scaling": yarn, "max_position_embeddings": 4096}
    assert read_config(write(tmp_path, longer)).max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rope_type": "linear", "factor": 2}, LinearScaling(2.0)),
        ({"rope_type": "linear", "factor": 1.0}, None),
        ({"rope_type": "dynamic", "factor": 2.0}, DynamicScaling(2.0)),
        ({"rope_type": "dynamic", "factor": 1}, None),
    ],
)
def test_scalings_that_leave_the_context_alone(
    tmp_path: Path, given: dict[str, Any], expected: object
) -> None:
    config = read_config(write(tmp_path, QWEN3 | {"rope_scaling": given}))
    assert config.rope[0].scaling == expected and config.max_position_embeddings == 512


KNOWN = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {*SCALING},
    "yarn": {*YARN, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
             "truncate"},
}  # fmt: skip
NAMES = sorted(set().union(*KNOWN.values()) | {"mrope_section", "long_factor", "Factor", ""})


@given(
    scaling=st.sampled_from(SCALINGS),
    key=st.one_of(st.sampled_from(NAMES), st.text(max_size=8)),
    value=st.one_of(st.integers(2, 5), st.just([16, 24]), st.just("x"), st.booleans()),
    place=st.sampled_from(["rope_scaling", "rope_parameters"]),
    nested=st.booleans(),
)
def test_no_rope_parameter_is_ignored(
    scaling: dict[str, Any], key: str, value: object, place: str, nested: bool
) -> None:
    """Wherever it stands, a key counts, or is refused."""

    def read(parameters: dict[str, Any]) -> ModelConfig:
        if nested:
            parameters = {"full_attention": parameters, "sliding_attention": parameters}
        with TemporaryDirectory() as directory:
            return read_config(write(Path(directory), bare | {place: parameters}))

    bare = QWEN3 | {"rope_theta": None}
    assume(key not in ("rope_theta", "type", "partial_rotary_factor"))
    assume(key not in scaling)
    plain = read(scaling)
    if key not in KNOWN[scaling["rope_type"]]:
        with pytest.raises(ValueError, match="has no meaning"):
            read(scaling | {key: value})
    elif isinstance(value, int):
        with suppress(ValueError):  # of the wrong type, as true for a number
            changed = read(scaling | {key: value})
            # Neither of the two mscales counts without the other; true is the default of truncate.
            assert changed != plain or key.startswith("mscale") or value is True


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ({}, [None] * 4),
        ({"sliding_window": 9, "max_window_layers": 1}, [None] * 4),
        ({"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 1}, [None] * 4),
        (
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            [None, 9, 9, 9],
        ),
        (
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 4},
            [None] * 4,
        ),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 0,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            [9, None, 9, None],
        ),
        ({"layer_types": ["full_attention"] * 4}, [None] * 4),
    ],
)
def test_sliding_windows_of_qwen(
    tmp_path: Path, spelling: dict[str, Any], expected: list[int | None]
) -> None:
    assert windows(tmp_path, QWEN2 | spelling) == expected
    assert windows(tmp_path, QWEN3 | spelling) == expected


def test_layer_types_of_gemma_take_precedence(tmp_path: Path) -> None:
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    assert windows(tmp_path, GEMMA2 | {"layer_types": kinds}) == [None, None, 32, None]


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [
        (7, None, {7}),
        ([7, 8], None, {7, 8}),
        (None, None, set()),
        (7, {"eos_token_id": [9, 7]}, {7, 9}),
        (None, {"eos_token_id": 3}, {3}),
        (7, {"temperature": 0.6}, {7}),
    ],
)
def test_eos_is_the_union(
    tmp_path: Path, own: object, generation: dict[str, Any] | None, expected: set[int]
) -> None:
    config = read_config(write(tmp_path, QWEN3 | {"eos_token_id": own}, generation))
    assert config.eos_token_ids == expected


def test_dtype_spellings(tmp_path: Path) -> None:
    bare = {key: value for key, value in QWEN3.items() if key != "torch_dtype"}
    assert read_config(write(tmp_path, bare)).dtype is None
    assert read_config(write(tmp_path, bare | {"dtype": "float32"})).dtype == torch.float32
    assert read_config(write(tmp_path, QWEN3 | {"dtype": "bfloat16"})).dtype == torch.bfloat16


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_written_configs_read_back_equal_here_and_in_transformers(
    tmp_path: Path, family: str
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    original = tiny.hf_config(family)
    original.save_pretrained(first)
    config = read_config(first)
    second.mkdir()
    write(second, hf_config(config))
    assert read_config(second) == config
    theirs = AutoConfig.from_pretrained(second)
    for key in (
        "vocab_size",
        "num_key_value_heads",
        "rope_parameters",
        "layer_types",
        "sliding_window",
        "query_pre_attn_scalar",
        "tie_word_embeddings",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "mlp_only_layers",
    ):
        written, wanted = getattr(theirs, key, None), getattr(original, key, None)
        if key == "rope_parameters":  # more is said of YaRN, which transformers would find itself
            assert written is not None and wanted is not None
            wanted = {**written, **wanted}
        assert written == wanted, key


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        QWEN3,
        QWEN2 | {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28},
        LLAMA | {"rope_scaling": SCALING, "attention_bias": False, "head_dim": None},
        GEMMA2 | {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
        QWEN3 | {"rope_scaling": YARN, "max_position_embeddings": 64, "torch_dtype": "auto"},
        {k: v for k, v in QWEN3.items() if k not in ("architectures", "torch_dtype")},
    ],
)
def test_a_config_keeps_what_the_one_that_it_began_as_says(
    tmp_path: Path, values: dict[str, Any], scalar: bool
) -> None:
    """Of a language model with labels of another head, become a scalar one, too."""
    began_as = values | {
        "pad_token_id": 3, "bos_token_id": None, "transformers_version": "4.37.0", "num_labels": 3,
        "problem_type": "single_label_classification", "nested": {"dtype": "int4", "list": [{}]},
    }  # fmt: skip
    config = replace(read_config(write(tmp_path, began_as)), dtype=torch.float16)
    names = SCALAR_ARCHITECTURES if scalar else ARCHITECTURES
    name = next(name for name, family in names.items() if family == values["model_type"])
    spelling = "torch_dtype" if "torch_dtype" in values else "dtype"
    expected = began_as | {"architectures": [name], spelling: "float16"}
    if scalar:
        config = replace(config, tied=True, pad_token_id=3)
        expected |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        expected = {k: v for k, v in expected.items() if k not in ("num_labels", "problem_type")}
    before = json.dumps(began_as)
    written = hf_config(config, scalar, began_as)
    assert written == expected and json.dumps(began_as) == before
    assert read_config(write(tmp_path, written), scalar) == config
    assert hf_config(config, scalar, written) == written


def test_gemma_defaults_of_transformers_read_back(tmp_path: Path) -> None:
    """Gemma2Config() leaves out of config.json what equals its defaults."""
    original = Gemma2Config(num_hidden_layers=2)
    original.architectures = ["Gemma2ForCausalLM"]
    original.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config.tied and config.final_softcap == 30.0
    assert [layer.window for layer in config.attention] == [4096, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": [["Qwen3ForCausalLM"]]}, "architectures"),
        ({"architectures": [{}]}, "architectures"),
        ({"hidden_size": 2**63}, "hidden_size must be at most"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 1024"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number, got an integer of"),
        (
            {"sliding_window": 2**64 + 5, "use_sliding_window": True, "max_window_layers": 0},
            "sliding_window must be at most",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantised checkpoints \(fp8\)"),
        ({"compression_config": {"format": "int"}}, "compression_config"),
        ({"torch_dtype": ["float32"]}, r"dtype \['float32'\]"),
        ({"torch_dtype": "torch.int8"}, "'torch.int8'"),
        ({"torch_dtype": "torch.float16", "dtype": "bfloat16"}, "contradicts"),
        ({"rope_scaling": {"rope_type": "default", "factor": 8.0}}, "'factor' has no meaning"),
        (
            {"rope_scaling": {"type": "default", "mrope_section": [16]}},
            "'mrope_section' has no",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor must be a positive number, got None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor must be"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "truncate": True}}, "'truncate'"),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
                }
            },
            r"rope_parameters.full_attention and rope_parameters.sliding_attention differ",
        ),
        ({"rope_parameters": {"full_attention": 7}}, "full_attention must be an object"),
        ({"auto_map": {"AutoModel": "modeling.Evil"}}, "auto_map"),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "SequenceClassification"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "contradicts"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"architectures": "Qwen3ForCausalLM"}, "not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_bias": True}, "attention_bias"),
        ({"is_causal": False}, "is_causal must be true"),
        ({"per_layer_config": {"1": {"head_dim": 8}}}, "per_layer_config"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4 does not divide"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"head_dim": 15}, "even"),
        ({"head_dim": None}, "head_dim"),
        ({"hidden_size": "48"}, "hidden_size must be a positive integer, got '48'"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "'longrope' is not supp"),
        ({"rope_scaling": {"rope_type": ["yarn"], "factor": 4.0}}, r"\['yarn'\] is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "factor must be"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_fast 0.5 must not be less than"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor must be a positive number, got None"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate must be true or false, got 1"),
        ({"rope_scaling": YARN | {"factor": 1e300}}, "factor 1e\\+300 times"),
        ({"rope_scaling": YARN | {"low_freq_factor": 1.0}}, "'low_freq_factor' has no meaning"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 99}, "99 contradicts 64"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta must exceed 1"),
        ({"rope_scaling": {"rope_type": "default", "\x1b[2J": 1}}, r"'\\x1b\[2J' has no meaning"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "both"),
        ({"rope_scaling": "llama3"}, "must be an object"),
        ({"rope_scaling": {k: v for k, v in SCALING.items() if k != "factor"}}, "factor"),
        ({"rope_scaling": SCALING | {"high_freq_factor": 0.5}}, "high_freq_factor"),
        ({"rope_parameters": {"rope_theta": 1.0, "rope_type": "default"}}, "contradicts"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": SCALING},
            "disagree on 'rope_type'",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention"]}, "layer_types must name 4 layers"),
        ({"layer_types": ["linear_attention"] * 4}, "'linear_attention'"),
        ({"layer_types": ["sliding_attention"] * 4}, "no window"),
        (
            {"layer_types": ["sliding_attention"] * 4, "use_sliding_window": True},
            "sliding_window must be",
        ),
        ({"use_sliding_window": True, "sliding_window": 9}, "max_window_layers"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [7, 100]}, "eos_token_id 100 is outside"),
        ({"dtype": "float32"}, "contradicts"),
        ({"torch_dtype": "int8"}, "'int8'"),
    ],
)
def test_refusals_name_the_file_and_the_value(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    read_config(write(tmp_path, QWEN3))
    write(tmp_path, QWEN3 | change)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_what_names_nothing_is_accepted(tmp_path: Path) -> None:
    """Empty entries, spellings of a dtype, rope that is the same for all types of layers."""
    plain = read_config(write(tmp_path, QWEN3))
    changes: list[dict[str, Any]] = [
        {"auto_map": None}, {"auto_map": {}}, {"quantization_config": {}},
        {"compression_config": None}, {"torch_dtype": "torch.bfloat16"},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
    ]  # fmt: skip
    for change in changes:
        assert read_config(write(tmp_path, QWEN3 | change)) == plain
    same = {"rope_theta": QWEN3["rope_theta"], "rope_type": "default"}
    nested = {"full_attention": same, "sliding_attention": same}
    bare = {key: value for key, value in QWEN3.items() if key != "rope_theta"}
    assert read_config(write(tmp_path, bare | {"rope_parameters": nested})) == plain
    assert read_config(write(tmp_path, QWEN3 | {"torch_dtype": "auto"})).dtype is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "does not divide hidden_size"),
        ({"layer_types": ["sliding_attention"] * 4, "sliding_window": 4}, "no window"),
    ],
)
def test_refusals_of_llama(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, LLAMA | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_activation": "gelu"}, "hidden_activation"),
        ({"attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
        ({"sliding_window": None}, "sliding_window"),
        ({"query_pre_attn_scalar": None}, "query_pre_attn_scalar"),
    ],
)
def test_refusals_of_gemma(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, GEMMA2 | change))


def test_gemma_is_activated_as_hidden_activation_says(tmp_path: Path) -> None:
    """Published configs have the older hidden_act too, which transformers does not read."""
    both = GEMMA2 | {"hidden_act": "gelu"}
    assert read_config(write(tmp_path, both)) == read_config(write(tmp_path, GEMMA2))


def test_a_missing_soft_cap_is_not_taken_for_null(tmp_path: Path) -> None:
    values = {key: value for key, value in GEMMA2.items() if key != "final_logit_softcapping"}
    with pytest.raises(ValueError, match="final_logit_softcapping is missing"):
        read_config(write(tmp_path, values))


def test_eos_errors_name_the_generation_config(tmp_path: Path) -> None:
    write(tmp_path, QWEN3, {"eos_token_id": 5000})
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id 5000"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "a": 2}', "repeated key 'a'"),
        (b'{"a": {"b": 1, "b": 1}}', "repeated key 'b'"),
        (b"{", "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        (b"[1]", "must hold a JSON object, got list"),
        (b"[" * 100000, "not JSON"),
    ],
)
def test_json_that_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(Path("some/file.json"), text)
    assert "some/file.json" in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        read_config(tmp_path)


def test_names_of_the_hub_are_no_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    with pytest.raises(ValueError, match="no such directory, and a model is a local") as caught:
        read_config(name)
    assert f"hf download {name} --local-dir DIR" in str(caught.value)
    for path in (tmp_path / "none", Path("./some/where/else")):
        with pytest.raises(ValueError, match="no such directory") as caught:
            read_config(path)
        assert "hf download" not in str(caught.value)
    (tmp_path / "file").write_text("{}")
    with pytest.raises(ValueError, match="file: a model is a directory, not a file"):
        read_config(tmp_path / "file")


def test_a_directory_whose_name_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "mod\udcff").mkdir()
    with pytest.raises(ValueError, match=r"mod\\udcff': the name of a model directory must be UTF"):
        read_config(tmp_path / "mod\udcff")


def test_text_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("é", encoding="utf-8")
    assert read_text(path, "the template") == "é"
    path.write_bytes(b"a\r\n")
    assert read_text(path, "the template") == "a\n", "as transformers reads it"
    path.write_bytes(b"a" * (1 << 20))
    assert len(read_text(path, "the template")) == 1 << 20
    for content, message in ((b"a" * (1 << 20) + b"a", "at most 1048576"), (b"\xff", "UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"template.jinja: the template must .*{message}"):
            read_text(path, "the template")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("fifo", "zero", "dangling", "."):
        with pytest.raises(ValueError, match="the template must be a file"):
            read_text(tmp_path / name, "the template")
