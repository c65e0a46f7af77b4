"""The configuration of a decoder, read from a Hugging Face `config.json`.

Qwen3, Qwen3-MoE, Qwen2 (and 2.5), Llama (3.x), Gemma-2, the text model of Gemma-3 and DeepSeek-V2
become one `ModelConfig`, whose fields say what the decoder does rather than which family it is.
Both spellings are read: `rope_theta` + `rope_scaling` and `rope_parameters`; `torch_dtype` and
`dtype`. Sequence classifiers of one label, which are what `ScalarModel` loads, have a spelling of
their own. Whatever the decoder does not implement raises a ValueError that names the file and the
value: nothing is ignored that would change the logits. Of generation_config.json only the end
tokens are read: how to sample is for the caller to say.

It does not read `auto_map` code, quantised checkpoints, or rope types other than those of
`models/rope.py`.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.forest_attention import AttentionOptions
from models.experts_config import Experts, experts_values, read_experts
from models.files import Reader, read_json, shown
from models.rope import Rope, YarnScaling
from models.rope_config import KINDS, read_ropes, rope_values

ARCHITECTURES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "DeepseekV2ForCausalLM": "deepseek_v2",
}
SCALAR_ARCHITECTURES = {
    name.replace("Gemma3For", "Gemma3TextFor").replace("CausalLM", "SequenceClassification"): family
    for name, family in ARCHITECTURES.items()
}
# A model that sees images too, of which the text model is read: what its text_config leaves out is
# as transformers has it.
_WITH_IMAGES = "Gemma3ForConditionalGeneration"
_TEXT_DEFAULTS = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256,
}  # fmt: skip
MAX_LAYERS = 1024
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_GEMMA = "gemma2", "gemma3_text"
_DEEPSEEK = "deepseek_v2"
_NO_WINDOW = "llama", "qwen3_moe", _DEEPSEEK


@dataclass(frozen=True)
class Latent:
    """Of a model with latent attention (`models/latent_attention.py`): the channels of the latents
    of queries (None: they have none) and of keys and values, and of a head's query and key without
    rope and with it."""

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int


@dataclass(frozen=True)
class ModelConfig:
    """Everything that the decoder needs to know about a checkpoint.

    architecture: "qwen3", "qwen3_moe", "qwen2", "llama", "gemma2", "gemma3_text" or "deepseek_v2".
    head_dim: channels of a query and a key; v_head_dim: of a value. intermediate_size: of dense
    blocks. rope, attention, experts: one entry per layer, None for the experts of a dense one.
    attention_bias: bias on q, k and v. qk_norm: RMS norm over head_dim of q and k before rope.
    norm_plus_one: norms scale by 1 + w. sandwich_norms: norms also after attention and after the
    MLP. embedding_scale: factor on embeddings, rounded to the model's dtype, None for none.
    final_softcap: of the logits. tied: the decoder stores no head of its own; the embedding is the
    head, where there is one.
    max_position_embeddings: the context in tokens; with YaRN `factor` times the original one, where
    config.json states less, as those do to which only YaRN was added. eos_token_ids: of config.json
    and generation_config.json together. dtype: of the stored weights, float32 where they are
    float64, None where config.json does not say. pad_token_id: of a scalar model, behind whose
    sequences it may stand (`ScalarModel`); None elsewhere. latent: None for ordinary attention.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: tuple[Rope, ...]
    attention: tuple[AttentionOptions, ...]
    experts: tuple[Experts | None, ...]
    attention_bias: bool
    qk_norm: bool
    norm_plus_one: bool
    sandwich_norms: bool
    embedding_scale: float | None
    activation: str
    final_softcap: float | None
    tied: bool
    eos_token_ids: frozenset[int]
    dtype: torch.dtype | None
    pad_token_id: int | None = None
    latent: Latent | None = None

    @property
    def rope_dim(self) -> int:
        """Channels that rope turns, of a query and a key."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def cached_heads(self) -> int:
        """Heads of keys and values in a cache."""
        return self.num_kv_heads if self.latent is None else 1

    @property
    def cached_key_dim(self) -> int:
        """Channels of a key in a cache, hence of a query of it."""
        latent = self.latent
        return self.head_dim if latent is None else latent.kv_rank + latent.rope_dim

    @property
    def cached_value_dim(self) -> int:
        """Channels of a value in a cache. With latent attention a value is the first of its key."""
        return self.v_head_dim if self.latent is None else self.latent.kv_rank

    @property
    def cell_width(self) -> int:
        """Numbers that a layer keeps of a token in a cache."""
        value_dim = self.cached_value_dim if self.latent is None else 0
        return self.cached_heads * (self.cached_key_dim + value_dim)


def read_config(directory: str | os.PathLike[str], scalar: bool = False) -> ModelConfig:
    """Read `config.json` and, for end-of-text ids, `generation_config.json` of a model directory.

    scalar: it must be a sequence classifier of one label, else a language model. Raises ValueError
    naming the file and the value for the other of the two, and for anything missing, malformed or
    unsupported.
    """
    _require_directory(directory)
    path = Path(directory) / "config.json"
    reader = Reader(path, _of_text(path, read_json(path)))
    architecture = _architecture(reader, scalar)
    gemma = architecture in _GEMMA
    if scalar:
        _require_one_label(reader)
    _refuse_unsupported(reader, architecture)

    hidden_size = reader.integer("hidden_size")
    num_layers = reader.integer("num_hidden_layers", most=MAX_LAYERS)
    num_heads = reader.integer("num_attention_heads")
    has_default = architecture in ("llama", _DEEPSEEK)
    num_kv_heads = reader.integer("num_key_value_heads", default=num_heads if has_default else None)
    if num_heads % num_kv_heads:
        raise reader.error(
            f"num_key_value_heads {num_kv_heads} does not divide num_attention_heads {num_heads}"
        )
    latent = _latent(reader, num_heads, num_kv_heads) if architecture == _DEEPSEEK else None
    if latent is not None:
        head_dim = latent.nope_dim + latent.rope_dim
    elif reader.has("head_dim") or gemma or architecture == "qwen3":
        head_dim = reader.integer("head_dim")
    elif hidden_size % num_heads == 0:
        head_dim = hidden_size // num_heads
    else:
        raise reader.error(
            f"num_attention_heads {num_heads} does not divide hidden_size {hidden_size}"
        )
    if head_dim % 2 and latent is None:
        raise reader.error(f"head_dim must be even for rope, got {head_dim}")

    vocab_size = reader.integer("vocab_size")
    context = reader.integer("max_position_embeddings")
    windows = _windows(reader, architecture, num_layers)
    ropes = read_ropes(reader, architecture, windows, context)
    for rope in ropes:
        if isinstance(rope.scaling, YarnScaling):
            old = rope.scaling.original_max_position_embeddings
            context = max(context, int(rope.scaling.factor * old))
    scale = (reader.integer("query_pre_attn_scalar") if gemma else head_dim) ** -0.5
    # YaRN's factor on cosines and sines of queries and of keys is its square on the scores. Of
    # latent attention they are a part of the scores, all of which have a factor of their own.
    factors = [rope.attention_factor if latent is None else rope.score_factor for rope in ropes]
    softcap = reader.cap("attn_logit_softcapping", architecture) if gemma else None
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim if latent is None else reader.integer("v_head_dim"),
        max_position_embeddings=context,
        rms_norm_eps=reader.number("rms_norm_eps"),
        rope=ropes,
        attention=tuple(
            AttentionOptions(scale * factor**2, softcap, window)
            for factor, window in zip(factors, windows, strict=True)
        ),
        experts=read_experts(reader, architecture, num_layers),
        attention_bias=architecture == "qwen2",
        qk_norm=architecture in ("qwen3", "qwen3_moe", "gemma3_text"),
        norm_plus_one=gemma,
        sandwich_norms=gemma,
        embedding_scale=hidden_size**0.5 if gemma else None,
        activation="gelu_tanh" if gemma else "silu",
        final_softcap=reader.cap("final_logit_softcapping", architecture) if gemma else None,
        tied=reader.flag("tie_word_embeddings", default=gemma) or scalar,
        eos_token_ids=_eos(reader, path.with_name("generation_config.json"), vocab_size),
        dtype=_dtype(reader),
        pad_token_id=_pad(reader, vocab_size) if scalar else None,
        latent=latent,
    )


def _latent(reader: Reader, num_heads: int, num_kv_heads: int) -> Latent:
    if num_kv_heads != num_heads:
        raise reader.error(f"num_key_value_heads must be {num_heads}, got {num_kv_heads}")
    rope_dim = reader.integer("qk_rope_head_dim")
    if rope_dim % 2:
        raise reader.error(f"qk_rope_head_dim must be even for rope, got {rope_dim}")
    return Latent(
        q_rank=reader.integer("q_lora_rank") if reader.has("q_lora_rank") else None,
        kv_rank=reader.integer("kv_lora_rank"),
        nope_dim=reader.integer("qk_nope_head_dim"),
        rope_dim=rope_dim,
    )


def _of_text(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says; of a model that sees images, what it says of its text model."""
    if values.get("architectures") != [_WITH_IMAGES]:
        return values
    text = values.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"{path}: text_config must be an object, got {shown(text)}")
    shared = ("eos_token_id", "pad_token_id", "dtype", "torch_dtype", "quantization_config",
              "tie_word_embeddings", "auto_map")  # fmt: skip
    outer = {key: values[key] for key in shared if values.get(key) is not None}
    names = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    return _TEXT_DEFAULTS | text | outer | names


