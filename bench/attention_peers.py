"""Other attention on the same keys and values: torch's, our own without sharing, other libraries'.

Without sharing every sequence has a copy of its own of all its keys and values; the copies hold
what the shared workload holds. FlashInfer, flash-attn and xformers are measured where they are
installed and the device is a GPU. Peers copy into the layout that they want before they are timed.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Peer, Peers, calls_on
from bench.forests import Heads, Tree, Workload, make_decode, make_prefill
from bench.timing import DEVICE, ON_GPU, Call, empty, num_sets
from kernels.forest_attention import forest_attention
from models.transformer import causal_attend

_EVERYTHING = 1 << 40  # a window that hides nothing
_PAGE = 16  # tokens of a page of FlashInfer
_WORKSPACE = 256 << 20  # bytes, for FlashInfer
_EAGER_SCORES = 1 << (28 if ON_GPU else 24)


def decode_peers(tree: Tree, work: Workload) -> Peers:
    """Peers of a decode step."""
    heads = work.heads
    shared = tree.nodes[0] < tree.samples and tree.suffix > 0

    @cache
    def dense() -> list[tuple[Tensor, Tensor, Tensor]]:
        return _dense(work, torch.stack([work.slots_of(i) for i in range(tree.samples)]))

    peers: dict[str, Peer | str] = {
        "eager": Peer(lambda: calls_on(lambda *x: _eager_decode(heads, *x), dense())),
        "sdpa": "has no soft-cap",
        "unshared": "nothing is shared",
    }
    if heads.softcap is None:
        peers["sdpa"] = Peer(lambda: calls_on(lambda *x: _sdpa_decode(heads, *x), dense()))
    if shared:
        peers["unshared"] = Peer(lambda: _unshared_decode(tree, work))
    third: dict[str, tuple[str, Callable[[], Sequence[Call]], str | None]] = {
        "flashinfer cascade": (
            "flashinfer",
            lambda: _flashinfer_cascade(tree, work),
            _no_cascade(tree, heads),
        ),
        "flash-attn": (
            "flash_attn",
            lambda: calls_on(lambda *x: _flash_attn_decode(heads, *x), _token_major(dense())),
            None,
        ),
        "xformers": (
            "xformers",
            lambda: _xformers_decode(heads, _token_major(dense())),
            None if heads.softcap is None else "has no soft-cap",
        ),
    }
    return peers | _third_party(heads, third)


def _no_cascade(tree: Tree, heads: Heads) -> str | None:
    if heads.window is not None:
        return "has no window over levels"
    return None if tree.suffix else "nothing is generated"


def prefill_peers(tree: Tree, work: Workload) -> Peers:
    """Peers of a prefill: whole sequences, each as long as a path of the tree."""
    heads = work.heads
    length = sum(tree.tokens)
    slots = torch.stack([work.slots_of(i, _EVERYTHING) for i in _last_queries(tree)])  # (S, L)

    @cache
    def sequences() -> list[tuple[Tensor, Tensor, Tensor]]:
        rows = _inverse(work, _query_slots(work))[slots]  # (S, L)
        return [
            (q[rows].transpose(1, 2), k, v)  # (S, Hq, L, D), (S, Hkv, L, D)
            for q, k, v in _dense(work, slots)
        ]

    def as_ours(out: Any) -> Tensor:
        """Results (S, L, Hq, D) of whole sequences, each node's once, in the order of the tree."""
        return out.flatten(0, 1)[_inverse(work, slots.flatten())[_query_slots(work)]]

    capped, windowed = heads.softcap is not None, (heads.window or length) < length
    peers: dict[str, Peer | str] = {
        "eager": Peer(lambda: _eager_prefill(heads, sequences()), as_ours=as_ours),
        "sdpa": "has no soft-cap" if capped else "has no window",
        "unshared": "nothing is shared",
    }
    if not capped and not windowed:
        peers["sdpa"] = Peer(
            lambda: calls_on(lambda *x: _sdpa_prefill(heads, *x), sequences()), as_ours=as_ours
        )
    if tree.samples > 1:
        flat = Tree((tree.samples,), (length,))
        peers["unshared"] = Peer(
            lambda: _unshared_prefill(flat, heads, sequences()),
            as_ours=lambda out: as_ours(out.unflatten(0, (tree.samples, length))),
        )
    third: dict[str, tuple[str, Callable[[], Sequence[Call]], str | None]] = {
        "flashinfer": (
            "flashinfer",
            lambda: _flashinfer_prefill(heads, sequences()),
            None if tree.samples == 1 else "one sequence only",
        ),
        "flash-attn": (
            "flash_attn",
            lambda: calls_on(lambda *x: _flash_attn_prefill(heads, *x), _token_major(sequences())),
            None,
        ),
        "xformers": (
            "xformers",
            lambda: _xformers_prefill(heads, _token_major(sequences())),
            "has no soft-cap" if capped else "has no window" if windowed else None,
        ),
    }
    return peers | _third_party(heads, third, as_ours)


