"""A model under training: what learns of it, in which dtype, on how many devices, and its updates.

`model` is what gradients go through: with adapters (LoRA) on a frozen base where the settings say
so. `plain` is what samples, and what is saved. On one device the two are one. Where what learns is
divided among ranks, `plain` has a whole copy of that, which `refresh` brings up to date, and shares
what is frozen: the base of adapters is there once.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch

from models.lora import TARGETS, add_adapters, save_adapter
from models.scalar_head import ScalarModel, decoder_of
from models.transformer import Transformer
from models.weights import save_pretrained, stored_dtype
from train import parallel
from train.optimizer import Optimizer, cosine_lr
from train.settings import check_at_least, check_positive

M = TypeVar("M", Transformer, ScalarModel)


@dataclass(frozen=True, kw_only=True)
class LearnerArgs:
    """How a model learns: the settings that all training loops share."""

    steps: int = 1000  # of training in all, those of an interrupted run included
    lr: float = 1e-4  # highest learning rate, from which it falls along half a cosine
    warmup: int = 100  # steps in which the learning rate rises to it
    weight_decay: float = 0.1  # decoupled from the gradient
    clip: float = 1.0  # largest norm of the gradient
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights; optimizer state is float32
    lora_rank: int = 0  # of adapters on the linear layers, the base frozen; 0: all weights learn
    lora_alpha: float = 16.0  # adapters are scaled by this over their rank
    lora_targets: tuple[str, ...] = TARGETS  # the projections that have adapters
    recompute: bool = False  # activations, layer by layer in the backward: less memory, more time
    seed: int = 0  # of all draws

    def __post_init__(self) -> None:
        check_at_least(1, self, "steps")
        check_at_least(0, self, "warmup", "weight_decay", "lora_rank")
        check_positive(self, "lr", "clip")


class Learner(Generic[M]):
    """A model under training and its optimizer.

    Without adapters training in float32 takes the memory of the weights four times: themselves,
    gradients and two moments. With adapters it takes it once, for the frozen base, and what learns
    is small beside it. Sampling in C++ takes one packed copy more (`kernels/packed_linear.py`).
    """

    def __init__(self, model: M, args: LearnerArgs) -> None:
        """model: whole, in the dtype of the settings; it becomes `plain`, in place. Its parameters
        that require no gradient stay as they are."""
        self.args = args
        decoder = decoder_of(model)
        if args.lora_rank:
            add_adapters(decoder, args.lora_rank, args.lora_alpha, args.seed, args.lora_targets)
        decoder.recompute = args.recompute
        self.plain: M = model
        self.model: M = model
        if parallel.world_size() > 1:
            frozen = [p for p in model.parameters() if not p.requires_grad]
            self.model = deepcopy(model, {id(p): p for p in frozen})
            self.plain.requires_grad_(False)
            parallel.shard(self.model, whole=frozen)
        self.optimizer = Optimizer(self.model, args.weight_decay)
        self._is_stale = False

    def update(self, step: int, loss: float, rows: Sequence[str] = ()) -> dict[str, float]:
        """The update of 0-based `step` with the gradients that have been added up; returns their
        norm and the learning rate. Raises FloatingPointError naming step and rows where loss or
        norm is not finite."""
        args = self.args
        lr = cosine_lr(step, args.steps, args.lr, args.warmup)
        try:
            norm = self.optimizer.step(lr, args.clip, loss)
        except FloatingPointError as error:
            named = f"; rows {', '.join(rows)}" if rows else ""
            raise FloatingPointError(f"step {step}: {error}{named}") from None
        self._is_stale = self.plain is not self.model
        return {"grad_norm": norm, "lr": lr}

    def loaded(self) -> None:
        """The optimizer's tensors have been filled from a checkpoint."""
        self.optimizer.loaded()
        self._is_stale = self.plain is not self.model

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring `plain` up to date, and leave the room of gradients to what samples; all ranks
        together."""
        self.optimizer.zero_grad()
        if not self._is_stale:
            return
        parallel.reshard(self.model)
        learning = dict(self.model.named_parameters())
        for name, target in self.plain.named_parameters():
            if learning[name].requires_grad:
                target.copy_(parallel.whole(learning[name]))
        self._is_stale = False

    def save(self, directory: Path, base: Path) -> None:
        """Write `plain`, brought up to date, with the config of `base`, the model directory that it
        was loaded from; all ranks together, of which the first writes.

        Adapters are merged, and the weights written in the dtype in which those of `base` are
        stored, not the one of training; the adapters are beside them, as `peft` reads them, in
        `adapter`. What bfloat16 rounds away of a merged weight, the adapters still have.
        """
        self.refresh()
        if not parallel.is_first():
            return
        dtype = None
        if self.args.lora_rank:
            dtype = stored_dtype(base)
            save_adapter(self.plain, directory / "adapter", base, dtype)
        save_pretrained(self.plain, directory, base, dtype)
