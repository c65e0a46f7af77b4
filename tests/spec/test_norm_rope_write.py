"""Queries and keys normalised and rotated, keys and values written to their places in the cache."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.norm_rope_write import HeadNorms, norm_rope_write, norm_rope_write_ref
from kernels.rope import rope_cos_sin
from tests.implementations import Implementation, assert_exact, check_refused, gaps_in

HEADS, KV_HEADS, CELLS = 6, 3, 150


def bits(x: Tensor) -> Tensor:
    return x.cpu().contiguous().view(torch.uint8)


def angles(tokens: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    positions = torch.arange(tokens) * 37 % 4001
    cos, sin = rope_cos_sin(positions, 1e4 ** -(torch.arange(0, dim, 2) / dim))
    return cos.to(device), sin.to(device)


def test_reference_is_the_definition() -> None:
    """A key of two channels is a complex number of length sqrt(2) that turns by its angle."""
    q, k, v = torch.randn(5, 3, 2), torch.randn(5, 3, 2), torch.randn(5, 3, 4)
    caches = torch.full((3, 12, 2), math.nan), torch.full((3, 12, 4), math.nan)
    places, angle = [11, 0, 3, 4, 7], torch.randn(5, 1)
    weight = torch.tensor([2.0, 2.0])
    for norms in (None, HeadNorms(weight, 1 + weight, 0.0, False)):
        out = norm_rope_write_ref(
            q, k, v, norms, angle.cos(), angle.sin(), *caches, torch.tensor(places)
        )
        turn = torch.polar(torch.ones(5, 1), angle)
        for x, found, scale in ((q, out, 2), (k, caches[0][:, places].transpose(0, 1), 3)):
            number = torch.view_as_complex(x)
            if norms is not None:
                number = number / number.abs() * scale * math.sqrt(2)
            torch.testing.assert_close(found, torch.view_as_real(number * turn))
        assert caches[1][:, places].equal(v.transpose(0, 1))
        others = [place for place in range(12) if place not in places]
        assert all(cache[:, others].isnan().all() for cache in caches)


# A key and a value of one size, and of two; with norms and without.
@pytest.mark.parametrize(
    ("dims", "normed"), [((16, 16), True), ((20, 7), True), ((2, 130), False), ((64, 64), False)]
)
@pytest.mark.parametrize("tokens", [0, 1, 22, 65])
def test_every_token_into_its_place_and_nothing_else(
    on: Implementation, dtype: torch.dtype, tokens: int, dims: tuple[int, int], normed: bool
) -> None:
    """Caches and inputs are slices."""
    dim, v_dim = dims
    sizes = HEADS * dim, KV_HEADS * dim, KV_HEADS * v_dim
    qkv = on.draw(tokens, 5 + sum(sizes), dtype=dtype)[:, 5:].split(sizes, -1)
    q, k, v = (x.unflatten(-1, (-1, d)) for x, d in zip(qkv, (dim, dim, v_dim), strict=True))
    weights = [on.draw(dim, dtype=dtype, seed=seed) for seed in (1, 2)] if normed else []
    angle = angles(tokens, dim, on.device)
    places = torch.randperm(CELLS, generator=torch.Generator().manual_seed(tokens))[:tokens]

    def run(op: Any) -> Any:
        """What becomes of the queries, and what is written for the keys."""

        def call(
            q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor
        ) -> Any:
            norms = HeadNorms(weights[0], weights[1], 1e-6, True) if weights else None
            whole = q.new_full((2, KV_HEADS, CELLS, dim + 3 + v_dim), math.nan)
            k_cache, v_cache = whole[1, ..., 1 : 1 + dim], whole[1, ..., 2 + dim : 2 + dim + v_dim]
            cos, sin = cos.float(), sin.float()
            out = op(q, k, v, norms, cos, sin, k_cache, v_cache, places.to(q.device))
            written = k_cache[:, places].transpose(0, 1).clone()
            assert bits(v_cache[:, places].transpose(0, 1)).equal(bits(v))
            k_cache[:, places] = v_cache[:, places] = math.nan
            assert whole.isnan().all()
            return out, written

        return call

    with on.counted() as counts:
        found = run(norm_rope_write)(q, k, v, *angle, *weights)
    if on.name == "triton":
        assert counts == ({"_norm_rope_write_kernel": 1} if tokens else {})
    elif on.name == "cpp" and tokens:
        assert {"write_kv", "rope"} <= set(counts)
    assert_exact(found, run(norm_rope_write_ref), q, k, v, *angle, *weights)


@pytest.mark.implementations("triton")
def test_beyond_two_to_the_31_elements(on: Implementation) -> None:
    dim, size = 16, 2**26 + 2
    k_cache = on.untouched(size, 2, dim, dtype=torch.float16).transpose(0, 1)
    v_cache = torch.zeros(2, size, 1, dtype=torch.float16, device=on.device)
    k, v = on.draw(2, 2, dim, dtype=torch.float16), on.draw(2, 2, 1, dtype=torch.float16)
    cos, sin = (torch.full((2, 8), x, device=on.device) for x in (1.0, 0.0))
    places = torch.tensor([size - 1, 2], device=on.device)
    assert (size - 1) * k_cache.stride(1) > 2**31
    out = norm_rope_write(k, k, v, None, cos, sin, k_cache, v_cache, places)
    assert out.equal(k) and k_cache[:, places].equal(k.transpose(0, 1))
    assert v_cache[:, places].equal(v.transpose(0, 1))


def test_bad_arguments_write_nothing(on: Implementation) -> None:
    norms = HeadNorms(on.draw(6), on.draw(6), 1e-6, False)
    cache = torch.full((3, 12, 6), math.nan, device=on.device)
    places = torch.tensor([0, 1], device=on.device)
    arguments: dict[str, Any] = {
        "q": on.draw(2, 6, 6), "k": on.draw(2, 3, 6), "v": on.draw(2, 3, 6), "norms": norms,
        "cos": on.draw(2, 3), "sin": on.draw(2, 3), "k_cache": cache, "v_cache": cache.clone(),
        "cache_index": places,
    }  # fmt: skip
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"cache_index": places.int()}, "int32"),
        ({"cache_index": places.repeat(2)}, r"cache_index must be \(2,\)"),
        ({"q": on.draw(2, 6)}, r"q must be \(T, H, D\) floating"),
        ({"q": on.draw(2, 6, 5)}, "even number of channels, not 5"),
        ({"q": on.draw(2, 6, 6).double()}, r"k must be .* torch.float64, got"),
        ({"v": on.draw(2, 4, 6)}, "v must be"),
        ({"sin": on.draw(2, 4)}, "sin must be"),
        ({"norms": replace(norms, k_weight=on.draw(5))}, r"k_weight must be \(6,\)"),
        ({"k_cache": cache[..., 1:]}, "k_cache must be"),
        ({"v_cache": cache[:, 1:]}, "v_cache must be"),
        ({"v_cache": cache.bfloat16()}, r"v_cache must be .* torch.float32, got .*bfloat16"),
    ]
    if on.name == "triton":  # on a GPU to look at places would be to wait
        refusals += gaps_in(arguments)
    else:
        refusals += [
            ({"cache_index": torch.tensor([3, 3])}, "index 3 is written twice"),
            ({"cache_index": torch.tensor([0, 12])}, r"in \[0, 12\), got 0 to 12"),
            ({"cache_index": torch.tensor([-1, 2])}, "got -1 to 2"),
        ]
    check_refused(norm_rope_write, arguments, *refusals)
    assert arguments["k_cache"].isnan().all() and arguments["v_cache"].isnan().all()
