"""From the projection of a step or a prefill to its attention: queries and keys normalised and
rotated, keys and values written into the cache, to scattered cells or to a run of them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import Arguments, OpCase, assert_close, assert_equal, same_inputs
from bench.ops.rms_norm import EPS
from bench.shapes import SHAPES, Shape, projected
from bench.timing import DEVICE, ON_GPU, Fill
from kernels.norm_rope_write import HeadNorms, norm_rope_write, norm_rope_write_ref
from kernels.rms_norm import rms_norm
from kernels.rope import rope, rope_cos_sin

CELLS = 1 << 16 if ON_GPU else 1 << 12


def _apart(
    q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms | None, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, cache_index: Tensor,
) -> Tensor:  # fmt: skip
    """Each operation by itself."""
    if norms is not None:
        options = norms.eps, norms.plus_one
        normed = rms_norm(q, norms.q_weight, *options), rms_norm(k, norms.k_weight, *options)
        q, k = (x for x in normed if isinstance(x, Tensor))
    k_cache.index_copy_(1, cache_index, rope(k, cos, sin).transpose(0, 1))
    v_cache.index_copy_(1, cache_index, v.transpose(0, 1))
    return rope(q, cos, sin)


def forward(shape: Shape, rows: int) -> OpCase:
    """`rows` tokens, as slices of one projection: in decode one cell is far from the other, in
    prefill beside it. All calls write to one cache, each to cells of its own."""
    (heads, dim), dtype, latent = shape.turned, shape.dtype, shape.latent
    value_dim = shape.v_head_dim if latent is None else latent.kv_rank

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        # With latent attention a value, then what rope has turned, are one key.
        both = torch.zeros(heads, CELLS, value_dim + dim, dtype=dtype, device=DEVICE)
        caches = [both[..., value_dim:], both[..., :value_dim]]
        if latent is None:
            caches = [x.contiguous() for x in caches]
        inv_freq = 1e6 ** -(torch.arange(0, dim, 2, device=DEVICE) / dim)
        cos, sin = rope_cos_sin(torch.arange(rows, device=DEVICE) + 4096, inv_freq)
        apart = CELLS // rows if rows <= 64 else 1
        places = CELLS // rows  # of which there are enough
        inputs = []
        for i in range(count):
            norms = None
            if shape.qk_norm:
                norms = HeadNorms(tensor(dim, dtype=dtype), tensor(dim, dtype=dtype), EPS, False)
            first = i % places if apart > 1 else i % places * rows
            cells = torch.arange(rows, device=DEVICE) * apart + first
            inputs.append((*projected(shape, rows, tensor), norms, cos, sin, *caches, cells))
        return inputs

    def check(arguments: Arguments, out: Tensor, factor: float) -> None:
        q, k, v, norms, cos, sin, k_cache, v_cache, cells = arguments
        wide = norms and HeadNorms(
            norms.q_weight.double(), norms.k_weight.double(), norms.eps, norms.plus_one
        )
        index = torch.arange(rows, device=DEVICE)
        keys, values = (torch.zeros_like(cache[:, cells]) for cache in (k_cache, v_cache))
        exact_keys, exact_values = keys.double(), values.double()
        plain = norm_rope_write_ref(q, k, v, norms, cos, sin, keys, values, index)
        exact = norm_rope_write_ref(
            q.double(), k.double(), v.double(), wide, cos, sin, exact_keys, exact_values, index
        )
        assert_close("norm_rope_write", out, exact, plain, factor)
        assert_close("norm_rope_write", k_cache[:, cells], exact_keys, keys, factor)
        assert_equal("norm_rope_write", v_cache[:, cells], values)

    keys, queries = rows * heads * dim, rows * shape.num_heads * dim
    values = rows * heads * value_dim
    return OpCase(
        "norm_rope_write",
        f"{shape.name} {rows} rows",
        make_inputs,
        norm_rope_write,
        check,
        2 * (queries + keys + values) * dtype.itemsize + rows * (8 + 4 * dim),
        (7 if shape.qk_norm else 3) * (queries + keys),
        same_inputs(apart=_apart),
    )


def variants(shape: Shape, rows: int) -> Iterator[OpCase]:
    """Any number of tokens."""
    yield forward(shape, rows)


CASES = [
    forward(SHAPES[name], rows)
    for name in (("qwen3-8b", "gemma2-9b") if ON_GPU else ("pocket", "qwen3-107m"))
    for rows in ((64, 2048) if ON_GPU else (32, 512))
]