def _require_directory(directory: str | os.PathLike[str]) -> None:
    name = os.fspath(directory)
    if any("\ud800" <= letter <= "\udfff" for letter in name):  # bytes that are not UTF-8
        raise ValueError(f"{name!r}: the name of a model directory must be UTF-8")
    if Path(name).is_dir():
        return
    if Path(name).exists():
        raise ValueError(f"{name}: a model is a directory, not a file")
    hint = ""
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name, re.ASCII):
        hint = f"; if it is a name of the Hugging Face hub: hf download {name} --local-dir DIR"
    raise ValueError(f"{name}: no such directory, and a model is a local directory{hint}")


def _architecture(reader: Reader, scalar: bool) -> str:
    names = reader.values.get("architectures")
    model_type = reader.values.get("model_type")
    known = SCALAR_ARCHITECTURES if scalar else ARCHITECTURES
    supported = ", ".join(known)
    if names is None:
        if model_type not in known.values():
            raise reader.error(f"model_type {model_type!r} is not supported (only {supported})")
        return str(model_type)
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    name = name if isinstance(name, str) else None
    if scalar and name in ARCHITECTURES:
        raise reader.error(f"{name} is a language model; a meta model is one of {supported}")
    if not scalar and name in SCALAR_ARCHITECTURES:
        raise reader.error(f"{name} gives a scalar: a meta model; a judge is one of {supported}")
    if name not in known:
        raise reader.error(f"architectures {names!r} is not supported (only {supported})")
    architecture = known[name]
    if model_type is not None and model_type != architecture:
        raise reader.error(f"architectures {names!r} contradicts model_type {model_type!r}")
    return architecture


