"""The oracle of attention's gradients: one dense softmax over all cells of a cache with an explicit
mask, and autograd. Who sees what is told from the sequences alone: it knows no plan."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.forest import Node
from kernels.forest_attention import forest_attention_with_lse
from kernels.forest_attention.plan import ForestPlan
from tests.forests import Grove, Options, Sample, Shape


@dataclass
class Problem:
    """Queries (T, Hq, D), keys and values (N, Hkv, ...) token by token, gradients of o and of lse
    (None: lse has none), a plan, and whether a query sees a cell: (T, N) bool. places: the queries
    and the cells of each segment, by its name."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_o: Tensor
    d_lse: Tensor | None
    plan: ForestPlan
    mask: Tensor
    options: Options
    places: dict[int, tuple[slice, slice]] = field(default_factory=dict)

    def inputs(self) -> list[Tensor]:
        """Fresh leaves."""
        return [x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The operation's o and lse, of `inputs`."""
        scale, softcap, window = self.options
        caches = k.transpose(0, 1), v.transpose(0, 1)
        return forest_attention_with_lse(q, *caches, self.plan, scale, softcap, window)

    def found(self) -> tuple[Tensor, ...]:
        """Gradients of the operation's."""
        inputs = self.inputs()
        return self._gradients(self.attend(*inputs), inputs)

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Those of dense attention in another dtype, on CPU."""
        inputs = [x.detach().cpu().nan_to_num().to(dtype).requires_grad_() for x in self.inputs()]
        q, k, v = inputs
        scale, softcap, _ = self.options
        return self._gradients(dense_attention(q, k, v, self.mask, scale, softcap), inputs)

    def _gradients(
        self, results: tuple[Tensor, Tensor], inputs: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        o, lse = results
        grads = [self.d_o.to(o)]
        if self.d_lse is not None:
            grads.append(self.d_lse.to(lse))
        return torch.autograd.grad(results[: len(grads)], inputs, grads)

    def check(self, found: Sequence[Tensor]) -> None:
        """The error against float64 is at most 4 times that of dense attention in the same dtype,
        and never held below 8 units in the last place of the largest gradient (in float64: 1e-10 of
        it)."""
        dtype = self.q.dtype
        unit = 1e-10 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
        exact, plain = self.dense(torch.float64), self.dense(dtype)
        largest = max(grad.abs().max().item() for grad in exact)
        for mine, its, exactly in zip(found, plain, exact, strict=True):
            assert mine.shape == exactly.shape and mine.dtype == dtype
            error, plain_error = (
                (x.double().cpu() - exactly).abs().max().item() for x in (mine, its)
            )
            assert error <= max(4 * plain_error, unit * largest), (error, plain_error, largest)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """o (T, Hq, Dv) and natural log-sum-exps (T, Hq); q (T, Hq, D), k and v (N, Hkv, ...)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("thd,nhd->htn", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    seen = mask.any(-1)
    lse = torch.where(seen, scores.where(seen[:, None], 0).logsumexp(-1), float("-inf"))
    weights = (scores - lse.where(seen, 0)[..., None]).exp()
    return torch.einsum("htn,nhe->the", weights, v), lse.T


def problem(
    samples: Sequence[Sample],
    shape: Shape,
    options: Options,
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
    mask = visible(chosen, len(k), options[2])
    nobodys = ~visible(chosen, len(k), None).any(0)
    for cells in (k, v):
        cells[nobodys.to(device)] = float("nan")
    places = {}
    row = 0
    for node, first, stop in chosen:
        assert node.slab is not None
        at = slice(node.slab.start + first, node.slab.start + stop)
        places[grove.names[node][0]] = slice(row, row + stop - first), at
        row += stop - first
    d_lse_too = None if grad is None else grad.to(device)
    return Problem(q, k, v, d_o.to(q), d_lse_too, plan, mask, options, places)


def visible(pieces: Sequence[tuple[Node, int, int]], num_cells: int, window: int | None) -> Tensor:
    """(T, N) bool: each query sees the tokens of its own path, up to itself."""
    rows = []
    for node, first, stop in pieces:
        key_at = torch.full((num_cells,), -1)
        for each in node.path():
            assert each.slab is not None
            cells = slice(each.slab.start, each.slab.start + len(each.token_ids))
            key_at[cells] = torch.arange(each.start, each.stop)
        at = torch.arange(node.start + first, node.start + stop)[:, None]
        seen = (key_at >= 0) & (key_at <= at)
        rows.append(seen if window is None else seen & (key_at > at - window))
    return torch.cat(rows)
