import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.rope import rope, rope_cos_sin, rope_ref
from tests.rows import ROWS, check_rows


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables(tokens: int, dim: int, start: int = 0) -> tuple[Tensor, Tensor]:
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, dim, 2).float() / dim)
    return rope_cos_sin(torch.arange(start, start + tokens), inv_freq)


def oracle(x: Tensor, cos: Tensor, sin: Tensor) -> np.ndarray:
    """Pairs as complex numbers, multiplied by cos + i sin."""
    wide = x.double().numpy()
    half = x.shape[-1] // 2
    turn = cos.double().numpy() + 1j * sin.double().numpy()
    turned = (wide[..., :half] + 1j * wide[..., half:]) * turn[:, None]
    return np.concatenate([turned.real, turned.imag], -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 3, 24), (1, 1, 2), (17, 2, 64)])
def test_equals_complex_multiplication(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = draw(shape, dtype)
    cos, sin = tables(shape[0], shape[-1], start=100)
    expected = oracle(x, cos, sin)
    # Two products and a sum inside, each rounded, of terms no larger than the pair; one at the end.
    inside = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bound = (
        3 * inside * x.double().abs().max().item() + np.abs(expected) * torch.finfo(dtype).eps / 2
    )
    for op in (rope_ref, rope):
        out = op(x, cos, sin)
        assert out.dtype == dtype
        assert (np.abs(out.double().numpy() - expected) <= bound).all()


def test_products_depend_on_the_distance_alone() -> None:
    q, k = draw((1, 1, 32), torch.float64), draw((1, 1, 32), torch.float64, 1)

    def score(q_at: int, k_at: int) -> float:
        return float((rope(q, *tables(1, 32, q_at)) * rope(k, *tables(1, 32, k_at))).sum())

    # Angles are float32: off by half a unit in the last place of 1000 radians, for 32 terms.
    bound = 4 * 1000 * 2.0**-24 * float(q.norm() * k.norm())
    assert score(1000, 990) == pytest.approx(score(10, 0), abs=bound)
    assert abs(score(10, 0) - score(20, 0)) > bound


def test_angles_are_float32_at_far_positions() -> None:
    positions = torch.tensor([0, 1, 131071])
    inv_freq = torch.tensor([1.0, 0.001])
    cos, sin = rope_cos_sin(positions, inv_freq)
    angles = positions.double().numpy()[:, None] * inv_freq.double().numpy()
    assert cos.dtype == sin.dtype == torch.float32
    bound = np.maximum(angles, 1) * 2.0**-23
    assert (np.abs(cos.double().numpy() - np.cos(angles)) <= bound).all()
    assert (np.abs(sin.double().numpy() - np.sin(angles)) <= bound).all()


def test_gradients() -> None:
    x = draw((4, 2, 6), torch.float64).requires_grad_()
    cos, sin = tables(4, 6, start=3)
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin), [x])


def test_a_second_gradient_is_refused() -> None:
    x = draw((4, 2, 6)).requires_grad_()
    (first,) = torch.autograd.grad((rope(x, *tables(4, 6)) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize(("heads", "dim"), [(6, 32), (1, 10), (3, 24)])
def test_rows_do_not_depend_on_each_other(heads: int, dim: int) -> None:
    wide = draw((ROWS, heads * dim + 13))
    x = wide[:, 5 : 5 + heads * dim].unflatten(-1, (heads, dim))
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, dim, 2).float() / dim)
    positions = torch.arange(ROWS).flip(0)

    def op(rows: int) -> Tensor:
        return rope(x[:rows], *rope_cos_sin(positions[:rows], inv_freq))

    check_rows(op)


def test_bad_arguments() -> None:
    cos, sin = tables(4, 8)
    with pytest.raises(ValueError, match=r"\(4, 2, 7\)"):
        rope(torch.ones(4, 2, 7), cos, sin)
    with pytest.raises(ValueError, match="int64"):
        rope(torch.ones(4, 2, 8, dtype=torch.int64), cos, sin)
    with pytest.raises(ValueError, match=r"cos must be \(5, 4\)"):
        rope(torch.ones(5, 2, 8), cos, sin)
    with pytest.raises(ValueError, match=r"sin must be .* got .*float64"):
        rope(torch.ones(4, 2, 8), cos, sin.double())
    with pytest.raises(ValueError, match="positions must be"):
        rope_cos_sin(torch.ones(3), torch.ones(4))
