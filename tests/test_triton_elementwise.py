"""The Triton kernels of norm, rope, activation and cache writes against their references."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.gated_act import ACTIVATIONS, gated_act, gated_act_ref
from kernels.launch import intercept
from kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_ref
from kernels.rope import rope, rope_cos_sin, rope_ref
from kernels.target import TARGETS, Target
from kernels.write_kv import write_kv, write_kv_ref
from tests.triton_device import (
    DEVICE,
    DTYPES,
    ON_GPU,
    assert_like_reference,
    counted,
    on_triton,
    wide,
)

pytestmark = on_triton

# Leading dimensions and size: one row, rows of one program and of several, heads, nothing.
SHAPES = [(1, 16), (63, 192), (64, 64), (129, 20), (5, 6, 77), (0, 64), (3, 0, 8)]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, plus_one: bool) -> None:
    x, weight = draw(shape, dtype), draw(shape[-1:], dtype, 1)
    with counted() as counts:
        y = rms_norm(x, weight, 1e-6, plus_one)
    assert counts["_rms_norm_kernel"] == (x.numel() > 0)
    assert isinstance(y, Tensor)
    reference = cast(Callable[..., Tensor], rms_norm_ref)
    assert_like_reference(y, reference, x, weight, 1e-6, plus_one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_adds_the_residual(dtype: torch.dtype) -> None:
    """In the wider of the two dtypes."""
    x, weight = draw((65, 40), dtype), draw((40,), dtype, 1)
    for residual in (draw((65, 40), dtype, 2), draw((65, 40), torch.float32, 2)):
        y, total = rms_norm(x, weight, 1e-6, residual=residual)
        assert total.equal(x + residual)
        assert_like_reference(
            y, lambda *a: rms_norm_ref(a[0], a[1], 1e-6, residual=a[2])[0], x, weight, residual
        )


def gradients(
    op: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients of `op` in all of its arguments, for these gradients of its results."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = op(*leaves)
    results = (results,) if isinstance(results, Tensor) else results
    given = [(y, grad) for y, grad in zip(results, grads, strict=True) if y.requires_grad]
    return torch.autograd.grad([y for y, _ in given], leaves, [grad for _, grad in given])


def assert_like_gradients(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> None:
    """The gradients of `op` are those of `reference`, element by element and, which bounds what is
    wrong in length and in direction, in the Euclidean norm: by four times the reference's own
    error, or a unit in the last place."""

    def one(i: int, *arguments: Tensor) -> Tensor:
        inputs_too, grads_too = arguments[: len(inputs)], arguments[len(inputs) :]
        return gradients(reference, inputs_too, grads_too)[i]

    arguments = (*inputs, *grads)
    for i, out in enumerate(gradients(op, inputs, grads)):
        assert_like_reference(out, partial(one, i), *arguments)
        exact = one(i, *map(wide, arguments))
        plain = one(i, *(x.cpu() for x in arguments))
        error, plain_error = (float((x.cpu() - exact).norm()) for x in (out, plain))
        assert error <= max(4 * plain_error, torch.finfo(out.dtype).eps * float(exact.norm()))


def in_nan(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers in the midst of a wider tensor that is NaN elsewhere."""
    whole = torch.full([size + 5 for size in shape], math.nan, dtype=dtype, device=DEVICE)
    inner = whole[tuple(slice(2, -3) for _ in shape)]
    return inner.copy_(draw(shape, dtype, seed))


