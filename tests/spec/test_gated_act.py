"""Gated activations and their gradients."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.gated_act import ACTIVATIONS, gated_act, gated_act_ref
from kernels.launch import intercept
from kernels.rope import rope
from tests.implementations import (
    Implementation,
    check_once_differentiable,
    check_refused,
    gaps_in,
    gradients,
)
from tests.rows import ROWS, check_rows
from tests.spec import test_rope

# Tokens and size: one, several rows a Triton program, a row of several programs, nothing.
SHAPES = [(1, 1), (63, 192), (64, 64), (129, 20), (2, 1030), (0, 8), (3, 0)]
EXTREME = [-1e20, -1e4, -89.0, -50.0, -0.0, 0.0, 50.0, 89.0, 1e4, 1e20]
# exp(100) is infinite, as it has to be, and inf - inf stands in the branch not taken.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow"),
    pytest.mark.filterwarnings("ignore:invalid value"),
]


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS: dict[str, Callable[[float], float]] = {"silu": silu, "gelu_tanh": gelu_tanh}


def gated(activation: str, op: Callable[..., Tensor] = gated_act) -> Callable[[Tensor], Tensor]:
    """The operation as a function of its input alone."""
    return lambda gate_up: op(gate_up, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_formula(activation: str) -> None:
    gate, up = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)).double() * 3
    y = gated_act_ref(torch.cat([gate, up])[None], activation)
    active = torch.tensor([FORMULAS[activation](x) for x in gate.tolist()], dtype=torch.float64)
    # 1 + tanh cancels for negative gates, so the error is relative to gate * up.
    assert ((y - active * up).abs() <= 16 * 2.0**-53 * (gate * up).abs()).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(
    on: Implementation, dtype: torch.dtype, shape: tuple[int, int], activation: str
) -> None:
    gate_up = 3 * on.draw(shape[0], 2 * shape[1], dtype=dtype)
    grad = on.draw(*shape, dtype=dtype, seed=1)
    op, reference = gated(activation), gated(activation, gated_act_ref)
    on.check(op, reference, gate_up)
    if on.name != "cpp":
        counts = on.check_gradients(op, reference, [gate_up], [grad])
        assert counts["_gated_act_backward_kernel"] == (on.name == "triton" and grad.numel() > 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slices(on: Implementation, activation: str) -> None:
    """And gradients of any layout; nothing beside them is read."""
    gate_up = on.poisoned(35, 82)
    op, reference = gated(activation), gated(activation, gated_act_ref)
    assert on.check(op, reference, gate_up).is_contiguous()
    if on.name != "cpp":
        for grad in on.layouts(35, 41):
            on.check_gradients(op, reference, [gate_up], [grad])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_gates(on: Implementation, activation: str) -> None:
    gate = torch.tensor([*EXTREME, math.inf, math.nan])
    gate_up = torch.cat((gate, torch.ones(12)))[None].to(on.device)
    out = on.run(gated(activation), gate_up).cpu()[0]
    assert out[-2] == math.inf and out[-1].isnan()
    # silu(-50) is about 1e-20; a quotient, a product, exp: a few units in the last place.
    close = partial(torch.testing.assert_close, atol=1e-18, rtol=1e-6)
    gate, relu = gate[:-2], gate[:-2].clamp(min=0)
    close(out[:-2], relu)
    if on.name != "cpp":
        (grad,) = gradients(gated(activation), [gate_up], [torch.ones(1, 12, device=on.device)])
        d_gate, d_up = grad.cpu()[0].split(12)
        assert d_gate[-1].isnan() and d_up[-1].isnan()
        close(d_gate[:-2], (gate > 0) + 0.5 * (gate == 0))
        close(d_up[:-2], relu)


@pytest.mark.implementations("torch", "triton")
def test_a_second_gradient_is_refused(on: Implementation) -> None:
    check_once_differentiable(gated("silu"), on.draw(4, 10))


@pytest.mark.implementations("torch", "cpp")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [96, 517])
def test_rows_do_not_depend_on_each_other(on: Implementation, activation: str, size: int) -> None:
    gate_up = on.draw(ROWS, 2 * size)
    check_rows(lambda rows: gated_act(gate_up[:rows], activation))


def test_bad_arguments() -> None:
    check_refused(
        gated_act,
        {"gate_up": torch.ones(2, 8), "activation": "silu"},
        ({"gate_up": torch.ones(2, 7)}, r"\(2, 7\)"),
        ({"gate_up": torch.ones(8)}, r"\(8,\)"),
        ({"gate_up": torch.ones(2, 8, dtype=torch.int64)}, "int64"),
        ({"activation": "relu"}, "'relu'"),
    )


@pytest.mark.implementations("triton")
def test_what_no_kernel_takes_is_refused(on: Implementation) -> None:
    gate_up = on.draw(4, 8)
    arguments = {"gate_up": gate_up, "activation": "silu"}
    check_refused(
        gated_act, arguments, *gaps_in(arguments), ({"gate_up": gate_up.double()}, "float64")
    )


@pytest.mark.implementations("triton")
def test_shapes_lead_to_every_tiling(on: Implementation) -> None:
    """Of this operation and of rope: rows of one program and of several, one row a program, and a
    row of several programs."""
    grids: dict[str, list[tuple[int, ...]]] = {"_rope_kernel": [], "_gated_act_kernel": []}

    def record(kernel: Any, grid: tuple[int, ...], _: Any, options: dict[str, Any]) -> None:
        grids[kernel.__name__].append((options["ROWS"], *grid))

    with intercept(record):
        for tokens, heads, dim in test_rope.SHAPES:
            rope(on.draw(tokens, heads, dim), *test_rope.tables(on, tokens, dim))
        for tokens, size in SHAPES:
            gated_act(on.draw(tokens, 2 * size), "silu")
    for found in grids.values():
        assert any(rows > 1 and programs == 1 for rows, programs, *_ in found)
        assert any(rows > 1 and programs > 1 for rows, programs, *_ in found)
        assert any(rows == 1 for rows, *_ in found)
    assert any(pieces > 1 for _, _, pieces in grids["_gated_act_kernel"])
