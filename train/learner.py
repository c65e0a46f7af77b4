"""A model under training: what learns of it, in which dtype, on how many devices, and its updates.

`model` is what gradients go through: with adapters (LoRA) on a frozen base, or divided among ranks,
where the settings say so. `plain` is the same model as one whole `Transformer` or `ScalarModel`,
adapters merged: what samples, and what is saved. On one device without adapters the two are one;
else `plain` is a copy, which `refresh` brings up to date.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch

from models.lora import TARGETS, AdaptedLinear, add_adapters, merged_weight, save_adapter
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
    gradients and two moments. With adapters it takes it twice, for the frozen base that gradients
    go through and the whole merged copy that samples, and what learns is small beside them.
    """

    def __init__(self, model: M, args: LearnerArgs) -> None:
        """model: whole, in the dtype of the settings; it becomes `plain`. Its parameters that
        require no gradient stay as they are."""
        self.args = args
        self.plain: M = model
        self.model: M = model
        if args.lora_rank or parallel.world_size() > 1:
            self.model = deepcopy(model)
            self.plain.requires_grad_(False)
        decoder = decoder_of(self.model)
        if args.lora_rank:
            add_adapters(decoder, args.lora_rank, args.lora_alpha, args.seed, args.lora_targets)
        decoder.recompute = args.recompute
        parallel.shard(self.model)
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
        """Bring `plain` up to date; all ranks together."""
        if not self._is_stale:
            return
        parallel.reshard(self.model)
        modules = dict(self.model.named_modules())
        for name, target in self.plain.named_parameters():
            owner, _, leaf = name.rpartition(".")
            module = modules[owner]
            is_adapted = isinstance(module, AdaptedLinear) and leaf == "weight"
            if not is_adapted and not getattr(module, leaf).requires_grad:
                continue
            source = parallel.whole(getattr(module, leaf))
            if is_adapted:
                low, high = parallel.whole(module.lora_a), parallel.whole(module.lora_b)
                source = merged_weight(source, low, module.spread(high), module.scale)
            target.copy_(source)
        self._is_stale = False

    def save(self, directory: Path, base: Path) -> None:
        """Write `plain`, brought up to date, with the config of `base`, the model directory that it
        was loaded from; all ranks together, of which the first writes.

        With adapters the weights are written in the dtype in which those of `base` are stored, not
        the one of training, and the adapters beside them, as `peft` reads them, in `adapter`. What
        bfloat16 rounds away of a merged weight, the adapters still have.
        """
        self.refresh()
        dtype = None
        if self.args.lora_rank:
            dtype = stored_dtype(base)
            learnt = {
                name: parallel.whole(parameter.detach())
                for name, parameter in self.model.named_parameters() if parameter.requires_grad
            }  # fmt: skip
            if parallel.is_first():
                save_adapter(self.model, learnt, directory / "adapter", base, dtype)
        if parallel.is_first():
            save_pretrained(self.plain, directory, base, dtype)
