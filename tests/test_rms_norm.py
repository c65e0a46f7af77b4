import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.rms_norm import rms_norm, rms_norm_ref
from tests.rows import ROWS, check_rows

EPS = 1e-6


def oracle(x: Tensor, weight: Tensor, plus_one: bool) -> np.ndarray:
    wide, scale = x.double().numpy(), weight.double().numpy() + plus_one
    rms = np.sqrt((wide**2).mean(-1, keepdims=True) + EPS)
    return wide / rms * scale


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 64), (1, 1), (3, 2, 24), (7, 129)])
@pytest.mark.parametrize("plus_one", [False, True])
def test_equals_the_formula(dtype: torch.dtype, shape: tuple[int, ...], plus_one: bool) -> None:
    x, weight = draw(shape, dtype), draw(shape[-1:], dtype, seed=1)
    expected = oracle(x, weight, plus_one)
    # Half a unit in the last place of the result, and a few roundings of the float32 inside.
    bound = np.abs(expected) * (
        torch.finfo(dtype).eps / 2 + 4 * 2.0**-24 * (dtype != torch.float64)
    )
    bound += np.abs(expected) * 4 * 2.0**-52
    for op in (rms_norm_ref, rms_norm):
        y = op(x, weight, EPS, plus_one)
        assert isinstance(y, Tensor) and y.dtype == dtype
        assert (np.abs(y.double().numpy() - expected) <= bound).all()


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.usefixtures("in_torch")
def test_op_equals_reference_exactly(plus_one: bool) -> None:
    """In torch; tests/test_cpp.py holds C++ to float64."""
    x, residual, weight = (
        draw((33, 96), torch.float32),
        draw((33, 96), torch.float32, 1),
        draw((96,), torch.float32, 2),
    )
    for a, b in zip(
        rms_norm(x, weight, EPS, plus_one, residual),
        rms_norm_ref(x, weight, EPS, plus_one, residual),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_residual_is_rounded_before_the_norm() -> None:
    x, residual = draw((9, 32), torch.bfloat16), draw((9, 32), torch.bfloat16, 1)
    weight = draw((32,), torch.bfloat16, 2)
    normed, total = rms_norm(x, weight, EPS, residual=residual)
    assert torch.equal(total, x + residual)
    alone = rms_norm(x + residual, weight, EPS)
    assert isinstance(alone, Tensor) and torch.equal(normed, alone)


def test_a_wider_residual_keeps_its_dtype() -> None:
    x, residual = draw((4, 8), torch.bfloat16), draw((4, 8), torch.float32, 1)
    normed, total = rms_norm(x, torch.ones(8), EPS, residual=residual)
    assert normed.dtype == total.dtype == torch.float32
    assert torch.equal(total, x.float() + residual)


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradients(plus_one: bool, with_residual: bool) -> None:
    x, weight = draw((2, 3, 6), torch.float64), draw((6,), torch.float64, 1)
    residual = draw((2, 3, 6), torch.float64, 2) if with_residual else None
    inputs = [t.requires_grad_() for t in (x, weight, residual) if t is not None]

    def op(
        x: Tensor, weight: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        return rms_norm(x, weight, EPS, plus_one, residual)

    assert torch.autograd.gradcheck(op, inputs)


def test_gradient_dtypes_in_mixed_precision() -> None:
    x = draw((4, 8), torch.bfloat16).requires_grad_()
    weight = draw((8,), torch.float32, 1).requires_grad_()
    y = rms_norm(x, weight, EPS)
    assert isinstance(y, Tensor) and y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_gradients_of_some_inputs() -> None:
    x, weight, residual = (draw(s, torch.float32, i) for i, s in enumerate([(4, 8), (8,), (4, 8)]))
    inputs = {"x": x, "weight": weight, "residual": residual}

    def gradients(*names: str) -> dict[str, Tensor]:
        given = {name: t.clone().requires_grad_(name in names) for name, t in inputs.items()}
        y, total = rms_norm(eps=EPS, **given)  # type: ignore[arg-type]
        (y * total.detach()).sum().backward()
        return {name: t.grad for name, t in given.items() if t.grad is not None}

    expected = gradients(*inputs)
    assert set(expected) == set(inputs)
    for names in (("x",), ("weight",), ("residual",), ("x", "residual")):
        found = gradients(*names)
        assert set(found) == set(names)
        assert all(found[name].equal(expected[name]) for name in names)


def test_a_second_gradient_is_refused() -> None:
    x = draw((4, 8), torch.float64).requires_grad_()
    y = rms_norm(x, torch.ones(8), EPS)
    assert isinstance(y, Tensor)
    (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize("shape", [(ROWS, 64), (ROWS, 77), (ROWS, 6, 32), (ROWS, 2, 20)])
def test_rows_do_not_depend_on_each_other(shape: tuple[int, ...]) -> None:
    x, weight, wide = (
        draw(shape, torch.float32),
        draw(shape[-1:], torch.float32, 1),
        draw((ROWS, 999), torch.float32, 2),
    )
    check_rows(lambda rows: rms_norm(x[:rows], weight, EPS, residual=x[:rows].flip(-1))[0])
    # As in the transformer, heads are a slice of a wider row.
    heads = wide[:, 7 : 7 + x[0].numel()].unflatten(-1, shape[1:]) if len(shape) == 3 else x
    check_rows(lambda rows: torch.as_tensor(rms_norm(heads[:rows], weight, EPS)))


@pytest.mark.parametrize(
    ("x", "weight", "eps", "residual", "message"),
    [
        (torch.ones(2, 4, dtype=torch.int32), torch.ones(4), EPS, None, "int32"),
        (torch.ones(2, 4), torch.ones(5), EPS, None, r"\(5,\)"),
        (torch.ones(2, 4), torch.ones(4), EPS, torch.ones(2, 1), r"\(2, 1\)"),
        (torch.ones(2, 4), torch.ones(4), 0.0, None, "eps must be positive, got 0.0"),
    ],
)
def test_bad_arguments(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, eps, residual=residual)
