"""Keys and values written to their places in the cache."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.write_kv import write_kv, write_kv_ref
from tests.implementations import ON_GPU, Implementation


def bits(x: Tensor) -> Tensor:
    return x.cpu().contiguous().view(torch.uint8)


def test_reference_is_the_definition() -> None:
    k, v = torch.randn(5, 3, 6), torch.randn(5, 3, 4)
    k_cache, v_cache = torch.full((3, 12, 6), math.nan), torch.full((3, 12, 4), math.nan)
    places = [11, 0, 3, 4, 7]
    write_kv_ref(k, v, k_cache, v_cache, torch.tensor(places))
    for cache, new in ((k_cache, k), (v_cache, v)):
        for place in range(12):
            for head in range(3):
                written = cache[head, place]
                if place in places:
                    assert written.equal(new[places.index(place), head])
                else:
                    assert written.isnan().all()


# A key and a value of one size, and of two.
@pytest.mark.parametrize("dims", [(16, 16), (20, 7), (1, 130)])
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 129])
def test_every_token_into_its_place_and_nothing_else(
    on: Implementation, dtype: torch.dtype, tokens: int, dims: tuple[int, int]
) -> None:
    """Caches and inputs are slices."""
    heads, size, (dim, v_dim) = 3, 150, dims
    qkv = on.draw(tokens, 5 + heads * (dim + v_dim), dtype=dtype)
    k, v = qkv[:, 5:].split((heads * dim, heads * v_dim), -1)
    k, v = k.unflatten(-1, (heads, dim)), v.unflatten(-1, (heads, v_dim))
    places = torch.randperm(size, generator=torch.Generator().manual_seed(tokens))[:tokens]
    whole = torch.full((2, heads, size, dim + 3 + v_dim), math.nan, dtype=dtype, device=on.device)
    expected = whole.clone()
    for cache, op in ((whole, write_kv), (expected, write_kv_ref)):
        k_cache, v_cache = cache[1, ..., 1 : 1 + dim], cache[1, ..., 2 + dim : 2 + dim + v_dim]
        with on.counted() as counts:
            op(k, v, k_cache, v_cache, places.to(on.device))
        assert bool(counts) == (op is write_kv and tokens > 0 and on.name != "torch")
    assert bits(whole).equal(bits(expected))


@pytest.mark.implementations("torch", "cpp")
def test_no_gradient_passes(on: Implementation) -> None:
    k, v_cache = torch.randn(5, 3, 6, requires_grad=True), torch.zeros(3, 12, 6)
    write_kv(k, k, torch.zeros(3, 12, 6), v_cache, torch.arange(5))
    assert not v_cache.requires_grad and v_cache[:, :5].transpose(0, 1).equal(k)


@pytest.mark.implementations("triton")
def test_beyond_two_to_the_31_elements(on: Implementation) -> None:
    """Such a cache takes address space here, and memory only where it is touched."""
    dim, size = 16, 2**26 + 2
    if ON_GPU:
        whole = torch.zeros(size, 2, dim, dtype=torch.float16, device=on.device)
    else:
        whole = torch.from_numpy(np.zeros((size, 2, dim), np.float16))
    k_cache = whole.transpose(0, 1)
    v_cache = torch.zeros(2, size, 1, dtype=torch.float16, device=on.device)
    k, v = on.draw(2, 2, dim, dtype=torch.float16), on.draw(2, 2, 1, dtype=torch.float16)
    places = torch.tensor([size - 1, 2], device=on.device)
    assert (size - 1) * k_cache.stride(1) > 2**31
    write_kv(k, v, k_cache, v_cache, places)
    assert k_cache[:, places].equal(k.transpose(0, 1))
    assert v_cache[:, places].equal(v.transpose(0, 1))


K, CACHE = torch.zeros(2, 3, 6), torch.zeros(3, 12, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_index": torch.tensor([0, 1], dtype=torch.int32)}, "int32"),
        ({"cache_index": torch.tensor([0, 1, 2])}, r"cache_index must be \(2,\)"),
        ({"k": K[..., 0]}, r"k must be \(T, H, D\) floating"),
        ({"k": K.double()}, r"must be .* torch.float64, got"),
        ({"v": torch.zeros(2, 4, 6)}, "v must be"),
        ({"k_cache": CACHE[..., 1:]}, "k_cache must be"),
        ({"v_cache": CACHE[:, 1:]}, "v_cache must be"),
        ({"v_cache": CACHE.bfloat16()}, r"v_cache must be .* torch.float32, got .*bfloat16"),
        # Places are checked on CPU only: on a GPU to look would be to wait.
        ({"cache_index": torch.tensor([3, 3])}, "index 3 is written twice"),
        ({"cache_index": torch.tensor([0, 12])}, r"in \[0, 12\), got 0 to 12"),
        ({"cache_index": torch.tensor([-1, 2])}, "got -1 to 2"),
    ],
)
def test_bad_arguments_write_nothing(
    on: Implementation, change: dict[str, Tensor], message: str
) -> None:
    if on.device.type == "cuda" and "lie" in message:
        pytest.skip("places are checked on CPU only")
    k_cache, v_cache = (torch.full_like(CACHE, math.nan) for _ in range(2))
    given: dict[str, Any] = {"k": K, "v": K, "k_cache": k_cache, "v_cache": v_cache}
    given |= {"cache_index": torch.tensor([0, 1])} | change
    with on.counted() as counts, pytest.raises(ValueError, match=message):
        write_kv(**{name: x.to(on.device) for name, x in given.items()})
    assert not counts and k_cache.isnan().all() and v_cache.isnan().all()


@pytest.mark.implementations("triton")
def test_what_no_kernel_takes_is_refused(on: Implementation) -> None:
    x, places = on.draw(4, 2, 8), torch.tensor([3, 0, 8, 5], device=on.device)
    cache = torch.full((2, 9, 8), math.nan, device=on.device)
    strided, strided_cache = (each.mT.contiguous().mT for each in (x, cache))
    double = x.double(), x.double(), cache.double(), cache.double()
    for arguments, message in (
        ((strided, x, cache, cache, places), r"contiguous, got shape \(4, 2, 8\)"),
        ((x, strided, cache, cache, places), r"contiguous, got shape \(4, 2, 8\)"),
        ((x, x, strided_cache, cache, places), r"contiguous, got shape \(2, 9, 8\)"),
        ((x, x, cache, strided_cache, places), r"contiguous, got shape \(2, 9, 8\)"),
        ((x, x, cache, cache, places.repeat_interleave(2)[::2]), r"\(4,\) with strides \(2,\)"),
        ((*double, places), "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            write_kv(*arguments)
    assert cache.isnan().all()
