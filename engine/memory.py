"""How much memory keys and values may take: what is free, less what the forwards need beside them.

It allocates nothing, and nothing that it says changes a sample.
"""

import os
from pathlib import Path

import torch

from models.config import ModelConfig

_DECODE_PARTIALS = 64  # partial attention results of a decode row: a prompt of 16,384 in splits
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses: on a GPU also what torch keeps for later; on CPU as the
    system estimates it, within the limit of the process's container."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _MEMINFO.exists():
        lines = _MEMINFO.read_text().splitlines()
        entries = dict(line.split(":", 1) for line in lines)
        free = int(entries["MemAvailable"].split()[0]) << 10
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)


def cache_bound(
    cache_bytes: int | None, memory_fraction: float | None, device: torch.device
) -> int | None:
    """The bytes that keys and values may take: as many as are said, or a fraction of the memory
    that is free now; None where neither is said. Raises ValueError for both, and for a fraction
    that is not above 0 and at most 1."""
    if memory_fraction is None:
        return cache_bytes
    if cache_bytes is not None:
        raise ValueError(f"cache_bytes = {cache_bytes} and memory_fraction = {memory_fraction}")
    if not 0 < memory_fraction <= 1:
        raise ValueError(f"memory_fraction = {memory_fraction} is not above 0 and at most 1")
    return int(free_bytes(device) * memory_fraction)


def working_bytes(config: ModelConfig, dtype: torch.dtype, rows: int, tokens: int) -> int:
    """Memory that a decode step of `rows` samples and a prefill of `tokens` tokens need beside
    weights and cache, the larger of them, and the logits that wait at the ends of prompts."""
    attention = config.num_heads * (config.cached_key_dim + config.cached_value_dim)
    attention += config.cell_width
    # Projections and what rope makes of them; gate, up and their product; the residual stream. A
    # token's experts have an output each.
    block = max(
        3 * config.intermediate_size
        if own is None
        else own.routing.per_token * (3 * own.intermediate_size + config.hidden_size)
        + 3 * own.shared_intermediate_size
        for own in config.experts
    )
    width = 4 * config.hidden_size + 2 * attention + block
    partials = rows * _DECODE_PARTIALS * config.num_heads * config.cached_value_dim * 4
    logits = 3 * rows * config.vocab_size * dtype.itemsize
    return max(rows, tokens) * width * dtype.itemsize + partials + logits


def cache_budget(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, rows: int, tokens: int
) -> int:
    """Bytes for keys and values where the caller names none: on a GPU all that is free but
    `working_bytes` and a twentieth for kernels and gaps; on CPU half of what is free, since a cache
    takes memory there only as it fills."""
    free = free_bytes(device)
    share = free * 19 // 20 if device.type == "cuda" else free // 2
    return max(share - working_bytes(config, dtype, rows, tokens), 0)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation of torch failed for want of memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