def _require_one_label(reader: Reader) -> None:
    """As transformers counts labels: those of id2label, else num_labels, else two."""
    labels = reader.values.get("id2label")
    count = len(labels) if isinstance(labels, dict) else reader.values.get("num_labels", 2)
    if count != 1 or reader.values.get("num_labels", 1) != 1:
        raise reader.error(f"a meta model has one label, got id2label {labels!r}, {count} labels")


def _refuse_unsupported(reader: Reader, architecture: str) -> None:
    code = reader.values.get("auto_map")
    # Of these the published checkpoints name code; what it computes is implemented here.
    if code and not (architecture == _DEEPSEEK and _names_published_code(code)):
        raise reader.error("auto_map names code to run, which is refused")
    for key in ("quantization_config", "compression_config"):
        if quantised := reader.values.get(key):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else None
            kind = f" ({method})" if method else ""
            raise reader.error(f"{key}: quantised checkpoints{kind} are not supported")
    if reader.values.get("per_layer_config"):
        raise reader.error("per_layer_config: layers that differ in shape are not supported")
    if not reader.flag("is_causal", default=True):
        raise reader.error("is_causal must be true")
    flags = ["mlp_bias", "use_bidirectional_attention"]
    if architecture != "qwen2":  # its bias is on q, k and v only, whatever the key says
        flags.append("attention_bias")
    if architecture == "qwen3_moe":
        flags.append("use_sliding_window")
    for key in flags:
        if reader.flag(key, default=False):
            raise reader.error(f"{key} is not supported")
    key, wanted = (
        ("hidden_activation", "gelu_pytorch_tanh")
        if architecture in _GEMMA
        else ("hidden_act", "silu")
    )
    if reader.values.get(key) != wanted:
        raise reader.error(f"{key} must be {wanted!r}, got {reader.values.get(key)!r}")