def layouts(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Gradients as autograd may leave them: a slice, one row for all, one number for all, and with
    dimensions exchanged."""
    return [
        in_nan(shape, dtype, 3),
        draw(shape[-1:], dtype, 4).expand(shape),
        torch.ones((), dtype=dtype, device=DEVICE).expand(shape),
        draw(shape[::-1], dtype, 5).permute(*reversed(range(len(shape)))),
    ]


# As above; many blocks of rows for each program of the backward, of several rows and of one.
BACKWARD_SHAPES = [*SHAPES, (9, 61, 100), (37, 1100)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", BACKWARD_SHAPES)
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm_backward(shape: tuple[int, ...], dtype: torch.dtype, plus_one: bool) -> None:
    def op(x: Tensor, weight: Tensor) -> Any:
        return rms_norm(x, weight, 1e-6, plus_one)

    def reference(x: Tensor, weight: Tensor) -> Any:
        return rms_norm_ref(x, weight, 1e-6, plus_one)

    inputs = draw(shape, dtype), draw(shape[-1:], dtype, 1)
    with counted() as counts:
        assert_like_gradients(op, reference, inputs, [draw(shape, dtype, 2)])
    assert counts["_rms_norm_backward_kernel"] == (inputs[0].numel() > 0)
    assert counts["_sum_partials_kernel"] == 1  # of no rows it is zero


def test_shapes_lead_to_every_sharing_of_rows() -> None:
    """A block of rows for each program, and several, of one row and of many."""
    found: list[tuple[int, bool]] = []

    def record(kernel: Any, grid: tuple[int, ...], _: Any, options: dict[str, Any]) -> None:
        if kernel.__name__ == "_rms_norm_backward_kernel":
            found.append((options["ROWS"], options["ROWS"] * grid[0] < num_rows))

    for shape in BACKWARD_SHAPES:
        x, num_rows = draw(shape, torch.float32), math.prod(shape[:-1])
        rstd = draw((*shape[:-1], 1), torch.float32)
        with intercept(record, Target("sm_90", 227 << 10, 4)):
            rms_norm_backward(x, None, x, x.new_ones(shape[-1]), rstd, False, x.dtype)
    assert {(rows > 1, several) for rows, several in found} >= {
        (True, False), (True, True), (False, True)
    }  # fmt: skip


def added(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
    return rms_norm(x, weight, 1e-6, residual=residual)


def added_ref(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
    return rms_norm_ref(x, weight, 1e-6, residual=residual)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in {a, torch.float32}])
def test_rms_norm_backward_with_a_residual(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Each gradient in the dtype of its input; with gradients of the norm, the sum and both."""
    dtype, residual_dtype = dtypes
    x, weight = draw((65, 40), dtype), draw((40,), dtype, 1)
    inputs = x, weight, draw((65, 40), residual_dtype, 2)
    grad = draw((65, 40), residual_dtype, 3)
    for grads in ((grad, draw((65, 40), residual_dtype, 4)), (grad, 0 * grad), (0 * grad, grad)):
        with counted() as counts:
            assert_like_gradients(added, added_ref, inputs, grads)
        assert counts["_rms_norm_backward_kernel"] == counts["_sum_partials_kernel"] == 1


def test_rms_norm_backward_of_slices() -> None:
    """Of inputs and gradients of any layout; nothing beside them is read."""
    shape, weight = (7, 5, 12), in_nan((12,), torch.float32, 1)
    x, residual = in_nan(shape, torch.float32, 0), in_nan(shape, torch.float32, 2)
    grads = layouts(shape, torch.float32)
    for grad, grad_total in zip(grads, reversed(grads), strict=True):
        with counted() as counts:
            assert_like_gradients(added, added_ref, (x, weight, residual), (grad, grad_total))
            assert_like_gradients(
                lambda x, weight: rms_norm(x, weight, 1e-6),
                lambda x, weight: rms_norm_ref(x, weight, 1e-6),
                (x, weight),
                [grad],
            )
        assert counts["_rms_norm_backward_kernel"] == 2


@pytest.mark.parametrize("needed", ["x", "weight", "residual", "x, weight", "x, residual"])
def test_rms_norm_backward_of_some_inputs(needed: str) -> None:
    """A frozen weight costs no sum over rows."""
    inputs = {
        "x": draw((33, 20), torch.float32),
        "weight": draw((20,), torch.float32, 1),
        "residual": draw((33, 20), torch.float32, 2),
    }
    chosen = needed.split(", ")
    fixed = {name: x for name, x in inputs.items() if name not in chosen}

    def of(op: Callable[..., Any]) -> Callable[..., Any]:
        def of_chosen(*given: Tensor) -> Any:
            others = {name: x.to(given[0]) for name, x in fixed.items()}
            return op(**dict(zip(chosen, given, strict=True)), **others)

        return of_chosen

    grads = draw((33, 20), torch.float32, 3), draw((33, 20), torch.float32, 4)
    with counted() as counts:
        assert_like_gradients(of(added), of(added_ref), [inputs[name] for name in chosen], grads)
    assert counts["_rms_norm_backward_kernel"] == 1
    assert counts["_sum_partials_kernel"] == ("weight" in chosen)


def test_rms_norm_backward_has_the_same_bits_in_every_run() -> None:
    """And a row's gradient has those that it has alone. With more partial gradients of the weight
    than one tile of their sum holds."""
    partials: list[bool] = []

    def run(kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]) -> None:
        if kernel.__name__ == "_sum_partials_kernel":
            partials.append(arguments[2] > options["ROWS"])
        kernel[grid](*arguments, **options)

    def op(x: Tensor, weight: Tensor) -> Any:
        return rms_norm(x, weight, 1e-6)

    def reference(x: Tensor, weight: Tensor) -> Any:
        return rms_norm_ref(x, weight, 1e-6)

    shape = (70, 1030)
    x, weight, grad = (draw(s, torch.float32, i) for i, s in enumerate((shape, shape[1:], shape)))
    with intercept(run, TARGETS["sm_90"]):
        assert_like_gradients(op, reference, (x, weight), [grad])
        runs = [gradients(op, (x, weight), [grad]) for _ in range(2)]
        alone = gradients(op, (x[3:5], weight), [grad[3:5]])
    assert partials == [True, True, True, False]
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))
    assert runs[0][0][3:5].equal(alone[0])


