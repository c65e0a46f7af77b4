"""A language model that writes critiques, with a head that turns one into a reward (CLoud).

    reward = v . tanh(W norm(h) + b) + c         W: (hidden, hidden), v: (1, hidden)

h is the hidden state at the token that ends the critique. This is the layout of Critique-out-Loud
reward models (arXiv 2408.11791): tensors `reward_base_model.*`, `reward_head.dense.*` and
`reward_head.out_proj.*`, and a config.json that names the directory of the base, whose config.json
describes the decoder. R rows.

It does not write critiques (`engine/cloud.py`).
"""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.files import read_json
from models.layers import Linear, linear
from models.scalar_head import row_dots
from models.transformer import Transformer


class RewardHead(nn.Module):
    """The two layers of the head."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = Linear(hidden_size, hidden_size)
        self.out_proj = Linear(hidden_size, 1)


class CritiqueModel(nn.Module):
    """A decoder and its reward head. Parameters are uninitialised until loaded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = Transformer(config)
        self.reward_head = RewardHead(config.hidden_size)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Rewards of hidden states (R, hidden_size) after the final norm: (R,) float32.

        Sums are in float32, whatever the model is in. Rows do not depend on each other, as in
        `ScalarModel.logits`.
        """
        dense, out = self.reward_head.dense, self.reward_head.out_proj
        inner = [
            linear(rows.float(), dense.weight.float(), dense.bias.float(), keep=False).tanh()
            for rows in hidden.split(16)
        ]
        rewards: Tensor = row_dots(torch.cat(inner), out.weight.float()) + out.bias.float()
        return rewards


def base_of(directory: str | os.PathLike[str]) -> Path:
    """The directory with the config.json of a critique model's base, which its own config.json
    names: in its directory, or anywhere. Raises ValueError naming the file where there is none, and
    for a model that writes no critiques."""
    path = Path(directory) / "config.json"
    values = read_json(path)
    method = values.get("feedback_method")
    if method != "teacher":
        raise ValueError(f"{path}: feedback_method {method!r} writes no critiques (only 'teacher')")
    name = values.get("base_model_name_or_path")
    for base in (Path(directory) / str(name), Path(str(name))):
        if (base / "config.json").is_file():
            return base
    raise ValueError(
        f"{path}: base_model_name_or_path {name!r} is no directory with a config.json: put the "
        "base's config.json into one, and name that"
    )
