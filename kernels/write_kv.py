"""Scatter the keys and values of new tokens into the cache.

    k_cache[h, slots[t]] = k[t, h]        v_cache[h, slots[t]] = v[t, h]

T tokens, Hkv key/value heads, D and Dv channels of a key and a value (they may differ), N slots.
The cache is head-major, so that one head's keys of a contiguous run of slots are one contiguous
block. Slots are distinct: two tokens written to one slot would leave an arbitrary winner.

It does not choose slots and is not differentiable.
"""

import torch
from torch import Tensor


def write_kv_ref(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Specification of `write_kv`, one token after another."""
    for t, slot in enumerate(slots.tolist()):
        k_cache[:, slot] = k[t]
        v_cache[:, slot] = v[t]


@torch.no_grad()
def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write keys and values into their slots, in place.

    k: (T, Hkv, D). v: (T, Hkv, Dv). k_cache: (Hkv, N, D). v_cache: (Hkv, N, Dv). slots: (T,) int64,
    distinct, in [0, N). All floating tensors have one dtype and one device.
    Raises ValueError for other shapes and dtypes and, on CPU, for slots that repeat or lie outside
    the cache; on a GPU the contents of `slots` are not looked at, since that would wait for the
    device.
    """
    for name, tensor in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.ndim != 3 or not tensor.is_floating_point():
            raise ValueError(
                f"write_kv: {name} must be 3-D floating, got {tuple(tensor.shape)} {tensor.dtype}"
            )
    tokens, heads, dim = k.shape
    size, v_dim = k_cache.shape[1], v.shape[-1]
    for name, tensor, shape in (
        ("v", v, (tokens, heads, v_dim)),
        ("k_cache", k_cache, (heads, size, dim)),
        ("v_cache", v_cache, (heads, size, v_dim)),
        ("slots", slots, (tokens,)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"write_kv: {name} must be {shape}, got {tuple(tensor.shape)}")
        if tensor.device != k.device:
            raise ValueError(f"write_kv: {name} is on {tensor.device}, k on {k.device}")
    for name, tensor in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.dtype != k.dtype:
            raise ValueError(f"write_kv: {name} is {tensor.dtype}, k is {k.dtype}")
    if slots.dtype != torch.int64:
        raise ValueError(f"write_kv: slots must be int64, got {slots.dtype}")
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
    k_cache.index_copy_(1, slots, k.transpose(0, 1))
    v_cache.index_copy_(1, slots, v.transpose(0, 1))
