"""The oracle of attention: one dense softmax with an explicit mask, and autograd.

It is independent of `kernels/forest_attention`: who sees what is told from the sequences alone, and
no formula is shared with the code under test.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.forest import Node
from kernels.forest_attention import AttentionOptions, ForestPlan, forest_attention_with_lse
from tests.forests import Grove, Sample, Shape


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    from_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """o (T, Hq, Dv) and natural log-sum-exps (T, Hq); q (T, Hq, D), k and v (N, Hkv, ...), mask
    (T, N) bool, True where a query sees a key. from_lse: weights are exp(score - lse), as in a
    backward that has kept lse alone; its rounding is then in every weight."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("thd,nhd->htn", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    seen = mask.any(-1)
    lse = torch.where(seen, scores.where(seen[:, None], 0).logsumexp(-1), float("-inf"))
    if from_lse:
        weights = (scores - lse.where(seen, 0)[..., None]).exp()
    else:
        weights = scores.where(seen[:, None], 0).softmax(-1).where(seen[:, None], 0)
    return torch.einsum("htn,nhe->the", weights, v), lse.T


def causal_mask(tokens: int, keys: int, window: int | None = None) -> Tensor:
    """(tokens, keys) bool, for the last `tokens` queries of a sequence of `keys`."""
    distance = torch.arange(keys - tokens, keys)[:, None] - torch.arange(keys)
    return (distance >= 0) & (distance < (keys if window is None else window))


Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # of q, k, v: o and lse


def rounded_once(attend: Attend) -> Attend:
    """The same in float32 at least; then o is rounded to the dtype of q."""

    def rounded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = attend(*(x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v)))
        return o.to(q.dtype), lse

    return rounded


def over_sequences(sequences: Sequence[tuple[int, Tensor]], options: AttentionOptions) -> Attend:
    """Attention of queries (T, Hq, D) in caches (Hkv, N, ...), each over its own sequence alone. An
    entry is a number of queries and the cells of the sequence whose last tokens they are."""

    def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
        counts = [count for count, _ in sequences]
        results = []
        for queries, (count, cells) in zip(q.split(counts), sequences, strict=True):
            k, v = (cache[:, cells].transpose(0, 1) for cache in (k_cache, v_cache))
            mask = causal_mask(count, len(cells), options.window)
            results.append(dense_attention(queries, k, v, mask, options.scale, options.softcap))
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs), torch.cat(lses)

    return rounded_once(attend)


@dataclass
class Problem:
    """Queries (T, Hq, D), keys and values (N, Hkv, ...) token by token, gradients of o and of lse
    (None: lse has none), a plan, and whether a query sees a cell: (T, N) bool."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_o: Tensor
    d_lse: Tensor | None
    plan: ForestPlan
    mask: Tensor
    options: AttentionOptions

    def inputs(self) -> list[Tensor]:
        """Fresh leaves."""
        return [x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The operation's o and lse, of `inputs`."""
        caches = k.transpose(0, 1), v.transpose(0, 1)
        return forest_attention_with_lse(q, *caches, self.plan, self.options)

    def gradients(self) -> tuple[Tensor, ...]:
        """Gradients of the operation's."""
        inputs = self.inputs()
        return self._gradients(self.attend(*inputs), inputs)

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Those of dense attention in another dtype, on CPU."""
        inputs = [x.detach().cpu().nan_to_num().to(dtype).requires_grad_() for x in self.inputs()]
        q, k, v = inputs
        options = self.options
        results = dense_attention(q, k, v, self.mask, options.scale, options.softcap, True)
        return self._gradients(results, inputs)

    def _gradients(
        self, results: tuple[Tensor, Tensor], inputs: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        o, lse = results
        grads = [self.d_o.to(o)]
        if self.d_lse is not None:
            grads.append(self.d_lse.to(lse))
        return torch.autograd.grad(results[: len(grads)], inputs, grads)

    def check(self, gradients: Sequence[Tensor]) -> None:
        """The error against float64 is at most 4 times that of dense attention in the same dtype,
        and never held below 8 units in the last place of the largest gradient (in float64: 1e-10 of
        it)."""
        dtype = self.q.dtype
        unit = 1e-10 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
        exact, plain = self.dense(torch.float64), self.dense(dtype)
        largest = max(grad.abs().max().item() for grad in exact)
        for mine, its, exactly in zip(gradients, plain, exact, strict=True):
            assert mine.shape == exactly.shape and mine.dtype == dtype
            error, plain_error = (
                (x.double().cpu() - exactly).abs().max().item() for x in (mine, its)
            )
            assert error <= max(4 * plain_error, unit * largest), (error, plain_error, largest)


def problem(
    samples: Sequence[Sample],
    shape: Shape,
    options: AttentionOptions,
    pieces: Sequence[tuple[int, int, int]] | None = None,
    d_lse: bool = True,
    device: torch.device | str = "cpu",
) -> Problem:
    """The forward of a tree's tokens, or of pieces of it: tokens [first, stop) of its fresh nodes.
    What no query's sequence holds is NaN."""
    grove = Grove(samples, shape, device=torch.device(device))
    whole = [(i, 0, len(node.token_ids)) for i, node in enumerate(grove.fresh)]
    chosen = [(grove.fresh[i], a, b) for i, a, b in (whole if pieces is None else pieces)]
    q, plan = grove.prefill(chosen)
    k, v = (cells.transpose(0, 1).contiguous() for cells in grove.caches)
    generator = torch.Generator().manual_seed(len(q))
    d_o = torch.randn(*q.shape[:2], shape.v_head_dim, generator=generator)
    grad = torch.randn(q.shape[:2], generator=generator) if d_lse else None
    mask = visible(grove, chosen, len(k), options.window)
    unseen = ~visible(grove, chosen, len(k), None).any(0)
    for cells in (k, v):
        cells[unseen.to(device)] = float("nan")
    d_lse_too = None if grad is None else grad.to(device)
    return Problem(q, k, v, d_o.to(q), d_lse_too, plan, mask, options)


def visible(
    grove: Grove, pieces: Sequence[tuple[Node, int, int]], num_cells: int, window: int | None
) -> Tensor:
    """(T, N) bool: each query sees the tokens of its own path, up to itself."""
    rows = []
    for node, first, stop in pieces:
        cells = grove.cells_to(node, stop)
        seen = torch.zeros(stop - first, num_cells, dtype=torch.bool)
        seen[:, cells] = causal_mask(stop - first, len(cells), window)
        rows.append(seen)
    return torch.cat(rows)
