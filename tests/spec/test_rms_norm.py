"""The root-mean-square norm and its gradients."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.launch import intercept
from kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_ref
from kernels.target import TARGETS, Target
from tests.implementations import (
    Implementation,
    check_once_differentiable,
    check_refused,
    gradients,
)
from tests.rows import ROWS, check_rows

EPS = 1e-6
# A row, rows of one Triton program and of several, heads, a norm past one vector; many blocks of
# rows for each program of the backward, of several rows and of one; nothing.
SHAPES: list[tuple[int, ...]] = [
    *((16,), (63, 192), (129, 20), (5, 6, 77), (2, 3, 4, 64), (3, 5000)),
    *((9, 61, 100), (37, 1100)),
    *((0, 64), (3, 0, 8)),
]


def norm(plus_one: bool = False, op: Callable[..., Any] = rms_norm) -> Callable[..., Any]:
    """The norm of x, or of x + residual, with its other arguments fixed."""
    return lambda x, weight, residual=None: op(x, weight, EPS, plus_one, residual)


def norm_ref(plus_one: bool = False) -> Callable[..., Any]:
    return norm(plus_one, rms_norm_ref)


@pytest.mark.parametrize("plus_one", [False, True])
def test_reference_is_the_formula(plus_one: bool) -> None:
    rng = np.random.default_rng(0)
    x, weight = 3 * rng.standard_normal((7, 3, 129)), rng.standard_normal(129)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * (weight + plus_one)
    y = norm_ref(plus_one)(torch.from_numpy(x), torch.from_numpy(weight))
    np.testing.assert_allclose(y.numpy(), expected, rtol=8 * 2.0**-52)


@pytest.mark.parametrize(
    ("shape", "plus_one"), [(shape, i % 2 == 0) for i, shape in enumerate([(1, 1), *SHAPES])]
)
def test_values_and_gradients(
    on: Implementation, dtype: torch.dtype, shape: tuple[int, ...], plus_one: bool
) -> None:
    op, reference = norm(plus_one), norm_ref(plus_one)
    x, weight = 3 * on.draw(*shape, dtype=dtype), on.draw(shape[-1], dtype=dtype, seed=1)
    on.check(op, reference, x, weight)
    residual = on.draw(*shape, dtype=dtype, seed=2)
    y, total = on.check(op, reference, x, weight, residual)
    assert total.equal(x + residual)
    # The sum is rounded before the norm.
    assert y.equal(op(total, weight))
    if on.name != "cpp" and x.numel() != 1:  # the gradient of one number is all rounding
        grad = on.draw(*shape, dtype=dtype, seed=3)
        counts = on.check_gradients(op, reference, (x, weight), [grad])
        if on.name == "triton":
            assert counts["_rms_norm_backward_kernel"] == (x.numel() > 0)
            assert counts["_sum_partials_kernel"] == 1  # of no rows it is zero


def test_slices(on: Implementation) -> None:
    """Heads of a wider row, and gradients of any layout; nothing beside them is read."""
    shape = 41, 5, 12
    inputs = on.poisoned(*shape), on.poisoned(12, seed=1), on.poisoned(*shape, seed=2)
    on.check(norm(), norm_ref(), *inputs)
    if on.name != "cpp":
        grads = on.layouts(*shape)
        for grad, grad_total in zip(grads, reversed(grads), strict=True):
            on.check_gradients(norm(), norm_ref(), inputs, (grad, grad_total))
            on.check_gradients(norm(), norm_ref(), inputs[:2], [grad])


@pytest.mark.implementations("torch", "cpp")
@pytest.mark.parametrize("shape", [(ROWS, 64), (ROWS, 77), (ROWS, 6, 32), (ROWS, 2, 20)])
def test_rows_do_not_depend_on_each_other(on: Implementation, shape: tuple[int, ...]) -> None:
    x, weight, wide = on.draw(*shape), on.draw(shape[-1], seed=1), on.draw(ROWS, 999, seed=2)
    check_rows(lambda rows: norm()(x[:rows], weight, x[:rows].flip(-1))[0])
    heads = wide[:, 7 : 7 + x[0].numel()].unflatten(-1, shape[1:])
    check_rows(lambda rows: norm()(heads[:rows], weight))


@pytest.mark.implementations("torch", "triton")
@pytest.mark.parametrize("widened", [False, True])
def test_a_residual(on: Implementation, dtype: torch.dtype, widened: bool) -> None:
    """It may be wider than x. Each gradient in the dtype of its input; of the norm, of the sum and
    of both."""
    wider = torch.promote_types(dtype, torch.float32) if widened else dtype
    inputs = (
        on.draw(65, 40, dtype=dtype),
        on.draw(40, dtype=wider, seed=1),
        on.draw(65, 40, dtype=wider, seed=2),
    )
    y, total = on.check(norm(), norm_ref(), *inputs)
    assert y.dtype == wider and total.equal(inputs[0] + inputs[2])
    grad, grad_total = (on.draw(65, 40, dtype=wider, seed=seed) for seed in (3, 4))
    for grads in ((grad, grad_total), (grad, 0 * grad), (0 * grad, grad_total)):
        counts = on.check_gradients(norm(), norm_ref(), inputs, grads)
        if on.name == "triton":
            assert counts["_rms_norm_backward_kernel"] == counts["_sum_partials_kernel"] == 1


@pytest.mark.implementations("torch", "triton")
@pytest.mark.parametrize("needed", ["x", "weight", "residual", "x weight", "x residual"])
def test_gradients_of_some_inputs(on: Implementation, needed: str) -> None:
    """The same as with all; a frozen weight costs no sum over rows."""
    inputs = {
        "x": on.draw(33, 20),
        "weight": on.draw(20, seed=1),
        "residual": on.draw(33, 20, seed=2),
    }
    grads = on.draw(33, 20, seed=3), on.draw(33, 20, seed=4)
    expected = dict(zip(inputs, gradients(norm(), [*inputs.values()], grads), strict=True))

    def of_chosen(*given: Tensor) -> Any:
        return norm()(**(inputs | dict(zip(needed.split(), given, strict=True))))

    with on.counted() as counts:
        found = gradients(of_chosen, [inputs[name] for name in needed.split()], grads)
    assert all(grad.equal(expected[name]) for grad, name in zip(found, needed.split(), strict=True))
    if on.name == "triton":
        assert counts["_rms_norm_backward_kernel"] == 1
        assert counts["_sum_partials_kernel"] == ("weight" in needed)


@pytest.mark.implementations("torch", "triton")
def test_a_second_gradient_is_refused(on: Implementation) -> None:
    check_once_differentiable(lambda x: norm()(x, x.new_ones(8)), on.draw(4, 8))


def test_bad_arguments() -> None:
    check_refused(
        rms_norm,
        {"x": torch.ones(2, 4), "weight": torch.ones(4), "eps": EPS},
        ({"x": torch.ones(2, 4, dtype=torch.int32)}, "int32"),
        ({"weight": torch.ones(5)}, r"\(5,\)"),
        ({"residual": torch.ones(2, 1)}, r"\(2, 1\)"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
    )


# -- Triton alone ----------------------------------------------------------------------------------


@pytest.mark.implementations("triton")
def test_shapes_lead_to_every_sharing_of_rows(on: Implementation) -> None:
    """A block of rows for each program, and several, of one row and of many."""
    found: list[tuple[int, bool]] = []

    def record(kernel: Any, grid: tuple[int, ...], _: Any, options: dict[str, Any]) -> None:
        if kernel.__name__ == "_rms_norm_backward_kernel":
            found.append((options["ROWS"], options["ROWS"] * grid[0] < num_rows))

    for shape in SHAPES:
        x, num_rows = on.draw(*shape), math.prod(shape[:-1])
        rstd = on.draw(*shape[:-1], 1)
        with intercept(record, Target("sm_90", 227 << 10, 4)):
            rms_norm_backward(x, None, x, x.new_ones(shape[-1]), rstd, False, x.dtype)
    wanted = {(True, False), (True, True), (False, True)}
    assert {(rows > 1, several) for rows, several in found} >= wanted


@pytest.mark.implementations("triton")
def test_gradients_have_the_same_bits_in_every_run(on: Implementation) -> None:
    """And a row's gradient has those that it has alone. With more partial gradients of the weight
    than one tile of their sum holds."""
    partials: list[bool] = []

    def run(kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]) -> None:
        if kernel.__name__ == "_sum_partials_kernel":
            partials.append(arguments[2] > options["ROWS"])
        kernel[grid](*arguments, **options)

    x, weight, grad = on.draw(70, 1030), on.draw(1030, seed=1), on.draw(70, 1030, seed=2)
    with intercept(run, TARGETS["sm_90"]):
        runs = [gradients(norm(), (x, weight), [grad]) for _ in range(2)]
        alone = gradients(norm(), (x[3:5], weight), [grad[3:5]])
    assert partials == [True, True, False]
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))
    assert runs[0][0][3:5].equal(alone[0])
