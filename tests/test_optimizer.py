"""AdamW against its formula, and the learning rate's schedule."""

import math

import pytest
import torch
from torch import nn

from train.optimizer import Optimizer, cosine_lr


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.norm = nn.Parameter(torch.randn(3, generator=generator))


def test_steps_follow_adamw_and_decay_matrices_only() -> None:
    model = Model()
    optimizer = Optimizer(model, weight_decay=0.5)
    exact = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in exact.items()}
    second = {name: torch.zeros_like(p) for name, p in exact.items()}
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 6):
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            grad = p.grad.double()
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            decay = 0.5 if name == "matrix" else 0.0
            mean = first[name] / (1 - 0.9**step)
            spread = (second[name] / (1 - 0.95**step)).sqrt() + 1e-8
            exact[name] = exact[name] * (1 - 1e-2 * decay) - 1e-2 * mean / spread
        optimizer.step(1e-2, clip=1e9, loss=0.0)
    eps = torch.finfo(torch.float32).eps
    for name, p in model.named_parameters():
        # Five steps of a few roundings each, on values and updates of size about 1 and below.
        assert (p.double() - exact[name]).abs().max() < 5 * 4 * eps * exact[name].abs().max()


def test_what_is_frozen_stays() -> None:
    model = Model()
    model.norm.requires_grad_(False)
    before = model.norm.clone()
    optimizer = Optimizer(model, weight_decay=0.5)
    assert list(optimizer.optimized) == ["matrix"]
    model.matrix.grad = torch.ones(4, 3)
    optimizer.step(0.1, clip=1.0, loss=0.0)
    assert model.norm.equal(before)


def test_gradients_are_clipped_together_and_their_norm_is_told() -> None:
    model = Model()
    optimizer = Optimizer(model, weight_decay=0.0)
    model.matrix.grad, model.norm.grad = torch.full((4, 3), 1.0), torch.full((3,), 2.0)
    norm = optimizer.step(0.1, clip=0.5, loss=0.0)
    assert math.isclose(norm, math.sqrt(12 + 12), rel_tol=1e-6)
    assert math.isclose(float(model.norm.grad.norm()), 0.5 * math.sqrt(0.5), rel_tol=1e-5)


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_what_is_not_finite_changes_nothing(loss: float, gradient: float) -> None:
    model = Model()
    optimizer = Optimizer(model, weight_decay=0.1)
    before = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    model.matrix.grad, model.norm.grad = torch.full((4, 3), gradient), torch.ones(3)
    with pytest.raises(FloatingPointError, match=f"loss {loss}, gradient norm"):
        optimizer.step(0.1, clip=1.0, loss=loss)
    assert all(before[name].equal(tensor) for name, tensor in optimizer.tensors().items())


def test_bfloat16_learns_in_float32() -> None:
    """Gradients of micro-batches are added up in float32, and steps too small for bfloat16 are not
    lost: as a float32 model with the same gradients, which is then rounded."""
    wide = Model()
    with torch.no_grad():
        for p in wide.parameters():
            p.copy_(p.bfloat16())
    low = Model().bfloat16()
    of_wide, of_low = Optimizer(wide, 0.1), Optimizer(low, 0.1)
    generator = torch.Generator().manual_seed(2)
    start = low.matrix.detach().clone()
    for _ in range(40):
        of_wide.zero_grad()
        of_low.zero_grad()
        for _ in range(3):
            x = (torch.randn(4, 3, generator=generator) + 2).bfloat16()
            (wide.matrix * x.float()).sum().backward()
            (low.matrix * x).sum().backward()
            assert low.matrix.grad is None
        of_wide.step(2e-4, 1.0, 0.0)
        of_low.step(2e-4, 1.0, 0.0)
        assert of_low.optimized["matrix"].equal(wide.matrix)
        assert low.matrix.equal(wide.matrix.bfloat16())
    assert not low.matrix.equal(start)


@pytest.mark.parametrize("steps,warmup", [(100, 10), (100, 0), (7, 7), (5, 20), (1, 0)])
def test_the_schedule_rises_linearly_and_falls_along_a_cosine(steps: int, warmup: int) -> None:
    rates = [cosine_lr(step, steps, peak=2.0, warmup=warmup) for step in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)
    for step, rate in enumerate(rates[:warmup]):
        assert math.isclose(rate, 2.0 * (step + 1) / warmup)
    falling = rates[warmup:]
    for i, rate in enumerate(falling):
        share = i / len(falling)
        assert math.isclose(rate, 0.04 + 1.96 * math.cos(math.pi * share / 2) ** 2)
    assert falling == sorted(falling, reverse=True)


def test_the_schedule_ends_at_its_floor() -> None:
    assert math.isclose(cosine_lr(100, 100, 2.0, 10, floor=0.1), 0.2)
    assert cosine_lr(10, 100, 2.0, 10, floor=0.1) == 2.0