def tables(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, dim, 2) / dim)
    cos, sin = rope_cos_sin(torch.arange(100, 100 + tokens), inv_freq)
    return cos.to(DEVICE), sin.to(DEVICE)


# Tokens, heads, channels: one pair, programs full and in part, one long head a program, nothing.
ROPE_SHAPES = [(1, 1, 2), (63, 1, 64), (64, 2, 32), (129, 3, 20), (5, 2, 2050), (0, 2, 8)]
# Tokens and size: one, several rows a program, a row of several programs, nothing.
GATED_SHAPES = [(1, 1), (63, 192), (64, 64), (129, 20), (2, 1030), (0, 8), (3, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*ROPE_SHAPES, (3, 0, 8)])
def test_rope(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, (cos, sin) = draw(shape, dtype), tables(shape[0], shape[-1])
    with counted() as counts:
        y = rope(x, cos, sin)
    assert counts["_rope_kernel"] == (x.numel() > 0)
    assert y.is_contiguous()
    assert_like_reference(y, rope_ref, x, cos, sin)


def test_shapes_lead_to_every_tiling() -> None:
    """Rows of one program and of several, one row a program, and a row of several programs."""
    grids: dict[str, list[tuple[int, ...]]] = {"_rope_kernel": [], "_gated_act_kernel": []}

    def record(kernel: Any, grid: tuple[int, ...], _: Any, options: dict[str, Any]) -> None:
        grids[kernel.__name__].append((options["ROWS"], *grid))

    with intercept(record):
        for shape in ROPE_SHAPES:
            rope(draw(shape, torch.float32), *tables(shape[0], shape[-1]))
        for tokens, size in GATED_SHAPES:
            gated_act(draw((tokens, 2 * size), torch.float32), "silu")
    for found in grids.values():
        assert any(rows > 1 and programs == 1 for rows, programs, *_ in found)
        assert any(rows > 1 and programs > 1 for rows, programs, *_ in found)
        assert any(rows == 1 for rows, *_ in found)
    assert any(pieces > 1 for _, _, pieces in grids["_gated_act_kernel"])


def test_rope_of_slices() -> None:
    """Of a fused projection, and of wider tables."""
    heads, dim = 3, 24
    x = draw((65, 7 + heads * dim + 5), torch.float32)[:, 7 : 7 + heads * dim]
    x = x.unflatten(-1, (heads, dim))
    cos, sin = tables(65, 50)[0][:, 3 : 3 + dim // 2], tables(65, 60)[1][:, 1 : 1 + dim // 2]
    assert not any(a.is_contiguous() for a in (x, cos, sin)) and cos.stride() != sin.stride()
    y = rope(x, cos, sin)
    assert y.equal(rope(x.contiguous(), cos.contiguous(), sin.contiguous()))
    assert_like_reference(y, rope_ref, x, cos, sin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*ROPE_SHAPES, (3, 0, 8)])
def test_rope_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad, (cos, sin) = draw(shape, dtype), draw(shape, dtype, 1), tables(shape[0], shape[-1])
    with counted() as counts:
        assert_like_gradients(*with_tables(cos, sin), [x], [grad])
    assert counts["_rope_kernel"] == 2 * (x.numel() > 0)


def with_tables(
    cos: Tensor, sin: Tensor
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The operation and its reference as functions of x alone."""
    return (
        lambda x: rope(x, cos, sin),
        lambda x: rope_ref(x, cos.cpu(), sin.cpu()),
    )


def test_rope_backward_of_slices() -> None:
    """Of gradients of any layout and of wider tables; nothing beside them is read."""
    shape, half = (33, 3, 20), (33, 10)
    cos, sin = (in_nan(half, torch.float32, 0).copy_(table) for table in tables(33, 20))
    x = draw(shape, torch.float32)
    for grad in layouts(shape, torch.float32):
        with counted() as counts:
            assert_like_gradients(*with_tables(cos, sin), [x], [grad])
        assert counts["_rope_kernel"] == 2


def test_rope_refuses_what_it_cannot_read() -> None:
    x, (cos, sin) = draw((4, 2, 8), torch.float32), tables(4, 8)
    with pytest.raises(ValueError, match=r"contiguous, got shape \(4, 2, 8\) .* \(16, 1, 2\)"):
        rope(x.mT.contiguous().mT, cos, sin)
    with pytest.raises(ValueError, match=r"contiguous, got shape \(4, 4\) with strides \(1, 4\)"):
        rope(x, cos.T.contiguous().T, sin)
    with pytest.raises(ValueError, match="float64"):
        rope(x.double(), cos, sin)


@pytest.mark.filterwarnings("ignore:overflow")  # exp(100) is infinite, as it has to be
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GATED_SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_act(shape: tuple[int, int], dtype: torch.dtype, activation: str) -> None:
    tokens, size = shape
    gate_up = draw((tokens, 2 * size), dtype) * 3
    with counted() as counts:
        out = gated_act(gate_up, activation)
    assert counts["_gated_act_kernel"] == (out.numel() > 0)
    assert_like_reference(out, gated_act_ref, gate_up, activation)


def with_activation(
    activation: str,
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The operation and its reference as functions of the input alone."""
    return lambda x: gated_act(x, activation), lambda x: gated_act_ref(x, activation)


@pytest.mark.filterwarnings("ignore:overflow")  # as above, in the forward
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GATED_SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_act_backward(shape: tuple[int, int], dtype: torch.dtype, activation: str) -> None:
    tokens, size = shape
    gate_up, grad = draw((tokens, 2 * size), dtype) * 3, draw(shape, dtype, 1)
    with counted() as counts:
        assert_like_gradients(*with_activation(activation), [gate_up], [grad])
    assert counts["_gated_act_backward_kernel"] == (grad.numel() > 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_act_of_slices(activation: str) -> None:
    """And of gradients of any layout; nothing beside them is read."""
    gate_up = in_nan((35, 82), torch.float32, 0)
    out = gated_act(gate_up, activation)
    assert out.is_contiguous() and out.equal(gated_act(gate_up.contiguous(), activation))
    assert_like_reference(out, gated_act_ref, gate_up, activation)
    for grad in layouts((35, 41), torch.float32):
        with counted() as counts:
            assert_like_gradients(*with_activation(activation), [gate_up], [grad])
        assert counts["_gated_act_backward_kernel"] == 1


# As above; and inf - inf stands in the branch not taken.
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_act_of_extreme_gates(activation: str) -> None:
    gate = torch.tensor([-1e20, -1e4, -89.0, -50.0, -0.0, 0.0, 50.0, 89.0, 1e4, 1e20])
    odd = torch.tensor([math.inf, math.nan])
    out = gated_act(torch.cat((gate, odd, torch.ones(12)))[None].to(DEVICE), activation).cpu()[0]
    assert out[-2] == math.inf and out[-1].isnan()
    # silu(-50) is about 1e-20; a quotient, a product, exp: a few units in the last place.
    torch.testing.assert_close(out[:-2], gate.clamp(min=0), atol=1e-18, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_act_backward_of_extreme_gates(activation: str) -> None:
    gate = torch.tensor([-1e20, -1e4, -89.0, -50.0, -0.0, 0.0, 50.0, 89.0, 1e4, 1e20, math.nan])
    gate_up = torch.cat((gate, torch.ones(11)))[None].to(DEVICE)
    op = with_activation(activation)[0]
    (out,) = gradients(op, [gate_up], [torch.ones(1, 11, device=DEVICE)])
    d_gate, d_up = out.cpu()[0].split(11)
    assert d_gate[-1].isnan() and d_up[-1].isnan()
    step = (gate > 0) + 0.5 * (gate == 0)
    torch.testing.assert_close(d_gate[:-1], step[:-1], atol=1e-18, rtol=1e-6)
    torch.testing.assert_close(d_up[:-1], gate[:-1].clamp(min=0), atol=1e-18, rtol=1e-6)


def test_gated_act_refuses_what_it_cannot_read() -> None:
    gate_up = draw((4, 8), torch.float32)
    with pytest.raises(ValueError, match=r"contiguous, got shape \(8, 4\) with strides \(1, 8\)"):
        gated_act(gate_up.T, "silu")
    with pytest.raises(ValueError, match="float64"):
        gated_act(gate_up.double(), "silu")


def bits(x: Tensor) -> Tensor:
    return x.cpu().contiguous().view(torch.uint8)


# A key and a value of one size, and of two.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [(16, 16), (20, 7), (1, 130)])
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 129])
def test_write_kv(tokens: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    """Every token into its slot, and nothing anywhere else: caches and inputs are slices."""
    heads, size, (dim, v_dim) = 3, 150, dims
    qkv = draw((tokens, 5 + heads * (dim + v_dim)), dtype)
    k, v = qkv[:, 5:].split((heads * dim, heads * v_dim), -1)
    k, v = k.unflatten(-1, (heads, dim)), v.unflatten(-1, (heads, v_dim))
    cache_index = torch.randperm(size, generator=torch.Generator().manual_seed(tokens))[:tokens]
    whole = torch.full((2, heads, size, dim + 3 + v_dim), math.nan, dtype=dtype, device=DEVICE)
    expected = whole.clone()
    for cache, op in ((whole, write_kv), (expected, write_kv_ref)):
        k_cache, v_cache = cache[1, ..., 1 : 1 + dim], cache[1, ..., 2 + dim : 2 + dim + v_dim]
        with counted() as counts:
            op(k, v, k_cache, v_cache, cache_index.to(DEVICE))
        assert counts["_write_kv_kernel"] == (op is write_kv and tokens > 0)
    assert bits(whole).equal(bits(expected))


def test_write_kv_beyond_two_to_the_31_elements() -> None:
    """Such a cache takes address space here, and memory only where it is touched."""
    dim, size = 16, 2**26 + 2
    if ON_GPU:
        whole = torch.zeros(size, 2, dim, dtype=torch.float16, device=DEVICE)
    else:
        whole = torch.from_numpy(np.zeros((size, 2, dim), np.float16))
    k_cache = whole.transpose(0, 1)
    v_cache = torch.zeros(2, size, 1, dtype=torch.float16, device=DEVICE)
    k, v = draw((2, 2, dim), torch.float16), draw((2, 2, 1), torch.float16)
    cache_index = torch.tensor([size - 1, 2], device=DEVICE)
    assert (size - 1) * k_cache.stride(1) > 2**31
    write_kv(k, v, k_cache, v_cache, cache_index)
    assert k_cache[:, cache_index].equal(k.transpose(0, 1))
    assert v_cache[:, cache_index].equal(v.transpose(0, 1))


def test_write_kv_refuses_what_it_cannot_write() -> None:
    x = draw((4, 2, 8), torch.float32)
    strided = x.mT.contiguous().mT
    cache = torch.full((2, 9, 8), math.nan, device=DEVICE)
    cache_index = torch.tensor([3, 0, 8, 5], device=DEVICE)
    for k, v in ((strided, x), (x, strided)):
        with pytest.raises(ValueError, match=r"contiguous, got shape \(4, 2, 8\)"):
            write_kv(k, v, cache, cache, cache_index)
    for k_cache, v_cache in ((cache.mT.contiguous().mT, cache), (cache, cache.mT.contiguous().mT)):
        with pytest.raises(ValueError, match=r"contiguous, got shape \(2, 9, 8\)"):
            write_kv(x, x, k_cache, v_cache, cache_index)
    with pytest.raises(ValueError, match=r"contiguous, got shape \(4,\) with strides \(2,\)"):
        write_kv(x, x, cache, cache, cache_index.repeat_interleave(2)[::2])
    with pytest.raises(ValueError, match="float64"):
        write_kv(x.double(), x.double(), cache.double(), cache.double(), cache_index)
    assert cache.isnan().all()


@pytest.mark.skipif(ON_GPU, reason="indices are checked on CPU only")
def test_write_kv_checks_indices_on_cpu() -> None:
    x, cache = draw((2, 2, 8), torch.float32), torch.full((2, 9, 8), math.nan)
    for cache_index, message in (
        ([4, 4], "index 4 is written twice"),
        ([0, 9], r"in \[0, 9\), got 0 to 9"),
    ):
        with counted() as counts, pytest.raises(ValueError, match=message):
            write_kv(x, x, cache, cache, torch.tensor(cache_index))
        assert not counts