def _names_published_code(code: object) -> bool:
    """Whether auto_map names nothing but classes of the files that come with DeepSeek-V2, as they
    stand beside a config, or in a repository, `owner/name--` before them."""
    names = code.values() if isinstance(code, dict) else ()
    pattern = r"([\w.-]+/[\w.-]+--)?(configuration|modeling)_deepseek\.DeepseekV2\w+"
    return bool(names) and all(isinstance(n, str) and re.fullmatch(pattern, n) for n in names)


def _windows(reader: Reader, architecture: str, num_layers: int) -> list[int | None]:
    """The sliding window of each layer, None where it sees all keys before it."""
    kinds = reader.values.get("layer_types")
    if kinds is None:
        if architecture == "gemma2":
            slides = [layer % 2 == 0 for layer in range(num_layers)]
        elif architecture == "gemma3_text":
            pattern = reader.integer("sliding_window_pattern", default=6)
            slides = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
        elif architecture not in _NO_WINDOW and reader.flag("use_sliding_window", default=False):
            first = reader.values.get("max_window_layers")
            if not isinstance(first, int) or isinstance(first, bool) or first < 0:
                raise reader.error(f"max_window_layers must be an integer, got {first!r}")
            slides = [layer >= first for layer in range(num_layers)]
        else:
            slides = [False] * num_layers
    else:
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise reader.error(f"layer_types must name {num_layers} layers, got {kinds!r}")
        for kind in kinds:
            if kind not in KINDS:
                raise reader.error(f"layer_types: {kind!r} is not supported")
        slides = [kind == "sliding_attention" for kind in kinds]
    if not any(slides):
        return [None] * num_layers
    if architecture in _NO_WINDOW or not reader.flag("use_sliding_window", architecture in _GEMMA):
        raise reader.error("layer_types has sliding_attention, but this model has no window")
    window = reader.integer("sliding_window")
    return [window if slide else None for slide in slides]


def _eos(reader: Reader, generation_path: Path, vocab_size: int) -> frozenset[int]:
    readers = [reader]
    if generation_path.exists():
        readers.append(Reader(generation_path, read_json(generation_path)))
    ids: set[int] = set()
    for source in readers:
        value = source.values.get("eos_token_id")
        for token in [] if value is None else value if isinstance(value, list) else [value]:
            if not isinstance(token, int) or isinstance(token, bool):
                raise source.error(f"eos_token_id must be an integer or a list, got {value!r}")
            if not 0 <= token < vocab_size:
                raise source.error(f"eos_token_id {token} is outside the vocabulary {vocab_size}")
            ids.add(token)
    return frozenset(ids)


