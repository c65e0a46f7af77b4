"""The Triton kernels of norm, rope, activation and cache writes against their references."""

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.gated_act import ACTIVATIONS, gated_act, gated_act_ref
from kernels.launch import intercept
from kernels.rms_norm import rms_norm, rms_norm_ref
from kernels.rope import rope, rope_cos_sin, rope_ref
from kernels.write_kv import write_kv, write_kv_ref
from tests.triton_device import DEVICE, DTYPES, ON_GPU, assert_like_reference, counted, on_triton

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


def gradient_of(op: Callable[..., Tensor], grad: Tensor) -> Callable[..., Tensor]:
    """The gradient of `op` in its first argument, for this gradient of its result."""

    def gradient(x: Tensor, *arguments: Any) -> Tensor:
        x = x.detach().requires_grad_()
        y = op(x, *arguments)
        return torch.autograd.grad(y, x, grad.to(y))[0]

    return gradient


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
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(shape: tuple[int, ...], dtype: torch.dtype, interleaved: bool) -> None:
    x, (cos, sin) = draw(shape, dtype), tables(shape[0], shape[-1])
    with counted() as counts:
        y = rope(x, cos, sin, interleaved)
    assert counts["_rope_kernel"] == (x.numel() > 0)
    assert y.is_contiguous()
    assert_like_reference(y, rope_ref, x, cos, sin, interleaved)


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


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_of_slices(interleaved: bool) -> None:
    """Of a fused projection, and of wider tables."""
    heads, dim = 3, 24
    x = draw((65, 7 + heads * dim + 5), torch.float32)[:, 7 : 7 + heads * dim]
    x = x.unflatten(-1, (heads, dim))
    cos, sin = tables(65, 50)[0][:, 3 : 3 + dim // 2], tables(65, 60)[1][:, 1 : 1 + dim // 2]
    assert not any(a.is_contiguous() for a in (x, cos, sin)) and cos.stride() != sin.stride()
    y = rope(x, cos, sin, interleaved)
    assert y.equal(rope(x.contiguous(), cos.contiguous(), sin.contiguous(), interleaved))
    assert_like_reference(y, rope_ref, x, cos, sin, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_gradients_back_in_triton(interleaved: bool) -> None:
    x, (cos, sin) = draw((33, 3, 20), torch.float32), tables(33, 20)
    for grad in (
        draw((33, 3, 20), torch.float32, 1),
        torch.ones((), device=DEVICE).expand(x.shape),
    ):
        with counted() as counts:
            out = gradient_of(rope, grad)(x, cos, sin, interleaved)
        assert counts["_rope_kernel"] == 2
        assert_like_reference(out, gradient_of(rope_ref, grad), x, cos, sin, interleaved)


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


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_act_of_a_slice_and_its_gradient(activation: str) -> None:
    gate_up = draw((35, 100), torch.float32)[:, 9:91]
    assert not gate_up.is_contiguous()
    out = gated_act(gate_up, activation)
    assert out.is_contiguous() and out.equal(gated_act(gate_up.contiguous(), activation))
    assert_like_reference(out, gated_act_ref, gate_up, activation)
    grad = draw((35, 41), torch.float32, 1)
    d_gate_up = gradient_of(gated_act, grad)(gate_up, activation)
    assert_like_reference(d_gate_up, gradient_of(gated_act_ref, grad), gate_up, activation)


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
    slots = torch.randperm(size, generator=torch.Generator().manual_seed(tokens))[:tokens]
    whole = torch.full((2, heads, size, dim + 3 + v_dim), math.nan, dtype=dtype, device=DEVICE)
    expected = whole.clone()
    for cache, op in ((whole, write_kv), (expected, write_kv_ref)):
        k_cache, v_cache = cache[1, ..., 1 : 1 + dim], cache[1, ..., 2 + dim : 2 + dim + v_dim]
        with counted() as counts:
            op(k, v, k_cache, v_cache, slots.to(DEVICE))
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
    slots = torch.tensor([size - 1, 2], device=DEVICE)
    assert (size - 1) * k_cache.stride(1) > 2**31
    write_kv(k, v, k_cache, v_cache, slots)
    assert k_cache[:, slots].equal(k.transpose(0, 1))
    assert v_cache[:, slots].equal(v.transpose(0, 1))


def test_write_kv_refuses_what_it_cannot_write() -> None:
    x = draw((4, 2, 8), torch.float32)
    strided = x.mT.contiguous().mT
    cache = torch.full((2, 9, 8), math.nan, device=DEVICE)
    slots = torch.tensor([3, 0, 8, 5], device=DEVICE)
    for k, v in ((strided, x), (x, strided)):
        with pytest.raises(ValueError, match=r"contiguous, got shape \(4, 2, 8\)"):
            write_kv(k, v, cache, cache, slots)
    for k_cache, v_cache in ((cache.mT.contiguous().mT, cache), (cache, cache.mT.contiguous().mT)):
        with pytest.raises(ValueError, match=r"contiguous, got shape \(2, 9, 8\)"):
            write_kv(x, x, k_cache, v_cache, slots)
    with pytest.raises(ValueError, match=r"contiguous, got shape \(4,\) with strides \(2,\)"):
        write_kv(x, x, cache, cache, slots.repeat_interleave(2)[::2])
    with pytest.raises(ValueError, match="float64"):
        write_kv(x.double(), x.double(), cache.double(), cache.double(), slots)
    assert cache.isnan().all()


@pytest.mark.skipif(ON_GPU, reason="contents of slots are looked at on CPU only")
def test_write_kv_looks_at_slots_on_cpu() -> None:
    x, cache = draw((2, 2, 8), torch.float32), torch.full((2, 9, 8), math.nan)
    for slots, message in (
        ([4, 4], "slot 4 is written twice"),
        ([0, 9], r"in \[0, 9\), got 0 to 9"),
    ):
        with counted() as counts, pytest.raises(ValueError, match=message):
            write_kv(x, x, cache, cache, torch.tensor(slots))
        assert not counts
