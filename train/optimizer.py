"""AdamW with decay on matrices only, and a cosine schedule with linear warm-up."""

import math
from typing import Any

import torch
from torch import nn


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with betas 0.9 and 0.95; vectors (norms, biases) are not decayed."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    optimizer.register_step_post_hook(_mark_changed)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next steps."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _mark_changed(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """The fused step does not count as a change of its parameters; to what is kept beside them,
    such as weights laid out for sampling, it has to."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


def cosine_lr(step: int, steps: int, peak: float, warmup: int, floor: float = 0.02) -> float:
    """The learning rate of 0-based `step` of `steps`.

    It rises linearly to `peak`, which step `warmup` - 1 has, then falls along half a cosine towards
    floor * peak, which the step after the last would have.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
