"""AdamW against its formula, and the learning rate's schedule."""

import math

import pytest
import torch
from torch import nn

from train.optimizer import cosine_lr, make_optimizer


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.norm = nn.Parameter(torch.randn(3, generator=generator))


def test_steps_follow_adamw_and_decay_matrices_only() -> None:
    model = Model()
    optimizer = make_optimizer(model, lr=1e-2, weight_decay=0.5)
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
        optimizer.step()
    eps = torch.finfo(torch.float32).eps
    for name, p in model.named_parameters():
        # Five steps of a few roundings each, on values and updates of size about 1 and below.
        assert (p.double() - exact[name]).abs().max() < 5 * 4 * eps * exact[name].abs().max()


def test_every_parameter_is_trained_once() -> None:
    model = Model()
    groups = make_optimizer(model, 1e-3, 0.1).param_groups
    trained = [id(p) for group in groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())


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
