"""Scatter the keys and values of new tokens into the cache.

    k_cache[h, cache_index[t]] = k[t, h]        v_cache[h, cache_index[t]] = v[t, h]

T tokens, Hkv key/value heads, D and Dv channels of a key and a value (they may differ), N cells of
the cache. The cache is head-major: one head's keys in consecutive cells are one contiguous block.
Indices are distinct: of two tokens written to one cell an arbitrary one would stay.

A Triton program copies the key and the value of several (token, head) pairs. Not differentiable.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import cpp
from kernels.checks import check, check_triton
from kernels.cpp import runs_cpp
from kernels.launch import launch, runs_triton
from kernels.target import power_of_two


def write_kv_ref(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_index: Tensor
) -> None:
    """Specification of `write_kv`, one token after another."""
    for t, index in enumerate(cache_index.tolist()):
        k_cache[:, index] = k[t]
        v_cache[:, index] = v[t]


@triton.jit
def _write_kv_kernel(
    k_ptr,  # (T, Hkv, D), strides k_t, k_h, 1
    v_ptr,  # (T, Hkv, Dv), strides v_t, v_h, 1
    k_cache_ptr,  # (Hkv, N, D), strides k_cache_h, k_cache_n, 1
    v_cache_ptr,  # (Hkv, N, Dv), strides v_cache_h, v_cache_n, 1
    cache_index_ptr,  # (T,) int64
    num_rows,  # T * Hkv
    heads,  # Hkv
    k_t,
    k_h,
    v_t,
    v_h,
    k_cache_h,
    k_cache_n,
    v_cache_h,
    v_cache_n,
    D: tl.constexpr,
    V_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    valid = row < num_rows
    t, h = row // heads, row % heads
    index = tl.load(cache_index_ptr + t, mask=valid, other=0)  # (ROWS,)

    mask = valid[:, None] & (column < D)[None, :]  # (ROWS, COLUMNS)
    k = tl.load(k_ptr + (t * k_t + h * k_h)[:, None] + column[None, :], mask=mask)
    to = (h * k_cache_h + index * k_cache_n)[:, None] + column[None, :]
    tl.store(k_cache_ptr + to, k, mask=mask)

    mask = valid[:, None] & (column < V_D)[None, :]
    v = tl.load(v_ptr + (t * v_t + h * v_h)[:, None] + column[None, :], mask=mask)
    to = (h * v_cache_h + index * v_cache_n)[:, None] + column[None, :]
    tl.store(v_cache_ptr + to, v, mask=mask)


def _launch(dim: int) -> dict[str, int]:
    """Rows and columns of a program, and its warps: 2,048 elements or one row, of keys and of
    values; `dim` is the wider of the two."""
    columns = power_of_two(dim, 16)
    return {"ROWS": max(1, 2048 // columns), "COLUMNS": columns, "num_warps": 4}


def _run_triton(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_index: Tensor
) -> None:
    check_triton("write_kv", k, v, k_cache, v_cache, cache_index)
    tokens, heads, dim = k.shape
    options = _launch(max(dim, v.shape[-1]))
    launch(
        _write_kv_kernel,
        (triton.cdiv(tokens * heads, options["ROWS"]),),
        k, v, k_cache, v_cache, cache_index, tokens * heads, heads,
        *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:2], *v_cache.stride()[:2],
        D=dim, V_D=v.shape[-1], **options,
    )  # fmt: skip


@torch.no_grad()
def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_index: Tensor) -> None:
    """Write keys and values into the cache, in place.

    k: (T, Hkv, D). v: (T, Hkv, Dv). k_cache: (Hkv, N, D). v_cache: (Hkv, N, Dv). cache_index: (T,)
    int64, distinct, in [0, N). All floating tensors have one dtype, all tensors one device. In
    Triton the last dimensions are contiguous; the others may be slices of something wider.
    Raises ValueError for other shapes and dtypes and, on CPU, for indices that repeat or lie
    outside the cache; on a GPU they are not checked, since that would wait for the device.
    """
    check("write_kv: k", k, "THD", "floating")
    tokens, heads, dim = k.shape
    check("write_kv: v", v, (tokens, heads, "Dv"), k.dtype)
    check("write_kv: k_cache", k_cache, (heads, "N", dim), k.dtype)
    size, v_dim = k_cache.shape[1], v.shape[-1]
    check("write_kv: v_cache", v_cache, (heads, size, v_dim), k.dtype)
    check("write_kv: cache_index", cache_index, (tokens,), torch.int64)
    others = {"v": v, "k_cache": k_cache, "v_cache": v_cache, "cache_index": cache_index}
    for name, tensor in others.items():
        if tensor.device != k.device:
            raise ValueError(f"write_kv: {name} is on {tensor.device}, k on {k.device}")
    if runs_cpp(k, v, k_cache, v_cache) and cpp.distinct_slots(cache_index, size):
        cpp.call(
            "write_kv", k.dtype, k, *k.stride()[:2], v, *v.stride()[:2], k_cache,
            *k_cache.stride()[:2], v_cache, *v_cache.stride()[:2], cache_index,
            tokens, heads, dim, v_dim,
        )  # fmt: skip
        return
    if cache_index.device.type == "cpu" and tokens:
        ordered = cache_index.sort().values
        if ordered[0] < 0 or ordered[-1] >= size:
            raise ValueError(
                f"write_kv: cache_index must lie in [0, {size}), got {int(ordered[0])} to "
                f"{int(ordered[-1])}"
            )
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(repeated):
            raise ValueError(f"write_kv: index {int(repeated[0])} is written twice")
    if runs_triton(k):
        _run_triton(k, v, k_cache, v_cache, cache_index)
        return
    k_cache.index_copy_(1, cache_index, k.transpose(0, 1))
    v_cache.index_copy_(1, cache_index, v.transpose(0, 1))
