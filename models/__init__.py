"""Decoders and tokenizers, loaded from Hugging Face model directories."""

import os
from dataclasses import replace

import torch
from torch.distributed import ProcessGroup

from models.config import DTYPES, ModelConfig, read_config
from models.critique_model import CritiqueModel, base_of
from models.layers import Attend
from models.scalar_head import ScalarModel
from models.tensor_parallel import SplitTransformer, split
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from models.weights import (
    load_critique_weights,
    load_scalar_weights,
    load_weights,
    save_pretrained,
)

__all__ = [
    "NUMERICS",
    "Attend",
    "CritiqueModel",
    "ModelConfig",
    "ScalarModel",
    "SplitTransformer",
    "Tokenizer",
    "Transformer",
    "load",
    "load_critique",
    "load_critique_weights",
    "load_scalar",
    "load_scalar_weights",
    "load_share",
    "load_weights",
    "read_config",
    "save_pretrained",
]

NUMERICS = ("portable", "fast")


def load(
    directory: str | os.PathLike[str],
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    numerics: str = "portable",
) -> tuple[Transformer, Tokenizer]:
    """Load a model directory: config.json, safetensors, tokenizer.json.

    dtype: "auto" for the stored one (float32 for float64), a torch.dtype, or the name of one of
    `DTYPES` ("bfloat16"). torch.float64 is for gradients and references: nothing samples in it.
    device: "auto" is the GPU if there is one, else the CPU. numerics: "portable" gives the same
    bits on every CPU, "fast" may use instructions that do not.
    Raises ValueError naming the file and the reason for whatever is malformed or unsupported.
    """
    config, tokenizer, chosen, place = _open(directory, dtype, device)
    model = load_weights(directory, config, chosen, place)
    _set_numerics(model, numerics)
    return model, tokenizer


def load_share(
    directory: str | os.PathLike[str],
    group: ProcessGroup,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
) -> tuple[SplitTransformer, Tokenizer]:
    """`load` of a model that is divided among the processes of a group, all of which have to call
    this. The whole of it is in the memory of the CPU meanwhile, and not on a GPU."""
    config, tokenizer, chosen, place = _open(directory, dtype, device)
    return split(load_weights(directory, config, chosen, "cpu"), group).to(place), tokenizer


def load_scalar(
    directory: str | os.PathLike[str],
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    numerics: str = "portable",
) -> tuple[ScalarModel, Tokenizer]:
    """`load` of a sequence classifier with one label."""
    config, tokenizer, chosen, place = _open(directory, dtype, device, scalar=True)
    scalar = load_scalar_weights(directory, config, chosen, place)
    _set_numerics(scalar.model, numerics)
    return scalar, tokenizer


def load_critique(
    directory: str | os.PathLike[str],
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    numerics: str = "portable",
) -> tuple[CritiqueModel, Tokenizer]:
    """`load` of a critique model, in the layout of Critique-out-Loud reward models."""
    base = base_of(directory)
    config, tokenizer, chosen, place = _open(directory, dtype, device, base=base)
    config = replace(config, dtype=None)  # the base's; the weights have their own
    critic = load_critique_weights(directory, config, chosen, place)
    _set_numerics(critic.model, numerics)
    return critic, tokenizer


def _set_numerics(model: Transformer, numerics: str) -> None:
    if numerics not in NUMERICS:
        raise ValueError(f"numerics must be one of {', '.join(NUMERICS)}, got {numerics!r}")
    if numerics == "fast":
        model.use_fast_numerics()


def _open(
    directory: str | os.PathLike[str],
    dtype: str | torch.dtype,
    device: str | torch.device,
    *,
    scalar: bool = False,
    base: str | os.PathLike[str] | None = None,
) -> tuple[ModelConfig, Tokenizer, torch.dtype | None, str | torch.device]:
    """All of a model directory but its weights: config and tokenizer, and which dtype (None: the
    stored one) and device were meant. base: whose config it is, where not the directory's own."""
    if isinstance(dtype, str) and dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {dtype!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = str(device).split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} asks for a GPU, and torch finds none")
    config = read_config(directory if base is None else base, scalar)
    tokenizer = Tokenizer(directory)
    if tokenizer.size > config.vocab_size:
        last = tokenizer.size - 1
        raise ValueError(
            f"{os.fspath(directory)}: vocab_size {config.vocab_size} of config.json is smaller "
            f"than the tokenizer, which has id {last} of token {tokenizer.token(last)!r}"
        )
    chosen = (None if dtype == "auto" else DTYPES[dtype]) if isinstance(dtype, str) else dtype
    return config, tokenizer, chosen, device
