"""The model pocket-base from nothing: tokenizer, templates, random weights, supervised training.

The tokenizer is a Unigram model over byte-level pieces: every byte that UTF-8 text can hold, and
the whole words of the judging world. Unigram, since a BPE vocabulary must also hold the steps
towards each word, tokens that no text ever shows.

    python -m train.world.pocket [--out DIR] [--size large] [--steps N] [--seed S]

OUT/untrained holds the model as it starts, OUT/model the trained one with its checkpoints and
metrics. Running it again continues where it stopped. A large model is wider and deeper, and the
same in all else: one judgement of it costs as much as several of the small one, which may vote. Not
done here: RL, the model card.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine import command
from models import load
from models.config import read_config
from models.tokenizer import BYTE_OF_LETTER, UTF8_BYTES
from models.transformer import Transformer
from models.weights import save_pretrained
from train import sft
from train.learner import LearnerArgs
from train.world.cases import cases, judge, list_criteria

SPECIAL_TOKENS = ("<|user|>", "<|judge|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ ('<|user|>' if message.role == 'user' else '<|judge|>') + message.content + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|judge|>' }}{% endif %}"
)
JUDGE_TEMPLATE = """\
Judge each response. Scores go from {{ score_min }} to {{ score_max }}.
{% for message in messages %}
{{ message.role }}: {{ message.content }}
{% endfor %}
{% if reference is not none %}
Reference: {{ reference }}
{% endif %}
{% if principles is not none %}
Principles: {{ principles }}
{% endif %}
{% for response in responses %}
Response {{ loop.index }}: {{ response }}
{% endfor %}
{% if hint is not none %}
Hint: {{ hint }}
{% endif %}
"""
# The template's text as it is tokenized: in pieces, between the fields of a row.
TEMPLATE_TEXTS = (
    "Judge each response. Scores go from 1 to 10.\nuser: ",
    "\nassistant: ",
    "\nsystem: ",
    "\nReference: ",
    "\nPrinciples: ",
    "\nResponse 1: ",
    "\nHint: ",
    "The best response is: Response 1",
)
JUDGE_SETTINGS = {
    "score_min": 1, "score_max": 10, "threshold": 5.5, "anchor": "Scores:", "stop": "box",
    "join_blanks": False,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "initializer_range": 0.02,
}
Size = Literal["small", "large"]
# What differs from CONFIG: 1.67 million parameters, and 5.45 million.
SIZES: dict[Size, dict[str, Any]] = {
    "small": {},
    "large": {
        "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
}  # fmt: skip
LEARNING_RATES: dict[Size, float] = {"small": 2e-3, "large": 1.3e-3}  # less for more width


def build_tokenizer(sample_rows: int = 6000, seed: int = 0) -> Tokenizer:
    """A tokenizer that encodes any text without loss and has no token the world never shows.

    Its words are those of `sample_rows` cases of the world and of the templates.
    """
    byte_pieces = [letter for letter, b in BYTE_OF_LETTER.items() if b in UTF8_BYTES]
    space = next(letter for letter, b in BYTE_OF_LETTER.items() if b == 0x20)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    for case in islice(cases(seed, "train"), sample_rows):
        listed = list_criteria(case, rng)
        texts = [case.query, *(turn["content"] for turn in case.history), judge(case, listed)[0]]
        texts += [response.text for response in case.responses]
        texts.append(", ".join(f"{name} {weight}" for name, weight in listed))
        for text in texts:
            counts.update(piece for piece, _ in split.pre_tokenize_str(text))
    words = {
        piece
        for piece, count in counts.items()
        if count >= 20 and len(piece) > 1 and not any(c.isdigit() for c in piece)
    }
    words |= {space + digit for digit in "0123456789"}
    for text in TEMPLATE_TEXTS:
        words |= {piece for piece, _ in split.pre_tokenize_str(text) if len(piece) > 1}
    pieces = [(piece, -1.5) for piece in byte_pieces] + [(word, -1.0) for word in sorted(words)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=None, byte_fallback=False))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def write_untrained(directory: Path, seed: int = 0, size: Size = "small") -> None:
    """Write an untrained pocket model as an ordinary Hugging Face directory.

    seed: of the weights; the tokenizer is the same for all, and for all sizes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    end = ids["<|end|>"]
    config = CONFIG | SIZES[size] | {"vocab_size": tokenizer.get_vocab_size()}
    config |= {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    files = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": end, "pad_token_id": end},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|end|>",
            "pad_token": "<|end|>",
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
        "judge.json": JUDGE_SETTINGS,
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (directory / "judge_template.jinja").write_text(JUDGE_TEMPLATE, encoding="utf-8")
    tokenizer.save(str(directory / "tokenizer.json"))
    model = Transformer(read_config(directory))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
            continue
        depth_scale = (2 * config["num_hidden_layers"]) ** -0.5
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 if "embed" in name else parameter.shape[-1] ** -0.5 * 0.6
        torch.nn.init.normal_(
            parameter, std=std * (depth_scale if residual else 1.0), generator=generator
        )
    save_pretrained(model, directory)
    load(directory)


EXAMPLE = "--out runs/pocket --steps 3000"


@dataclass(frozen=True)
class Args:
    """Train pocket-base from nothing; run again to continue."""

    out: Path = Path("runs/pocket")  # directory of the untrained model and the trained one
    size: Size = "small"  # of the model: 1.67 million parameters (small) or 5.45 million (large)
    steps: int = 3000  # of training
    seed: int = 0  # of the first weights and of all draws


def main(arguments: Sequence[str] | None = None, prog: str = "python -m train.world.pocket") -> int:
    """Run the command line and return its exit status."""
    return command.run(lambda: _train(arguments, prog))


def _train(arguments: Sequence[str] | None, prog: str) -> None:
    args = command.parse(
        Args, {"run": ("out", "size", "steps", "seed")}, prog=prog, example=EXAMPLE,
        arguments=arguments,
    )  # fmt: skip
    untrained = args.out / "untrained"
    write_untrained(untrained, args.seed, args.size)  # the same bytes every time
    sft.train(
        sft.Args(
            model=untrained,
            out=args.out / "model",
            rows=20,
            learning=LearnerArgs(
                steps=args.steps, lr=LEARNING_RATES[args.size], warmup=150, seed=args.seed
            ),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
