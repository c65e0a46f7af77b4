"""Scatter the keys and values of new tokens into the cache.

    k_cache[h, slots[t]] = k[t, h]        v_cache[h, slots[t]] = v[t, h]

T tokens, Hkv key/value heads, D and Dv channels of a key and a value (they may differ), N slots.
The cache is head-major, so that one head's keys of a contiguous run of slots are one contiguous
block. Slots are distinct: two tokens written to one slot would leave an arbitrary winner.

A Triton program copies the key and the value of several (token, head) pairs.

It does not choose slots and is not differentiable.
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


def write_kv_ref(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Specification of `write_kv`, one token after another."""
    for t, slot in enumerate(slots.tolist()):
        k_cache[:, slot] = k[t]
        v_cache[:, slot] = v[t]


@triton.jit
def _write_kv_kernel(
    k_ptr,  # (T, Hkv, D), strides k_t, k_h, 1
    v_ptr,  # (T, Hkv, Dv), strides v_t, v_h, 1
    k_cache_ptr,  # (Hkv, N, D), strides k_cache_h, k_cache_n, 1
    v_cache_ptr,  # (Hkv, N, Dv), strides v_cache_h, v_cache_n, 1
    slots_ptr,  # (T,) int64
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
    there = row < num_rows
    t, h = row // heads, row % heads
    slot = tl.load(slots_ptr + t, mask=there, other=0)  # (ROWS,)

    mask = there[:, None] & (column < D)[None, :]  # (ROWS, COLUMNS)
    k = tl.load(k_ptr + (t * k_t + h * k_h)[:, None] + column[None, :], mask=mask)
    to = (h * k_cache_h + slot * k_cache_n)[:, None] + column[None, :]
    tl.store(k_cache_ptr + to, k, mask=mask)

    mask = there[:, None] & (column < V_D)[None, :]
    v = tl.load(v_ptr + (t * v_t + h * v_h)[:, None] + column[None, :], mask=mask)
    to = (h * v_cache_h + slot * v_cache_n)[:, None] + column[None, :]
    tl.store(v_cache_ptr + to, v, mask=mask)


def _launch(dim: int) -> dict[str, int]:
    """Rows and columns of a program, and its warps: 2,048 elements or one row, of keys and of
    values; `dim` is the wider of the two."""
    columns = power_of_two(dim, 16)
    return {"ROWS": max(1, 2048 // columns), "COLUMNS": columns, "num_warps": 4}


def _run_triton(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    check_triton("write_kv", k, v, k_cache, v_cache, slots)
    tokens, heads, dim = k.shape
    options = _launch(max(dim, v.shape[-1]))
    launch(
        _write_kv_kernel,
        (triton.cdiv(tokens * heads, options["ROWS"]),),
        k, v, k_cache, v_cache, slots, tokens * heads, heads,
        *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:2], *v_cache.stride()[:2],
        D=dim, V_D=v.shape[-1], **options,
    )  # fmt: skip


@torch.no_grad()
def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write keys and values into their slots, in place.

    k: (T, Hkv, D). v: (T, Hkv, Dv). k_cache: (Hkv, N, D). v_cache: (Hkv, N, Dv). slots: (T,) int64,
    distinct, in [0, N). All floating tensors have one dtype and one device. In Triton the last
    dimensions are contiguous; the others may be slices of something wider.
    Raises ValueError for other shapes and dtypes and, on CPU, for slots that repeat or lie outside
    the cache; on a GPU the contents of `slots` are not looked at, since that would wait for the
    device.
    """
    check("write_kv: k", k, "THD", "floating")
    tokens, heads, dim = k.shape
    check("write_kv: v", v, (tokens, heads, "Dv"), k.dtype)
    check("write_kv: k_cache", k_cache, (heads, "N", dim), k.dtype)
    size, v_dim = k_cache.shape[1], v.shape[-1]
    check("write_kv: v_cache", v_cache, (heads, size, v_dim), k.dtype)
    check("write_kv: slots", slots, (tokens,), torch.int64)
    for name, tensor in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache), ("slots", slots)):
        if tensor.device != k.device:
            raise ValueError(f"write_kv: {name} is on {tensor.device}, k on {k.device}")
    if runs_cpp(k, v, k_cache, v_cache) and cpp.distinct_slots(slots, size):
        cpp.call(
            "write_kv", k.dtype, k, *k.stride()[:2], v, *v.stride()[:2], k_cache,
            *k_cache.stride()[:2], v_cache, *v_cache.stride()[:2], slots, tokens, heads, dim, v_dim,
        )  # fmt: skip
        return
    if slots.device.type == "cpu" and tokens:
        ordered = slots.sort().values
        if ordered[0] < 0 or ordered[-1] >= size:
            raise ValueError(
                f"write_kv: slots must lie in [0, {size}), got {int(ordered[0])} to "
                f"{int(ordered[-1])}"
            )
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(repeated):
            raise ValueError(f"write_kv: slot {int(repeated[0])} is written twice")
    if runs_triton(k):
        _run_triton(k, v, k_cache, v_cache, slots)
        return
    k_cache.index_copy_(1, slots, k.transpose(0, 1))
    v_cache.index_copy_(1, slots, v.transpose(0, 1))
