"""Stand-ins for flash-attn and xformers, which do not run without a GPU: the calls that adapters
make, in torch, as the packages document them."""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.forest_attention import AttentionOptions
from kernels.segment_attention import segment_attention_ref


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: None = None,
) -> tuple[Tensor, Tensor, None]:
    """As flash-attn 2.8 documents it: lse (nheads, total_q), +inf for a row without keys."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and return_attn_probs
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    assert softmax_scale is not None and window_size[1] == (-1 if window_size[0] == -1 else 0)
    window = None if window_size[0] == -1 else window_size[0] + 1
    out, lse = segment_attention_ref(
        q.double(), k.double(), v.double(), cu_seqlens_q.tolist(), cu_seqlens_k.tolist(),
        AttentionOptions(softmax_scale, softcap or None, window), causal,
    )  # fmt: skip
    return out.to(q.dtype), lse.float().masked_fill(lse.isneginf(), float("inf")).T, None


@dataclass
class BlockDiagonalMask:
    """As xformers 0.0.35 has it, with its three kinds in one class."""

    q_seqlen: list[int]
    kv_seqlen: list[int]
    causal: bool = False
    window: int | None = None

    @classmethod
    def from_seqlens(
        cls, q_seqlen: list[int], kv_seqlen: list[int], *, device: torch.device
    ) -> "BlockDiagonalMask":
        return cls(q_seqlen, kv_seqlen)

    def make_causal_from_bottomright(self) -> "BlockDiagonalMask":
        return BlockDiagonalMask(self.q_seqlen, self.kv_seqlen, True)

    def make_local_attention_from_bottomright(self, window_size: int) -> "BlockDiagonalMask":
        return BlockDiagonalMask(self.q_seqlen, self.kv_seqlen, True, window_size)


def memory_efficient_attention_partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: BlockDiagonalMask,
    *,
    scale: float,
    op: Any,
) -> tuple[Tensor, Tensor]:
    """query, key, value [1, M, G, H, K]; out [1, M, G, H, K] float32, lse [1, G, H, M]."""
    assert query.shape[2:] == key.shape[2:] == value.shape[2:] and len(query) == 1
    cu_seqlens_q, cu_seqlens_k = (
        [0, *torch.tensor(n).cumsum(0).tolist()] for n in (attn_bias.q_seqlen, attn_bias.kv_seqlen)
    )
    q, k, v = (x[0].flatten(1, 2).double() for x in (query, key, value))
    out, lse = segment_attention_ref(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        AttentionOptions(scale, None, attn_bias.window),
        attn_bias.causal,
    )
    groups = query.shape[2:4]
    return out.float().unflatten(1, groups)[None], lse.float().T.unflatten(0, groups)[None]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both packages be imported, for the length of a test."""
    names = ("flash_attn", "xformers", "xformers.ops", "xformers.ops.fmha",
             "xformers.ops.fmha.attn_bias")  # fmt: skip
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    modules["flash_attn"].flash_attn_varlen_func = flash_attn_varlen_func
    fmha, bias = modules["xformers.ops.fmha"], modules["xformers.ops.fmha.attn_bias"]
    modules["xformers.ops"].fmha, fmha.attn_bias = fmha, bias
    fmha.memory_efficient_attention_partial = memory_efficient_attention_partial
    fmha.flash = ModuleType("flash")
    fmha.flash.FwOp = object
    bias.BlockDiagonalMask = BlockDiagonalMask
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
