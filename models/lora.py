"""Low-rank adapters on the linear layers of a decoder's blocks.

    y = x W^T + b + (alpha / r) (x A^T) B^T       A: (r, K)   B: (N, r)   W: (N, K), frozen

B begins as zeros, so that an adapted model begins as the model itself; with its adapters off it
stays that for ever. Fused projections (q, k, v; gate, up) share one A. Where only some of them are
adapted, B has the rows of those alone. Source: arXiv 2106.09685.

Of a mixture of experts the attention alone is adapted: `peft` takes gate_proj, up_proj and
down_proj of such a model for its routed experts.

An adapted model is trained and sampled as it is, over one copy of its base. C++, which lays weights
out anew, and Hugging Face directories take each layer's merged weight, one after another.
`save_adapter` writes adapters as the `peft` package does.
"""

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from models.layers import Linear, Product, linear
from models.scalar_head import ScalarModel, decoder_of
from models.transformer import Transformer
from models.weights import in_stored_order, replace_file, row_order, stored_rows, write_tensors

TARGETS = (
    "q_proj", "k_proj", "v_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
BLOCK_TARGETS = {"gate_proj", "up_proj", "down_proj"}


class AdaptedLinear(Linear):
    """A frozen linear layer and its adapter, which `enabled` switches."""

    places: Tensor  # (rows of B,) int64: which of the layer's rows have them

    def __init__(
        self,
        base: Linear,
        rank: int,
        alpha: float,
        rows: Mapping[str, int],
        targets: Collection[str] = TARGETS,
        generator: torch.Generator | None = None,
    ) -> None:
        """rows: by name, how many rows each of the layer's projections has, in order. targets: the
        names of those that are adapted, among others. A is drawn as Kaiming's uniform with a =
        sqrt(5) has it."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.targets = {name: count for name, count in rows.items() if name in targets}
        weight, bound = base.weight, base.in_features**-0.5
        drawn = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(drawn.to(weight))
        self.lora_b = nn.Parameter(torch.zeros(sum(self.targets.values()), rank).to(weight))
        is_adapted = torch.cat([torch.full((count,), name in targets)
                                for name, count in rows.items()])  # fmt: skip
        places = is_adapted.nonzero()[:, 0].to(weight.device)
        self.register_buffer("places", places, persistent=False)
        self.rank, self.alpha = rank, alpha
        self.enabled = True

    @property
    def scale(self) -> float:
        """alpha / r"""
        return self.alpha / self.rank

    def spread(self, lora_b: Tensor) -> Tensor:
        """B with a row for each of the layer's: zeros for those that are not adapted."""
        if len(lora_b) == self.out_features:
            return lora_b
        return lora_b.new_zeros(self.out_features, self.rank).index_copy(0, self.places, lora_b)

    def forward(self, x: Tensor, product: Product = linear) -> Tensor:
        out = product(x, self.weight, self.bias)
        if not self.enabled:
            return out
        low = product(x, self.lora_a, None)
        return out + self.scale * product(low, self.spread(self.lora_b), None)

    def merged(self) -> Tensor:
        if not self.enabled:
            return self.weight
        return merged_weight(self.weight, self.lora_a, self.spread(self.lora_b), self.scale)


def add_adapters(
    model: Transformer, rank: int, alpha: float, seed: int = 0, targets: Collection[str] = TARGETS
) -> None:
    """Freeze a decoder, in place, and give the linear layers of its blocks adapters.

    targets: the projections that are adapted, some of TARGETS, those left out that the model does
    not have, and with experts those of its blocks. Raises ValueError for other names, where none is
    left, and for a rank or an alpha that is not positive.
    """
    if rank < 1 or not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"an adapter of rank {rank} and alpha {alpha}")
    unknown = [name for name in targets if name not in TARGETS]
    if unknown or not targets:
        raise ValueError(
            f"adapters of {', '.join(unknown) or 'nothing'}: known are {', '.join(TARGETS)}"
        )
    known = set(TARGETS) - (BLOCK_TARGETS if any(model.config.experts) else set())
    has = {
        name
        for path, module in model.layers.named_modules()
        if type(module) is Linear
        for name in stored_rows(model.config, path.rpartition(".")[2], module.out_features)
        if name in known
    }
    if has.isdisjoint(targets):
        raise ValueError(
            f"adapters of {', '.join(targets)}: the model has {', '.join(sorted(has))}"
        )
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.layers:
        for parent in layer.modules():
            for name, child in list(parent.named_children()):
                if type(child) is not Linear:
                    continue
                rows = stored_rows(model.config, name, child.out_features)
                if not rows.keys().isdisjoint(has.intersection(targets)):
                    adapted = AdaptedLinear(child, rank, alpha, rows, targets, generator)
                    setattr(parent, name, adapted)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, an adapted model is the one that it began as."""
    adapted = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    for module in adapted:
        module.enabled = False
    try:
        yield
    finally:
        for module in adapted:
            module.enabled = True


def merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """The weight (N, K) of one layer that does the same, in the dtype of `weight`, rounded once.
    lora_b: (N, r)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = lora_b.to(wide) @ lora_a.to(wide)
    return delta.mul_(scale).add_(weight).to(weight.dtype)


def save_adapter(
    model: Transformer | ScalarModel,
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str],
    dtype: torch.dtype,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which `peft` loads.

    model: an adapted one; of a scalar model the score goes with its adapters. base: the model
    directory that they belong to, as adapter_config.json is to name it. dtype: of what is written.
    The shared A of fused projections is written for each of them.
    """
    scalar = isinstance(model, ScalarModel)
    prefix = "base_model.model." if scalar else "base_model.model.model."
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    assert adapted, "a model without adapters"
    tensors: dict[str, Tensor] = {}
    targets: set[str] = set()
    model_config = decoder_of(model).config
    for name, layer in adapted.items():
        parts = layer.lora_b.split([*layer.targets.values()])
        for target, own in zip(layer.targets, parts, strict=True):
            place = f"{prefix}{name.rpartition('.')[0]}.{target}"
            own = in_stored_order(own, row_order(model_config, target))
            tensors |= {f"{place}.lora_A.weight": layer.lora_a, f"{place}.lora_B.weight": own}
            targets.add(target)
    if isinstance(model, ScalarModel):
        tensors["base_model.model.score.weight"] = model.score.weight
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM",
        "base_model_name_or_path": os.fspath(base),
        "r": layer.rank,
        "lora_alpha": layer.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name for name in TARGETS if name in targets],
        "modules_to_save": ["score"] if scalar else None,
        "inference_mode": True,
    }
    text = json.dumps(config, indent=2) + "\n"
    shapes = {name: (dtype, tensor.shape) for name, tensor in tensors.items()}
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    replace_file(root / "adapter_config.json", lambda path: path.write_text(text, encoding="utf-8"))
    replace_file(
        root / "adapter_model.safetensors",
        lambda path: write_tensors(path, shapes, tensors.__getitem__),
    )
