"""AdamW in float32 over parameters of any dtype, and a cosine schedule with linear warm-up.

A parameter in bfloat16 has a float32 master: gradients of micro-batches, each rounded once, are
added up in it, moments and the update are its own, and the parameter is the master rounded. So a
small step is never lost in rounding.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from train.parallel import whole


class Optimizer:
    """AdamW with betas 0.9 and 0.95 over a model's parameters that require gradients; vectors
    (norms, biases) are not decayed. Weights laid out for sampling are noticed to have changed."""

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        self._parameters: dict[str, nn.Parameter] = {}
        self.optimized: dict[str, Tensor] = {}  # the parameters themselves, or their masters
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            own: Tensor = parameter
            if parameter.dtype.itemsize < 4:
                own = parameter.detach().float()
                parameter.register_post_accumulate_grad_hook(partial(_add_to_master, own))
            self._parameters[name] = parameter
            self.optimized[name] = own
        groups = [
            {"params": [p for p in self.optimized.values() if (p.dim() > 1) == decays],
             "weight_decay": weight_decay if decays else 0.0}
            for decays in (True, False)
        ]  # fmt: skip
        groups = [group for group in groups if group["params"]]
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
        for own in self.optimized.values():
            self._adamw.state[own] = {
                "step": torch.zeros((), device=own.device),
                "exp_avg": torch.zeros_like(own),
                "exp_avg_sq": torch.zeros_like(own),
            }

    def zero_grad(self) -> None:
        """Begin the next window of gradients."""
        self._adamw.zero_grad()

    def step(self, lr: float, clip: float, loss: float) -> float:
        """One update with gradients of norm at most `clip`; returns their norm before that.

        Raises FloatingPointError, with nothing changed, where the loss or the norm is not finite.
        """
        found = torch.nn.utils.clip_grad_norm_(self.optimized.values(), clip)
        norm = float(whole(found))
        if not math.isfinite(loss + norm):
            raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._write_back()
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """All that a step reads and changes besides gradients, by name, in place: a checkpoint's
        content. `loaded` has to follow when they have been filled."""
        found: dict[str, Tensor] = {}
        for name, own in self.optimized.items():
            found[f"weight.{name}"] = own.detach()
            for slot, value in self._adamw.state[own].items():
                found[f"{slot}.{name}"] = value
        return found

    def loaded(self) -> None:
        """`tensors` have been filled from a checkpoint."""
        self._write_back()

    @torch.no_grad()
    def _write_back(self) -> None:
        """Bring masters into parameters. The fused step does not count as a change of those that
        it updates itself; to what is kept beside them it has to."""
        for name, parameter in self._parameters.items():
            own = self.optimized[name]
            if own is parameter:
                torch.autograd.graph.increment_version(parameter)
            else:
                parameter.copy_(own)


@torch.no_grad()
def _add_to_master(master: Tensor, parameter: Tensor) -> None:
    """Move a parameter's gradient to its master."""
    assert parameter.grad is not None
    gradient = parameter.grad.to(master.dtype)
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None


def cosine_lr(step: int, steps: int, peak: float, warmup: int, floor: float = 0.02) -> float:
    """The learning rate of 0-based `step` of `steps`.

    It rises linearly to `peak`, which step `warmup` - 1 has, then falls along half a cosine towards
    floor * peak, which the step after the last would have.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
