"""Rotary embeddings, their gradients, and their tables of cosines and sines."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.rope import rope, rope_cos_sin, rope_ref
from tests.implementations import Implementation
from tests.rows import ROWS, check_rows

# Tokens, heads, channels: one pair, Triton programs full and in part, one long head a program,
# nothing.
SHAPES = [(1, 1, 2), (63, 1, 64), (64, 2, 32), (129, 3, 20), (5, 2, 2050), (0, 2, 8), (3, 0, 8)]
IN_TORCH_AND_TRITON = pytest.mark.implementations("torch", "triton")


def tables(on: Implementation, tokens: int, dim: int, first: int = 100) -> tuple[Tensor, Tensor]:
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, dim, 2) / dim)
    cos, sin = rope_cos_sin(torch.arange(first, first + tokens), inv_freq)
    return cos.to(on.device), sin.to(on.device)


def turn(cos: Tensor, sin: Tensor, op: Callable[..., Tensor] = rope) -> Callable[[Tensor], Tensor]:
    """The operation as a function of x alone, on any device."""
    return lambda x: op(x, cos.to(x.device), sin.to(x.device))


def turn_ref(cos: Tensor, sin: Tensor) -> Callable[[Tensor], Tensor]:
    return turn(cos, sin, rope_ref)


def test_reference_is_a_complex_product() -> None:
    """Of pairs half a head apart and cos + i sin."""
    rng = np.random.default_rng(0)
    x, angles = rng.standard_normal((17, 2, 24)), 100 * rng.standard_normal((17, 12))
    turned = (x[..., :12] + 1j * x[..., 12:]) * np.exp(1j * angles)[:, None]
    y = rope_ref(*map(torch.from_numpy, (x, np.cos(angles), np.sin(angles))))
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_values(on: Implementation, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    cos, sin = tables(on, shape[0], shape[-1])
    on.check(turn(cos, sin), turn_ref(cos, sin), on.draw(*shape, dtype=dtype))


def test_slices(on: Implementation) -> None:
    """Of a fused projection, and of wider tables; nothing beside them is read."""
    x, half = on.poisoned(65, 3, 24), (65, 12)
    cos, sin = (on.poisoned(*half).copy_(table) for table in tables(on, 65, 24))
    if on.name == "cpp":  # tables are its own
        cos, sin = cos.contiguous(), sin.contiguous()
    on.check(turn(cos, sin), turn_ref(cos, sin), x)


def test_products_depend_on_the_distance_alone(on: Implementation) -> None:
    q, k = on.draw(1, 1, 32), on.draw(1, 1, 32, seed=1)

    def score(q_at: int, k_at: int) -> float:
        turned = (turn(*tables(on, 1, 32, at))(x) for x, at in ((q, q_at), (k, k_at)))
        return float(torch.mul(*turned).sum())

    # Angles are float32: off by half a unit in the last place of 1000 radians, for 32 terms.
    bound = 4 * 1000 * 2.0**-24 * float(q.norm() * k.norm())
    assert score(1000, 990) == pytest.approx(score(10, 0), abs=bound)
    assert abs(score(10, 0) - score(20, 0)) > bound


@pytest.mark.implementations("torch", "cpp")
@pytest.mark.parametrize(("heads", "dim"), [(6, 32), (1, 10), (3, 24)])
def test_rows_do_not_depend_on_each_other(on: Implementation, heads: int, dim: int) -> None:
    x = on.draw(ROWS, heads * dim + 13)[:, 5 : 5 + heads * dim].unflatten(-1, (heads, dim))
    cos, sin = tables(on, ROWS, dim)
    check_rows(lambda rows: rope(x[:rows], cos[:rows], sin[:rows]))


@IN_TORCH_AND_TRITON
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(on: Implementation, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, grad = on.draw(*shape, dtype=dtype), on.draw(*shape, dtype=dtype, seed=1)
    cos, sin = tables(on, shape[0], shape[-1])
    counts = on.check_gradients(turn(cos, sin), turn_ref(cos, sin), [x], [grad])
    assert counts["_rope_kernel"] == 2 * (x.numel() > 0 and on.name == "triton")


@IN_TORCH_AND_TRITON
def test_gradients_of_slices(on: Implementation) -> None:
    """Of gradients of any layout and of wider tables; nothing beside them is read."""
    cos, sin = (on.poisoned(33, 10).copy_(table) for table in tables(on, 33, 20))
    for grad in on.layouts(33, 3, 20):
        on.check_gradients(turn(cos, sin), turn_ref(cos, sin), [on.draw(33, 3, 20)], [grad])


@IN_TORCH_AND_TRITON
def test_a_second_gradient_is_refused(on: Implementation) -> None:
    x = on.draw(4, 2, 6).requires_grad_()
    y = turn(*tables(on, 4, 6))(x)
    (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.implementations("torch", "cpp")
def test_angles_are_float32_and_cosines_those_of_float64(on: Implementation) -> None:
    """Rounded once, for angles up to those of a million positions."""
    positions = torch.cat([torch.arange(5000), torch.arange(0, 1 << 20, 977)])
    inv_freq = 1 / 10000 ** (torch.arange(24) / 24)
    angles = (positions[:, None].float() * inv_freq).double()
    for found, exact in zip(
        rope_cos_sin(positions, inv_freq), (angles.cos(), angles.sin()), strict=True
    ):
        assert found.dtype == torch.float32
        # torch's own float32 functions are within a unit in the last place.
        bound = 0 if on.name == "cpp" else 2.0**-23
        assert (found.double() - exact.float().double()).abs().max() <= bound


def test_bad_arguments() -> None:
    cos, sin = torch.ones(2, 4, 4)
    for arguments, message in (
        ((torch.ones(4, 2, 7), cos, sin), r"\(4, 2, 7\)"),
        ((torch.ones(4, 2, 8, dtype=torch.int64), cos, sin), "int64"),
        ((torch.ones(5, 2, 8), cos, sin), r"cos must be \(5, 4\)"),
        ((torch.ones(4, 2, 8), cos, sin.double()), r"sin must be .* got .*float64"),
    ):
        with pytest.raises(ValueError, match=message):
            rope(*arguments)
    with pytest.raises(ValueError, match="positions must be"):
        rope_cos_sin(torch.ones(3), torch.ones(4))


@pytest.mark.implementations("triton")
def test_what_no_kernel_takes_is_refused(on: Implementation) -> None:
    x, (cos, sin) = on.draw(4, 2, 8), tables(on, 4, 8)
    for arguments, message in (
        ((x.mT.contiguous().mT, cos, sin), r"contiguous, got shape \(4, 2, 8\) .* \(16, 1, 2\)"),
        ((x, cos.T.contiguous().T, sin), r"contiguous, got shape \(4, 4\) with strides \(1, 4\)"),
        ((x.double(), cos, sin), "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            rope(*arguments)
