"""Attention of many queries over the keys of a forest: a key is read once for all who share it.

    s_ij = scale * q_i . k_j        [softcap * tanh(s / softcap)]
    o_i  = sum_j exp(s_ij - lse_i) v_j,      j over the keys of i's work tiles, where
           position(j) <= position(i)   and, with a window,   position(j) > position(i) - window

T queries, Hq query heads in groups of G per key/value head (Hkv of them), D and Dv channels of keys
and values, N cache indices. Prefill, decode and training differ in the plan only. Log-sum-exps are
natural; scores, partial results and their merge are float32 (float64 for float64 input). No T x T
mask exists.

    plan.py         what to compute          reference.py        the specification
    torch_impl.py   forward and backward     triton_forward.py   with schedule.py
    cpp_impl.py     forward and backward     triton_backward.py  with backward_schedule.py

It does not write the cache or choose what is shared.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cpp import runs_cpp
from kernels.forest_attention import cpp_impl, torch_impl, triton_backward, triton_forward
from kernels.forest_attention.options import AttentionOptions
from kernels.forest_attention.plan import ForestPlan
from kernels.forest_attention.reference import forest_attention_ref
from kernels.launch import runs_triton

__all__ = [
    "AttentionOptions",
    "ForestPlan",
    "forest_attention",
    "forest_attention_ref",
    "forest_attention_with_lse",
]


def forest_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: ForestPlan, options: AttentionOptions
) -> Tensor:
    """Attention of all queries of a plan.

    q: (T, Hq, D), k_cache: (Hkv, N, D), v_cache: (Hkv, N, Dv), one floating dtype and device;
    T = len(plan.positions), Hkv divides Hq. Cache entries outside the plan may hold anything, NaN
    included. Returns (T, Hq, Dv) in q's dtype; a query without any key gives 0.
    Differentiable once in q, k_cache and v_cache, for plans without suffixes whose positions stay;
    the caches' gradients are (N, Hkv, ...) in memory. Raises ValueError for other shapes, dtypes or
    devices, or where a gradient is wanted of another plan.
    """
    return forest_attention_with_lse(q, k_cache, v_cache, plan, options)[0]


def forest_attention_with_lse(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: ForestPlan, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """`forest_attention`, and the natural log-sum-exp of each query's scores, (T, Hq) float32
    (float64 for float64 input), -inf for a query without any key."""
    _check(q, k_cache, v_cache, plan)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache)):
        if plan.suffix is not None or plan.advancing:
            kind = "advancing positions" if plan.suffix is None else "suffixes"
            raise ValueError(f"forest_attention: no gradient for a plan with {kind}")
        return _ForestAttention.apply(q, k_cache, v_cache, plan, options)
    return _run(q, k_cache, v_cache, plan, options)


def _run(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: ForestPlan, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    if runs_triton(q):
        return triton_forward.run(q, k_cache, v_cache, plan, options)
    if runs_cpp(q, k_cache, v_cache):
        return cpp_impl.run(q, k_cache, v_cache, plan, options)
    return torch_impl.run(q, k_cache, v_cache, plan, options)


def _run_backward(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if runs_triton(q):
        return triton_backward.run_backward(q, *arguments)
    if runs_cpp(q, *arguments[:2]):
        return cpp_impl.run_backward(q, *arguments)
    return torch_impl.run_backward(q, *arguments)


class _ForestAttention(torch.autograd.Function):
    """Returns o and lse."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: ForestPlan,
        options: AttentionOptions,
    ) -> tuple[Tensor, Tensor]:
        o, lse = _run(q, k_cache, v_cache, plan, options)
        ctx.save_for_backward(q, k_cache, v_cache, o, lse)
        ctx.plan, ctx.options = plan, options
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_o: Tensor | None, d_lse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k_cache, v_cache, o, lse = ctx.saved_tensors
        d_o = torch.zeros_like(o) if d_o is None else d_o
        gradients = _run_backward(q, k_cache, v_cache, o, lse, d_o, d_lse, ctx.plan, ctx.options)
        return *gradients, None, None


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: ForestPlan) -> None:
    if q.ndim != 3 or k_cache.ndim != 3 or v_cache.ndim != 3:
        raise ValueError(
            f"forest_attention: q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache "
            f"{tuple(v_cache.shape)} must be (T, Hq, D), (Hkv, N, D), (Hkv, N, Dv)"
        )
    if q.shape[2] != k_cache.shape[2] or k_cache.shape[:2] != v_cache.shape[:2]:
        raise ValueError(
            f"forest_attention: q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)} and v_cache "
            f"{tuple(v_cache.shape)} do not agree"
        )
    if not k_cache.shape[0] or q.shape[1] % k_cache.shape[0]:
        raise ValueError(
            f"forest_attention: {k_cache.shape[0]} kv heads do not divide {q.shape[1]} heads"
        )
    if len(q) != len(plan.positions):
        raise ValueError(f"forest_attention: {len(q)} queries, plan for {len(plan.positions)}")
    if not q.dtype == k_cache.dtype == v_cache.dtype or not q.is_floating_point():
        raise ValueError(
            f"forest_attention: dtypes {q.dtype}, {k_cache.dtype}, {v_cache.dtype} must be one "
            "floating dtype"
        )
    if not q.device == k_cache.device == v_cache.device == plan.positions.device:
        raise ValueError(
            f"forest_attention: q is on {q.device}, k_cache on {k_cache.device}, v_cache on "
            f"{v_cache.device}, the plan on {plan.positions.device}"
        )
