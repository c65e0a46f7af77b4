"""Experts of a mixture: each token goes through K of E gated feed-forward blocks.

    out[t] = sum_k weights[t, k] D_e (act(G_e x_t) * U_e x_t)          e = experts[t, k]

T tokens, H the hidden size, I the width of an expert; P = T K pairs of a token and one of its
experts. G and U are the halves of gate_up (E, 2I, H), D is down (E, H, I). Sums are in float32
(float64 for float64 input). What gate and up give, their product, an expert's output and the result
are rounded to the dtype of x, though C++ rounds neither of the first two before the activation.
The K outputs of a token are added in the order of k.

Pairs are sorted by expert, and an expert without pairs costs nothing. A token's bits do not depend
on the others, in C++ and in Triton, not even on those with which it shares an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpp
from kernels.checks import check
from kernels.gated_act import ACTIVATIONS, gated_act, gated_act_ref
from kernels.packed_linear import packed, packs


def moe_ref(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, activation: str
) -> Tensor:
    """Specification of `moe`, in plain torch for any device and floating dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    outputs = x.new_zeros(*experts.shape, x.shape[1])
    for expert in range(len(gate_up)):
        of_it = experts == expert
        rows = x[of_it.nonzero()[:, 0]]
        halves = (rows.to(wide) @ gate_up[expert].to(wide).T).to(x.dtype)
        active = gated_act_ref(halves, activation)
        outputs[of_it] = (active.to(wide) @ down[expert].to(wide).T).to(x.dtype)
    return (weights[..., None].to(wide) * outputs.to(wide)).sum(1).to(x.dtype)


def _run_cpp(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, activation: str
) -> Tensor:
    out = torch.empty_like(x)
    count, hidden, width = down.shape
    cpp.call(
        "moe", x.dtype, x, len(x), hidden, packed(gate_up, paired=True), packed(down), count, width,
        experts.contiguous(), weights.detach().contiguous(), experts.shape[1],
        int(activation == "gelu_tanh"), out,
    )  # fmt: skip
    return out


def _run_torch(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, activation: str
) -> Tensor:
    """Expert by expert, over those that have pairs."""
    chosen = experts.flatten()
    order = chosen.argsort(stable=True)
    rows = x.index_select(0, order // experts.shape[1])
    counts = chosen.bincount(minlength=len(gate_up)).tolist()
    # Not gate_up[expert]: the gradient of each would be as large as that of all.
    each = zip(rows.split(counts), gate_up.unbind(), down.unbind(), strict=True)
    outputs = torch.cat(
        [F.linear(gated_act(F.linear(own, g_u), activation), d) if len(own) else own
         for own, g_u, d in each]
    )  # fmt: skip
    outputs = outputs.index_select(0, order.argsort()).unflatten(0, experts.shape)
    wide = torch.promote_types(x.dtype, torch.float32)
    return (weights[..., None] * outputs.to(wide)).sum(1).to(x.dtype)


def moe(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, activation: str
) -> Tensor:
    """The weighted sum of what its experts make of each token.

    x: (T, H), gate_up: (E, 2I, H), down: (E, H, I), one floating dtype. experts: (T, K) int64 in
    [0, E); on a GPU that is not checked. weights: (T, K) float32, or float64 for float64 x.
    activation: "silu" or "gelu_tanh".
    Returns (T, H) in the dtype of x; differentiable once, in all but the experts. Raises ValueError
    for anything else.
    """
    check("moe: x", x, ("T", "H"), "floating")
    check("moe: down", down, ("E", x.shape[1], "I"), x.dtype)
    count, hidden, width = down.shape
    check("moe: gate_up", gate_up, (count, 2 * width, hidden), x.dtype)
    check("moe: experts", experts, (len(x), "K"), torch.int64)
    wide = torch.promote_types(x.dtype, torch.float32)
    check("moe: weights", weights, experts.shape, wide)
    if activation not in ACTIVATIONS:
        raise ValueError(f"moe: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if experts.is_cpu and bool(((experts < 0) | (experts >= count)).any()):
        raise ValueError(f"moe: experts must be in [0, {count}), got {experts.tolist()}")
    learns = torch.is_grad_enabled() and weights.requires_grad
    if packs(x, gate_up) and packs(x, down) and not learns:
        return _run_cpp(x, gate_up, down, experts, weights, activation)
    return _run_torch(x, gate_up, down, experts, weights, activation)
