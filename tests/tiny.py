"""Tiny random model directories of every family, written by transformers and tokenizers.

Norms and biases are perturbed, since ones and zeros hide mistakes, and weights are cut into many
shards. The models know nothing; their tokenizers encode any text.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DeepseekV2Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

FAMILIES = ("qwen3", "qwen3_moe", "qwen2", "llama", "gemma2", "gemma3_text", "deepseek_v2")
VOCAB_SIZE = 320
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# As DeepSeek-V2 has it: with a factor on the scores and one on what rope turns.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
}
# Another DeepSeek-V2: latents of queries, no YaRN, no groups of experts.
DEEPSEEK: dict[str, Any] = {
    "q_lora_rank": 20, "v_head_dim": 12, "rope_parameters": None, "num_experts_per_tok": 3,
    "topk_method": "greedy",
}  # fmt: skip
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
CONTROL = ("<think>", "</think>")  # ids 3, 4: added, but not marked special
CHAT_TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


def hf_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """A transformers config of a family: 3 layers, hidden 64, 4 query and 2 key/value heads."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    own: dict[str, dict[str, Any]] = {
        "qwen3": {"head_dim": 24, "tie_word_embeddings": True},
        "qwen3_moe": {
            "head_dim": 24, "num_experts": 5, "num_experts_per_tok": 2,
            "moe_intermediate_size": 40, "mlp_only_layers": [1], "norm_topk_prob": True,
        },
        "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        "llama": {"rope_parameters": LLAMA3_ROPE},
        "gemma2": {"head_dim": 20, "query_pre_attn_scalar": 24, "sliding_window": 11},
        "gemma3_text": {
            "head_dim": 20, "query_pre_attn_scalar": 24, "sliding_window": 11,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
        },
        "deepseek_v2": {
            "q_lora_rank": None, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
            "v_head_dim": 20, "rms_norm_eps": 1e-4, "rope_parameters": YARN,
            "first_k_dense_replace": 1,
            "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
            "n_shared_experts": 2, "routed_scaling_factor": 1.5, "n_group": 3, "topk_group": 2,
            "topk_method": "group_limited_greedy",
        },
    }  # fmt: skip
    if family == "deepseek_v2":
        values["num_key_value_heads"] = 4
    kinds: dict[str, type[PreTrainedConfig]] = {
        "qwen3": Qwen3Config,
        "qwen3_moe": Qwen3MoeConfig,
        "qwen2": Qwen2Config,
        "llama": LlamaConfig,
        "gemma2": Gemma2Config,
        "gemma3_text": Gemma3TextConfig,
        "deepseek_v2": DeepseekV2Config,
    }
    return kinds[family](**(values | own[family] | overrides))


def write_checkpoint(
    directory: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "60KB",
    scalar: bool = False,
    **overrides: Any,
) -> PreTrainedModel:
    """Write config, generation config and sharded weights; return transformers' own model. scalar:
    a sequence classifier with one label, which has no generation config."""
    generator = torch.Generator().manual_seed(seed)
    config = hf_config(family, **({"num_labels": 1} if scalar else {}), **overrides)
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model: PreTrainedModel = auto.from_config(config, **plain)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(noise * 0.3)
            else:
                parameter.copy_(noise * 0.1)
    if not scalar:
        model.generation_config.eos_token_id = [2, 0]
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    # Read back, since the conversion above has also rounded the frequencies of its rope.
    oracle: PreTrainedModel = auto.from_pretrained(directory, dtype=dtype, **plain)
    return oracle.eval()


def write_with_images(directory: Path, published: bool) -> PreTrainedModel:
    """Write a Gemma-3 that sees images too, with names as transformers writes them or as in the
    published checkpoints; return transformers' own model."""
    generator = torch.Generator().manual_seed(0)
    text = hf_config("gemma3_text").to_dict() | {"architectures": None}
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=7
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(directory)
    if published:
        path = directory / "model.safetensors"
        names = {"model.language_model.": "language_model.model.", "model.vision": "vision",
                 "model.multi": "multi"}  # fmt: skip
        tensors = load_file(path)
        for new, old in names.items():
            tensors = {
                old + name.removeprefix(new) if name.startswith(new) else name: tensor
                for name, tensor in tensors.items()
            }
        assert not any(name.startswith("model.") for name in tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    return model


def write_model(
    directory: Path, family: str = "qwen3", *, tokenizer: str = "unigram", **options: Any
) -> PreTrainedModel:
    """Write a whole model directory: `write_checkpoint` and `write_tokenizer`."""
    model = write_checkpoint(directory, family, **options)
    write_tokenizer(directory, tokenizer)
    return model


def write_tokenizer(directory: Path, kind: str = "unigram") -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json; return the tokenizer.

    kind: "unigram" or "bpe", both byte-level, or "sentencepiece" (BPE with byte fallback).
    """
    build = {"unigram": _unigram, "bpe": _byte_level_bpe, "sentencepiece": _sentencepiece}[kind]
    tokenizer = build()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>"},
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def _unigram() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ("Ġthe", "Ġa", "Ġof", "ing", "Scores", "Ġ\\", "boxed", "ation", "ĊĊ", "er", "Ġ1", "10")
    pieces = [(token, 0.0) for token in (*SPECIAL, *CONTROL)]
    pieces += [(letter, -8.0) for letter in letters] + [(word, -5.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(pieces, None, False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merged(vocab: dict[str, int], words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merges that spell each word from the left, added to the vocabulary as they appear."""
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            merge = (word[: end - 1], word[end - 1])
            if merge not in merges:
                merges.append(merge)
                vocab.setdefault(word[:end], len(vocab))
    return merges


def _byte_level_bpe() -> Tokenizer:
    """Merges lead to <|im_end|> itself, as an attacker's vocabulary might have it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL, *CONTROL, *letters))}
    merges = _merged(vocab, ("Ġthe", "Scores", "ing", "<|im_end|>"))
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """As Gemma's: spaces become U+2581, unknown letters become bytes, newline runs are added."""
    names = (*SPECIAL, *CONTROL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)))
    vocab = {token: i for i, token in enumerate(names)}
    for letter in ("▁", "\n", *"aehint<|_>mdScor"):
        vocab.setdefault(letter, len(vocab))
    merges = _merged(vocab, ("▁the", "\n\n", "<|im_end|>"))
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    return tokenizer
