"""Rotary embeddings, their gradients, and their tables of cosines and sines."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.rope import rope, rope_cos_sin, rope_ref
from tests.implementations import Implementation, check_once_differentiable, check_refused, gaps_in
from tests.rows import ROWS, check_rows

# Tokens, heads, channels: one pair, Triton programs full and in part, one long head a program,
# nothing.
SHAPES = [(1, 1, 2), (63, 1, 64), (64, 2, 32), (129, 3, 20), (5, 2, 2050), (0, 2, 8), (3, 0, 8)]


def tables(on: Implementation, tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, dim, 2) / dim)
    cos, sin = rope_cos_sin(torch.arange(100, 100 + tokens), inv_freq)
    return cos.to(on.device), sin.to(on.device)


def turn(cos: Tensor, sin: Tensor, op: Callable[..., Tensor] = rope) -> Callable[[Tensor], Tensor]:
    """The operation as a function of x alone, on any device."""
    return lambda x: op(x, cos.to(x.device), sin.to(x.device))


def test_reference_is_a_complex_product() -> None:
    """Of pairs half a head apart and cos + i sin."""
    rng = np.random.default_rng(0)
    x, angles = rng.standard_normal((17, 2, 24)), 100 * rng.standard_normal((17, 12))
    turned = (x[..., :12] + 1j * x[..., 12:]) * np.exp(1j * angles)[:, None]
    y = rope_ref(*map(torch.from_numpy, (x, np.cos(angles), np.sin(angles))))
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(
    on: Implementation, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    cos, sin = tables(on, shape[0], shape[-1])
    op, reference = turn(cos, sin), turn(cos, sin, rope_ref)
    x, grad = on.draw(*shape, dtype=dtype), on.draw(*shape, dtype=dtype, seed=1)
    on.check(op, reference, x)
    if on.name != "cpp":
        counts = on.check_gradients(op, reference, [x], [grad])
        assert counts["_rope_kernel"] == 2 * (on.name == "triton" and x.numel() > 0)


def test_slices(on: Implementation) -> None:
    """Of a fused projection, of wider tables and gradients of any layout; nothing beside them is
    read."""
    x = on.poisoned(65, 3, 24)
    cos, sin = tables(on, 65, 24)
    if on.name != "cpp":  # whose tables are its own
        cos, sin = (on.poisoned(65, 12).copy_(table) for table in (cos, sin))
    op, reference = turn(cos, sin), turn(cos, sin, rope_ref)
    on.check(op, reference, x)
    if on.name != "cpp":
        for grad in on.layouts(65, 3, 24):
            on.check_gradients(op, reference, [x], [grad])


@pytest.mark.implementations("torch", "cpp")
@pytest.mark.parametrize(("heads", "dim"), [(6, 32), (1, 10), (3, 24)])
def test_rows_do_not_depend_on_each_other(on: Implementation, heads: int, dim: int) -> None:
    x = on.draw(ROWS, heads * dim + 13)[:, 5 : 5 + heads * dim].unflatten(-1, (heads, dim))
    cos, sin = tables(on, ROWS, dim)
    check_rows(lambda rows: rope(x[:rows], cos[:rows], sin[:rows]))


@pytest.mark.implementations("torch", "triton")
def test_a_second_gradient_is_refused(on: Implementation) -> None:
    check_once_differentiable(turn(*tables(on, 4, 6)), on.draw(4, 2, 6))


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
    check_refused(
        rope,
        {"x": torch.ones(4, 2, 8), "cos": cos, "sin": sin},
        ({"x": torch.ones(4, 2, 7)}, r"\(4, 2, 7\)"),
        ({"x": torch.ones(4, 2, 8, dtype=torch.int64)}, "int64"),
        ({"x": torch.ones(5, 2, 8)}, r"cos must be \(5, 4\)"),
        ({"sin": sin.double()}, r"sin must be .* got .*float64"),
    )
    with pytest.raises(ValueError, match="positions must be"):
        rope_cos_sin(torch.ones(3), torch.ones(4))


@pytest.mark.implementations("triton")
def test_what_no_kernel_takes_is_refused(on: Implementation) -> None:
    x, (cos, sin) = on.draw(4, 2, 8), tables(on, 4, 8)
    arguments = {"x": x, "cos": cos, "sin": sin}
    check_refused(rope, arguments, *gaps_in(arguments), ({"x": x.double()}, "float64"))
