import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.gated_act import ACTIVATIONS, gated_act, gated_act_ref
from tests.rows import ROWS, check_rows


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ORACLES: dict[str, Callable[[float], float]] = {"silu": silu, "gelu_tanh": gelu_tanh}


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)


def oracle(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.double().chunk(2, -1)
    active = [[ORACLES[activation](value) for value in row] for row in gate.tolist()]
    return torch.tensor(active, dtype=torch.float64).reshape(gate.shape) * up


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 64), (1, 2), (7, 66), (0, 8)])
def test_equals_the_formula(shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> None:
    gate_up = draw(shape, dtype)
    expected = oracle(gate_up, activation)
    gate, up = gate_up.double().chunk(2, -1)
    # 1 + tanh cancels for negative gates, so the error inside is relative to gate * up: at most 16
    # roundings of it. One more rounding at the end.
    inside = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bound = 8 * inside * (gate * up).abs() + expected.abs() * torch.finfo(dtype).eps / 2
    for op in (gated_act_ref, gated_act):
        out = op(gate_up, activation)
        assert out.dtype == dtype and out.shape == (shape[0], shape[1] // 2)
        assert ((out.double() - expected).abs() <= bound + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation: str) -> None:
    gate_up = draw((4, 10), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gated_act(x, activation), [gate_up])


def test_a_second_gradient_is_refused() -> None:
    x = draw((4, 10), torch.float64).requires_grad_()
    (first,) = torch.autograd.grad((gated_act(x, "silu") ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_in_low_precision_agree_with_float64(activation: str) -> None:
    gate_up = draw((16, 64), torch.bfloat16)
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        x = gate_up.to(dtype, copy=True).requires_grad_()
        gated_act(x, activation).sum().backward()
        assert x.grad is not None and x.grad.dtype == dtype
        grads.append(x.grad.double())
    torch.testing.assert_close(grads[0], grads[1], rtol=2.0**-8, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_gates_stay_finite_both_ways(activation: str) -> None:
    gate = torch.tensor([-1e4, -1000.0, -89.0, -50.0, -0.0, 0.0, 50.0, 89.0, 1000.0, 1e4])
    gate_up = torch.cat((gate, torch.ones_like(gate)))[None].requires_grad_()
    out = gated_act(gate_up, activation)
    torch.testing.assert_close(out[0], gate.clamp(min=0), atol=1e-18, rtol=1e-6)
    out.sum().backward()
    assert gate_up.grad is not None and gate_up.grad.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [96, 512, 517])
def test_rows_do_not_depend_on_each_other(activation: str, size: int) -> None:
    gate_up = draw((ROWS, 2 * size))
    check_rows(lambda rows: gated_act(gate_up[:rows], activation))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"\(2, 7\)"):
        gated_act(torch.ones(2, 7), "silu")
    with pytest.raises(ValueError, match=r"\(8,\)"):
        gated_act(torch.ones(8), "silu")
    with pytest.raises(ValueError, match="int64"):
        gated_act(torch.ones(2, 8, dtype=torch.int64), "silu")
    with pytest.raises(ValueError, match="'relu'"):
        gated_act(torch.ones(2, 8), "relu")
