"""Specification of forest attention, in plain torch for any device and floating dtype.

    s_ij = scale * q_i . k_j        [softcap * tanh(s / softcap)]
    o_i  = sum_j exp(s_ij - lse_i) v_j        lse_i = log sum_j exp(s_ij)

T queries, N keys, Hq query heads in groups of G per key/value head (Hkv of them), D and Dv channels
of keys and values. Log-sum-exps are natural; everything is computed in the dtype of q.
"""

import torch
from torch import Tensor

from kernels.forest_attention.options import AttentionOptions
from kernels.forest_attention.plan import MAX_SPLIT, ForestPlan

NEG_INF = float("-inf")


def visible_keys(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    """(..., T, N) bool: which keys at positions k_pos (..., N) queries at q_pos (..., T) see."""
    q_pos, k_pos = q_pos[..., None], k_pos[..., None, :]
    visible = k_pos <= q_pos
    return visible if window is None else visible & (k_pos > q_pos - window)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention under an explicit mask; differentiable.

    q: (..., T, Hq, D), k: (..., N, Hkv, D), v: (..., N, Hkv, Dv), one dtype. visible: (..., T, N)
    bool, None for everything; it has to include the window of `options`, which is not applied here.
    Returns o (..., T, Hq, Dv) and lse (..., T, Hq); a query that sees no key gets 0 and -inf.
    """
    if not k.shape[-3]:
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_full(q.shape[:-1], NEG_INF)
    grouped = (q * options.scale).unflatten(-2, (k.shape[-2], -1))
    scores = torch.einsum("...tkgd,...nkd->...tkgn", grouped, k)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible[..., None, None, :], NEG_INF)
    row_max = scores.detach().amax(-1)
    row_max = row_max.masked_fill(row_max == NEG_INF, 0)
    weights = (scores - row_max[..., None]).exp()
    row_sum = weights.sum(-1)
    o = torch.einsum("...tkgn,...nkd->...tkgd", weights, v)
    o = o / row_sum.masked_fill(row_sum == 0, 1)[..., None]
    return o.flatten(-3, -2), (row_max + row_sum.log()).flatten(-2)


def forest_attention_ref(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: ForestPlan, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Specification of `forest_attention_with_lse`: each query by itself over the keys it sees.

    q: (T, Hq, D), k_cache: (Hkv, N, D), v_cache: (Hkv, N, Dv). Returns o (T, Hq, Dv) and lse
    (T, Hq) in q's dtype.
    """
    positions = plan.positions.tolist()
    keys: list[list[tuple[int, int]]] = [[] for _ in positions]  # cache index, position
    for query, num_queries, key, num_keys, position in plan.tiles.tolist():
        for own in keys[query : query + num_queries]:
            own += [(key + j, position + j) for j in range(num_keys)]
    if plan.suffix is not None:
        suffix = plan.suffix
        for i, blocks in enumerate(suffix.blocks.tolist()):
            start = int(suffix.position[i])
            keys[i] += [
                (blocks[c // MAX_SPLIT] + c % MAX_SPLIT, start + c)
                for c in range(int(suffix.length[i]))
            ]
    results = []
    for i, q_pos in enumerate(positions):
        after = -1 if options.window is None else q_pos - options.window
        seen = [index for index, k_pos in keys[i] if after < k_pos <= q_pos]
        k, v = (cache[:, seen].transpose(0, 1) for cache in (k_cache, v_cache))
        results.append(dense_attention(q[i : i + 1], k, v, options))
    if not results:
        return q.new_zeros(*q.shape[:2], v_cache.shape[-1]), q.new_zeros(q.shape[:2])
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs), torch.cat(lses)