def _third_party(
    heads: Heads,
    libraries: dict[str, tuple[str, Callable[[], Sequence[Call]], str | None]],
    as_ours: Callable[[Any], object] | None = None,
) -> dict[str, Peer | str]:
    """Libraries by (module, calls, why not)."""
    peers: dict[str, Peer | str] = {}
    for name, (module, make, reason) in libraries.items() if ON_GPU else ():
        if find_spec(module) is None:
            peers[name] = "not installed"
        else:
            if heads.head_dim > 256:
                reason = "has at most 256 channels"
            peers[name] = reason or Peer(make, third_party=True, as_ours=as_ours)
    return peers


def _dense(work: Workload, at: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries as they are, and copies (S, Hkv, L, D) of the cells (S, L) that S sequences see."""
    count = min(len(work.k), num_sets(at.numel() * work.heads.cell_bytes))

    def copies(cells: Tensor) -> Tensor:
        return cells[:, at].transpose(0, 1).contiguous()

    layers = list(zip(work.queries, work.k, work.v, strict=True))[:count]
    return [(q, copies(k), copies(v)) for q, k, v in layers]


def _token_major(
    sets: list[tuple[Tensor, Tensor, Tensor]],
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Heads next to channels: (S, L, H, D), contiguous; queries of a decode step (S, 1, H, D)."""
    return [
        (
            q[:, None] if q.ndim == 3 else q.transpose(1, 2).contiguous(),
            k.transpose(1, 2).contiguous(),
            v.transpose(1, 2).contiguous(),
        )
        for q, k, v in sets
    ]


# -- gradients -----------------------------------------------------------------------------------


def sdpa_backward(work: Workload, grads: Sequence[Tensor]) -> Peer:
    """The gradients of torch's attention of one whole sequence from those of its output."""
    slots = _query_slots(work)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def make() -> Sequence[Call]:
        calls = []
        for q, k, v, d_o in zip(work.queries, work.k, work.v, grads, strict=True):
            tensors = (q.transpose(0, 1), k[:, slots], v[:, slots], d_o.transpose(0, 1))
            *leaves, d_out = (x.contiguous().clone()[None].requires_grad_() for x in tensors)
            out = _sdpa_prefill(work.heads, *leaves).transpose(1, 2)
            calls.append(
                partial(torch.autograd.grad, out, leaves, d_out.detach(), retain_graph=True)
            )
        return calls

    def as_ours(out: Any) -> tuple[Tensor, ...]:
        found = [torch.zeros_like(work.k[0]) for _ in range(2)]
        for cells, grad in zip(found, out[1:], strict=True):
            cells[:, slots] = grad[0]
        return out[0][0].transpose(0, 1), *found

    # Backward runs on the stream of its forward, which is not the one that is captured.
    return Peer(make, as_ours=as_ours, capture=False)


def unshared_gradients(
    tree: Tree,
    work: Workload,
    grads: Sequence[Tensor],
    run: Callable[..., tuple[Tensor, ...]],
) -> Peer:
    """Our own forward and backward, `run(work, layer, d_o)`, of the same sequences, each with a
    prompt of its own."""
    slots = torch.stack([work.slots_of(i, _EVERYTHING) for i in _last_queries(tree)]).flatten()
    rows = _inverse(work, _query_slots(work))[slots]
    alone = make_prefill(Tree((tree.samples,), (sum(tree.tokens),)), work.heads, len(work.k), empty)
    cells = _query_slots(alone)

    def make() -> Sequence[Call]:
        for layer, q in enumerate(work.queries):
            alone.queries[layer] = q[rows]
            alone.k[layer][:, cells] = work.k[layer][:, slots]
            alone.v[layer][:, cells] = work.v[layer][:, slots]
        return [partial(run, alone, layer, d_o[rows]) for layer, d_o in enumerate(grads)]

    def as_ours(out: Any) -> tuple[Tensor, ...]:
        d_q, *of_cells = (x.float() for x in out)
        summed = [torch.zeros_like(x, dtype=torch.float32) for x in (work.k[0], work.v[0])]
        for total, grad in zip(summed, of_cells, strict=True):
            total.index_add_(1, slots, grad[:, cells])
        d_query = torch.zeros_like(work.queries[0], dtype=torch.float32).index_add_(0, rows, d_q)
        return tuple(x.to(work.heads.dtype) for x in (d_query, *summed))

    return Peer(make, as_ours=as_ours)


# -- torch ---------------------------------------------------------------------------------------


def _eager_decode(heads: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two products and a softmax; q (S, Hq, D), k and v (S, Hkv, L, D)."""
    grouped = q.unflatten(1, (heads.num_kv_heads, -1))
    scores = (grouped @ k.transpose(2, 3)) * heads.scale
    if heads.softcap is not None:
        scores = torch.tanh(scores / heads.softcap) * heads.softcap
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return (weights @ v).flatten(1, 2)


def _sdpa_decode(heads: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, scale=heads.scale, enable_gqa=True)
    return out[:, :, 0]


def _eager_prefill(heads: Heads, sets: list[tuple[Tensor, Tensor, Tensor]]) -> Sequence[Call]:
    attend = causal_attend(heads.config(1), _EAGER_SCORES)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        every = zip(q, k, v, strict=True)
        return torch.stack([attend(0, *(x.transpose(0, 1) for x in one)) for one in every])

    return calls_on(run, sets)


def _sdpa_prefill(heads: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=heads.scale, enable_gqa=True
    )
    return out.transpose(1, 2)


# -- our own without sharing ---------------------------------------------------------------------


def _unshared_decode(tree: Tree, work: Workload) -> Sequence[Call]:
    apart = tree.unshared()
    count = min(len(work.k), num_sets(apart.num_tokens * work.heads.cell_bytes))
    alone = make_decode(apart, work.heads, count, empty)
    source, target = (
        torch.cat([each.slots_of(i, _EVERYTHING) for i in range(tree.samples)])
        for each in (work, alone)
    )
    for layer in range(count):
        alone.queries[layer] = work.queries[layer]
        alone.k[layer][:, target] = work.k[layer][:, source]
        alone.v[layer][:, target] = work.v[layer][:, source]
    return calls_on(forest_attention, map(alone.arguments, range(len(alone.k))))


def _unshared_prefill(
    flat: Tree, heads: Heads, sets: list[tuple[Tensor, Tensor, Tensor]]
) -> Sequence[Call]:
    alone = make_prefill(flat, heads, len(sets), empty)
    slots = _query_slots(alone)
    for layer, (q, k, v) in enumerate(sets):
        alone.queries[layer] = q.transpose(1, 2).flatten(0, 1).contiguous()
        alone.k[layer][:, slots] = k.transpose(0, 1).flatten(1, 2)
        alone.v[layer][:, slots] = v.transpose(0, 1).flatten(1, 2)
    return calls_on(forest_attention, map(alone.arguments, range(len(alone.k))))


def _query_slots(work: Workload) -> Tensor:
    """In prefill, the cache slot of every query's own key."""
    found: dict[int, Tensor] = {}
    positions = work.plan.positions
    for span in work.spans:
        if int(positions[span.query]) == span.position:
            found[span.query] = torch.arange(span.slot, span.slot + span.keys, device=DEVICE)
    return torch.cat([found[query] for query in sorted(found)])


def _inverse(work: Workload, slots: Tensor) -> Tensor:
    """(N,) int64: where in `slots` each cache slot stands; one of them, if it does more than once;
    0 if nowhere."""
    places = torch.zeros(work.k[0].shape[1], dtype=torch.int64, device=DEVICE)
    places[slots] = torch.arange(len(slots), device=DEVICE)
    return places


def _last_queries(tree: Tree) -> list[int]:
    """In prefill, the row of the last token of every path, nodes lying depth-first."""
    last = []
    row = 0
    for leaf in range(tree.samples):
        for nodes, tokens in zip(tree.nodes, tree.tokens, strict=True):
            if leaf % (tree.samples // nodes) == 0:
                row += tokens
        last.append(row - 1)
    return last


# -- other libraries -----------------------------------------------------------------------------


def _flashinfer_cascade(tree: Tree, work: Workload) -> Sequence[Call]:
    """A level of the tree is a level of the cascade; nodes are runs of pages."""
    flashinfer = import_module("flashinfer")
    heads = work.heads
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(
        len(tree.nodes), torch.zeros(_WORKSPACE, dtype=torch.uint8, device=DEVICE), "NHD"
    )
    page = 0
    qo_indptr, kv_indptr, kv_indices, last_page_len = [], [], [], []
    source: list[Tensor] = []
    target: list[Tensor] = []
    whole = [work.slots_of(i, _EVERYTHING) for i in range(tree.samples)]
    starts = [0, *accumulate(tree.tokens)]
    for level, (nodes, tokens) in enumerate(zip(tree.nodes, tree.tokens, strict=True)):
        pages, below = -(-tokens // _PAGE), tree.samples // nodes
        qo_indptr.append(_int32(range(0, tree.samples + 1, below)))
        kv_indptr.append(_int32(range(0, nodes * pages + 1, pages)))
        kv_indices.append(_int32(range(page, page + nodes * pages)))
        last_page_len.append(_int32([(tokens - 1) % _PAGE + 1] * nodes))
        for node in range(nodes):
            source.append(whole[node * below][starts[level] : starts[level + 1]])
            first = (page + node * pages) * _PAGE
            target.append(torch.arange(first, first + tokens, device=DEVICE))
        page += nodes * pages
    wrapper.plan(
        qo_indptr, kv_indptr, kv_indices, last_page_len,
        heads.num_heads, heads.num_kv_heads, heads.head_dim, _PAGE,
        sm_scale=heads.scale, logits_soft_cap=heads.softcap,
        q_data_type=heads.dtype, kv_data_type=heads.dtype,
    )  # fmt: skip
    at, to = torch.cat(source), torch.cat(target)
    sets = []
    for q, *kv in zip(work.queries, work.k, work.v, strict=True):
        shape = (page * _PAGE, heads.num_kv_heads, heads.head_dim)
        pair = [torch.zeros(shape, dtype=heads.dtype, device=DEVICE) for _ in kv]
        for pages_of, cells in zip(pair, kv, strict=True):
            pages_of[to] = cells[:, at].transpose(0, 1)
        sets.append((q, tuple(x.unflatten(0, (-1, _PAGE)) for x in pair)))
    return calls_on(wrapper.run, sets)


def _int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=DEVICE)


def _flashinfer_prefill(heads: Heads, sets: list[tuple[Tensor, Tensor, Tensor]]) -> Sequence[Call]:
    flashinfer = import_module("flashinfer")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flashinfer.single_prefill_with_kv_cache(
            q, k, v, causal=True, kv_layout="NHD", sm_scale=heads.scale,
            logits_soft_cap=heads.softcap,
            window_left=-1 if heads.window is None else heads.window - 1,
        )  # fmt: skip
        return out[None]

    return calls_on(run, [(q[0], k[0], v[0]) for q, k, v in _token_major(sets)])


def _flash_window(heads: Heads) -> tuple[int, int]:
    return (-1, -1) if heads.window is None else (heads.window - 1, 0)


def _flash_attn_decode(heads: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return import_module("flash_attn").flash_attn_with_kvcache(
        q, k, v, softmax_scale=heads.scale, causal=True, softcap=heads.softcap or 0.0,
    )[:, 0]  # fmt: skip


def _flash_attn_prefill(heads: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return import_module("flash_attn").flash_attn_func(
        q, k, v, softmax_scale=heads.scale, causal=True,
        window_size=_flash_window(heads), softcap=heads.softcap or 0.0,
    )  # fmt: skip


def _groups(heads: Heads, x: Tensor) -> Tensor:
    """(B, L, Hkv, D) as (B, L, Hkv, G, D), the group's heads sharing one."""
    group = heads.num_heads // heads.num_kv_heads
    return x[:, :, :, None].expand(-1, -1, -1, group, -1)


def _xformers_decode(heads: Heads, sets: list[tuple[Tensor, Tensor, Tensor]]) -> Sequence[Call]:
    fmha = import_module("xformers.ops.fmha")
    samples, length = sets[0][1].shape[:2]
    mask = fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * samples, kv_padding=length, kv_seqlen=[length] * samples
    ).to(DEVICE)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (_groups(heads, x.flatten(0, 1)[None]) for x in (k, v))
        query = q[:, 0].unflatten(1, (heads.num_kv_heads, -1))[None]
        out = fmha.memory_efficient_attention_forward(query, k, v, mask, scale=heads.scale)
        return out[0].flatten(1, 2)

    return calls_on(run, sets)


def _xformers_prefill(heads: Heads, sets: list[tuple[Tensor, Tensor, Tensor]]) -> Sequence[Call]:
    fmha = import_module("xformers.ops.fmha")
    mask = fmha.attn_bias.LowerTriangularMask()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query = q.unflatten(2, (heads.num_kv_heads, -1))
        out = fmha.memory_efficient_attention_forward(
            query, _groups(heads, k), _groups(heads, v), mask, scale=heads.scale
        )
        return out.flatten(2, 3)

    return calls_on(run, sets)
