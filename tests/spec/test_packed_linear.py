"""Linear layers over weights that are packed for C++, which alone has them."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from kernels.matmul import matmul_ref
from kernels.packed_linear import allow_dot_products, packed_linear, packs
from models.layers import linear
from tests.implementations import Implementation
from tests.rows import ROWS, check_rows, needs_dots

pytestmark = pytest.mark.implementations("cpp")

# N and K: columns that fill no panel, sums of a pair, of an odd number of pairs, of several blocks.
SHAPES = [(7, 2), (7, 20), (96, 256), (475, 194), (64, 700), (33, 2100)]
# How a weight is held, and whether pairs of terms are added by dot products.
FORMS = [
    pytest.param(torch.float32, False, id="float32"),
    pytest.param(torch.bfloat16, False, id="bfloat16"),
    pytest.param(torch.bfloat16, True, id="dots", marks=needs_dots),
]
in_each_form = pytest.mark.parametrize(("form", "dots"), FORMS)


def as_held(weight: Tensor, dots: bool) -> Tensor:
    if dots:
        allow_dot_products([weight])
    return weight


@in_each_form
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 13, 14, 15, 100])
def test_values(
    on: Implementation,
    form: torch.dtype,
    dots: bool,
    rows: int,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And each row alone has the same bits."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for columns, terms in SHAPES:
        x, bias = on.draw(rows, terms, dtype=form), on.draw(columns, dtype=form, seed=2)
        weight = as_held(on.draw(columns, terms, dtype=form, seed=1), dots)
        on.check(packed_linear, matmul_ref, x, weight)
        whole = on.check(linear, matmul_ref, x, weight, bias)
        for row in {0, rows // 2, rows - 1}:
            assert packed_linear(x[row : row + 1], weight, bias).equal(whole[row : row + 1])


@in_each_form
def test_whole_numbers_are_exact(on: Implementation, form: torch.dtype, dots: bool) -> None:
    """Nothing of a neighbour's number is in one of half precision, and each has its place."""
    x, weight = on.draw(19, 46).round(), on.draw(70, 46, seed=1).round()
    y = packed_linear(x.to(form), as_held(weight.to(form), dots))
    assert y.equal(matmul_ref(x, weight).to(form))


def test_no_rows(on: Implementation, dtype: torch.dtype) -> None:
    weight = on.draw(8, 64, dtype=dtype)
    assert packed_linear(weight[:0], weight).shape == (0, 8)
    assert on.run(linear, weight[:0], weight).shape == (0, 8)


@in_each_form
def test_rows_do_not_depend_on_each_other(
    on: Implementation, form: torch.dtype, dots: bool
) -> None:
    x = on.draw(ROWS, 300, dtype=form)
    weight = as_held(on.draw(70, 300, dtype=form, seed=1), dots)
    check_rows(lambda rows: packed_linear(x[:rows], weight))


def rounded(x: Fraction) -> Fraction:
    """The nearest float32, ties to even (normal numbers)."""
    if x == 0:
        return x
    unit = Fraction(2) ** (math.floor(math.log2(abs(x))) - 23)
    if abs(x) < unit * 2**23:  # the logarithm was rounded up
        unit /= 2
    return round(x / unit) * unit


def test_a_product_is_its_definition(on: Implementation) -> None:
    """Blocks of 256 terms, each in index order with one rounding a term; their sums in order."""
    x, weight = on.draw(3, 600), on.draw(5, 600, seed=1)
    y = packed_linear(x, weight)
    for row in range(3):
        for column in range(5):
            total = Fraction(0)
            terms = [*zip(x[row].tolist(), weight[column].tolist(), strict=True)]
            for first in range(0, len(terms), 256):
                block = Fraction(0)
                for a, b in terms[first : first + 256]:
                    block = rounded(Fraction(a) * Fraction(b) + block)
                total = rounded(total + block)
            assert Fraction(y[row, column].item()) == total


def test_a_changed_weight_is_packed_again(on: Implementation, dtype: torch.dtype) -> None:
    weight, x = torch.nn.Parameter(on.draw(40, 30, dtype=dtype)), on.draw(5, 30, dtype=dtype)
    with torch.no_grad(), on.counted() as calls:
        first = packed_linear(x, weight)
        assert packed_linear(x, weight).equal(first)
        assert calls == {"pack": 1, "linear": 2}
        weight.mul_(2)
        assert packed_linear(x, weight).equal(2 * first)
        assert calls == {"pack": 2, "linear": 3}


def test_what_runs_in_torch(on: Implementation) -> None:
    """Other dtypes, weights that need a gradient, and those that do not tell when they change."""
    x, weight = on.draw(5, 30), torch.nn.Parameter(on.draw(40, 30, seed=1))
    assert not packs(x, weight)
    with torch.no_grad():
        assert packs(x, weight) and not packs(x.bfloat16(), weight)
        assert not packs(x.T.contiguous().T, weight)
    with torch.inference_mode():
        assert not packs(x, weight.clone())


def test_bad_arguments() -> None:
    x, weight = torch.ones(5, 30), torch.ones(40, 30)
    with pytest.raises(ValueError, match=r"x \(5, 3\) and weight \(40, 30\) must be"):
        packed_linear(x[:, :3], weight)
    for bias in (torch.ones(39), torch.ones(40).bfloat16()):
        with pytest.raises(ValueError, match=r"bias must be \(40,\) torch.float32, got"):
            packed_linear(x, weight, bias)