def _pad(reader: Reader, vocab_size: int) -> int | None:
    value = reader.values.get("pad_token_id")
    if value is not None and (type(value) is not int or not 0 <= value < vocab_size):
        raise reader.error(f"pad_token_id {value!r} is not a token of {vocab_size}")
    return value


def _dtype(reader: Reader) -> torch.dtype | None:
    names = [reader.values[key] for key in ("dtype", "torch_dtype") if reader.has(key)]
    if len({str(name).removeprefix("torch.") for name in names}) > 1:
        raise reader.error(f"dtype {names[0]!r} contradicts torch_dtype {names[1]!r}")
    if not names:
        return None
    name = names[0].removeprefix("torch.") if isinstance(names[0], str) else None
    if name == "auto":
        return None
    if name == "float64":  # nothing is sampled in it
        return torch.float32
    if name not in DTYPES:
        raise reader.error(f"dtype {shown(names[0])} is not supported (only {', '.join(DTYPES)})")
    return DTYPES[name]


def hf_config(
    config: ModelConfig, scalar: bool = False, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The contents of a `config.json` that reads back as `config`, here and in transformers; scalar
    as for `read_config`.

    base: the contents of the one that the decoder was read from, be it of a language model or of a
    scalar one. All of it stays, in its own spelling, but for the dtype and what a scalar model has
    other than a language model; of a model that sees images, what it says of its text model. What
    names code is left out, since the code is not written.
    """
    known = SCALAR_ARCHITECTURES if scalar else ARCHITECTURES
    name = next(k for k, v in known.items() if v == config.architecture)
    values = _decoder_values(config) if base is None else _of_text(Path("base"), dict(base))
    if scalar and values.get("architectures") != [name]:
        for key in ("num_labels", "problem_type"):  # of a head that is gone
            values.pop(key, None)
        values |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        values["pad_token_id"] = config.pad_token_id
    values["architectures"] = [name]
    values.pop("auto_map", None)
    if config.dtype is not None:
        spelt = [key for key in ("dtype", "torch_dtype") if key in values] or ["dtype"]
        values |= dict.fromkeys(spelt, str(config.dtype).removeprefix("torch."))
    return values


def _decoder_values(config: ModelConfig) -> dict[str, Any]:
    """What a `config.json` has to say of a decoder, but for its dtype."""
    windows = [layer.window for layer in config.attention]
    kinds = [KINDS[window is not None] for window in windows]
    ropes = {kind: rope_values(rope) for kind, rope in zip(kinds, config.rope, strict=True)}
    values: dict[str, Any] = {
        "architectures": None,
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": ropes if config.architecture == "gemma3_text" else ropes[kinds[0]],
        "tie_word_embeddings": config.tied,
        "eos_token_id": sorted(config.eos_token_ids),
    }
    values |= experts_values(config.architecture, config.experts)
    if (latent := config.latent) is not None:
        del values["head_dim"]
        values |= {
            "q_lora_rank": latent.q_rank,
            "kv_lora_rank": latent.kv_rank,
            "qk_nope_head_dim": latent.nope_dim,
            "qk_rope_head_dim": latent.rope_dim,
            "v_head_dim": config.v_head_dim,
        }
    if config.architecture not in _NO_WINDOW:
        values["layer_types"] = kinds
        window = next((window for window in windows if window is not None), None)
        values["sliding_window"] = window
    if config.architecture in _GEMMA:
        first = config.attention[0]
        scale = first.scale / config.rope[0].attention_factor ** 2
        values |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": round(scale**-2),
            "attn_logit_softcapping": first.softcap,
            "final_logit_softcapping": config.final_softcap,
        }
    else:
        values["hidden_act"] = "silu"
        if config.architecture not in _NO_WINDOW:
            values["use_sliding_window"] = window is not None
            values["max_window_layers"] = next(
                (i for i, w in enumerate(windows) if w is not None), config.num_layers
            )
    return values
