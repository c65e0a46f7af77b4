"""The key of an output line: a hash of all that decides what the line says."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from engine.request import BadRow, Row

if TYPE_CHECKING:
    from torch import Tensor

    from engine.prompt import PromptBuilder

# What is read of a model directory, beside its weights; an index decides which of those.
MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "model.safetensors.index.json",
)  # fmt: skip


def line_key(
    row: Row | BadRow,
    options: Mapping[str, str | int | float | bool | None],
    fingerprint: str,
) -> str:
    """The key of a row's line: SHA-256, in hex, over all that decides what the line says.

    `options` holds every option that affects output, the template's text or hash, dtype and device
    type; the order of its entries does not matter, and 1 and 1.0 are the same value. Raises
    ValueError for an option that is not finite.
    """
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"option {name} = {value} is not a finite number")
    plain = {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in sorted(options.items())
    }
    text = json.dumps(
        [row.digest, plain, fingerprint], ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )
    return hashlib.sha256(text.encode()).hexdigest()


def run_options(prompts: "PromptBuilder", weight: "Tensor") -> dict[str, str]:
    """What `line_key` is told of the templates, and of what computes with a model; weight: one of
    the model's."""
    from kernels import cpp  # these load torch, which a key of a line needs not
    from kernels.packed_linear import uses_dot_products

    found = {
        "judge_template": prompts.judge_template,
        "chat_template": prompts.chat_template,
        "chat_template_kwargs": json.dumps(prompts.chat_template_kwargs, sort_keys=True),
        "date": prompts.date,
        "dtype": str(weight.dtype),
        "device": weight.device.type,
    }
    if weight.device.type == "cpu":
        found["implementation"] = cpp.implementation()
    if uses_dot_products(weight):
        found["numerics"] = "fast"
    return found


def weights_fingerprint(state: "Mapping[str, Tensor]") -> str:
    """SHA-256, in hex, over named tensors: of a model that is in no directory."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
        digest.update(f"{name}\0{tensor.dtype}\0".encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()


def model_fingerprint(directory: str | Path) -> str:
    """SHA-256, in hex, over a model directory's configuration, tokenizer and weights."""
    root = Path(directory)
    files = [root / name for name in MODEL_FILES]
    digest = hashlib.sha256()
    for path in (*files, *sorted(root.glob("*.safetensors"))):
        if path.is_file():  # a pipe would wait for ever; loading refuses it
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.name}\0{content}\n".encode())
    return digest.hexdigest()
