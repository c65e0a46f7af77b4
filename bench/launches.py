"""Calls of every operation that a user's model and options can lead to, for a shape.

An operation is one generator of labelled calls in `OPERATIONS`. Calls are made on tensors without
contents while launches are intercepted (`bench/aot.py`): what matters of them is types, sizes and
alignment. Small tensors whose contents are looked at have some.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import product

import torch
from torch import Tensor

from bench.forests import Heads, Tree, Workload, make_decode, make_prefill
from bench.shapes import Shape
from bench.timing import DEVICE
from kernels.accept_token import LiveSamples, Records, accept_token
from kernels.extract_scores import ScoreAutomaton
from kernels.forest_attention import AttentionOptions, forest_attention
from kernels.forest_attention.plan import ForestPlan
from kernels.forest_attention.triton_backward import run_backward
from kernels.gated_act import gated_act, gated_act_backward
from kernels.logprob import linear_logprob
from kernels.logprob.linear_policy_loss import linear_policy_loss
from kernels.logprob.policy_loss import PolicyLossOptions
from kernels.matmul import matmul
from kernels.merge_states import merge_states
from kernels.rms_norm import rms_norm, rms_norm_backward
from kernels.rope import rope, rope_backward
from kernels.sample_token import SamplingOptions, sample_token, uniforms
from kernels.segment_attention import segment_attention
from kernels.write_kv import write_kv

Calls = Iterator[tuple[str, Callable[[], object]]]

DECODE_ROWS = (1, 16, 64, 128)
PREFILL_ROWS = (2048,)
# Live samples are padded for the model only: any number of them is drawn for.
BATCHES = (1, 33, 64, 128)
_MAX_SCORES = 8


def dtypes_of(shape: Shape) -> tuple[torch.dtype, ...]:
    """Both half types, and float32 where a model is small enough for it."""
    halves = (torch.bfloat16, torch.float16)
    return (*halves, torch.float32) if shape.hidden_size <= 1024 else halves


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def _int64(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=DEVICE)


def _each(shape: Shape) -> Iterator[tuple[str, torch.dtype, int]]:
    """A label for every dtype and number of rows."""
    for dtype in dtypes_of(shape):
        for rows in DECODE_ROWS + PREFILL_ROWS:
            yield f"{rows} rows, {dtype}", dtype, rows


def rms_norm_calls(shape: Shape) -> Calls:
    """Of hidden states, with residuals of their dtype or in float32, and of heads; gradients with
    and without those of the weight."""
    for label, dtype, rows in _each(shape):
        x = _empty(rows, shape.hidden_size, dtype=dtype)
        weight = _empty(shape.hidden_size, dtype=dtype)
        norm = partial(rms_norm, x, weight, 1e-6, shape.norm_plus_one)
        yield label, norm
        yield from _rms_norm_backward_calls(label, x, weight, shape.norm_plus_one)
        for wider in {dtype, torch.float32}:
            label_too, total = f"{label} + {wider}", x.to(wider)
            yield label_too, partial(norm, residual=total)
            yield from _rms_norm_backward_calls(
                label_too, total, weight, shape.norm_plus_one, dtype
            )
        if shape.qk_norm:
            for part, heads in zip("qk", _slices(shape, rows, dtype), strict=False):
                weight = _empty(shape.head_dim, dtype=dtype)
                yield f"{label}, {part}", partial(rms_norm, heads, weight, 1e-6)
                yield from _rms_norm_backward_calls(f"{label}, {part}", heads, weight, False)


def _rms_norm_backward_calls(
    label: str, total: Tensor, weight: Tensor, plus_one: bool, added_to: torch.dtype | None = None
) -> Calls:
    """added_to: the dtype of x, where `total` is its sum with a residual of the sum's dtype."""
    grad = torch.empty_like(total, memory_format=torch.contiguous_format)
    rstd = _empty(*total.shape[:-1], 1, dtype=torch.float32)
    residual = added_to is not None
    for weight_grad in (False, True):
        yield (
            f"{label}, backward",
            partial(
                rms_norm_backward, grad, grad if residual else None, total, weight, rstd, plus_one,
                added_to or total.dtype, total.dtype if residual else None, weight_grad,
            ),
        )  # fmt: skip


def _slices(shape: Shape, rows: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values as slices of one projection."""
    sizes = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    return list(_empty(rows, sum(sizes), shape.head_dim, dtype=dtype).split(sizes, 1))


def rope_calls(shape: Shape) -> Calls:
    """Queries and keys as slices, and as norms leave them; and gradients."""
    for label, dtype, rows in _each(shape):
        cos, sin = _empty(2, rows, shape.head_dim // 2, dtype=torch.float32).unbind()
        for x in _slices(shape, rows, dtype)[:2]:
            yield label, partial(rope, x, cos, sin)
            yield label, partial(rope, x.contiguous(), cos, sin)
            backward = partial(rope_backward, x.contiguous(), cos, sin)
            yield f"{label}, backward", backward


def gated_act_calls(shape: Shape) -> Calls:
    """The model's activation, and its gradients."""
    for label, dtype, rows in _each(shape):
        gate_up = _empty(rows, 2 * shape.intermediate_size, dtype=dtype)
        grad = _empty(rows, shape.intermediate_size, dtype=dtype)
        yield label, partial(gated_act, gate_up, shape.activation)
        yield f"{label}, backward", partial(gated_act_backward, grad, gate_up, shape.activation)


def matmul_calls(shape: Shape) -> Calls:
    """Every product of the decoder, of queries, keys and values with a bias too."""
    for label, dtype, rows in _each(shape):
        for name, (size, summed) in shape.products.items():
            x, weight = _empty(rows, summed, dtype=dtype), _empty(size, summed, dtype=dtype)
            yield f"{label}, {name}", partial(matmul, x, weight)
            if name == "qkv_proj":
                bias = _empty(size, dtype=dtype)
                yield f"{label}, {name} + bias", partial(matmul, x, weight, bias)


def linear_logprob_calls(shape: Shape) -> Calls:
    """With and without gradients, of hidden and weight, and the policy loss of tokens and of
    sequences."""
    for dtype in dtypes_of(shape):
        for rows in (1, 2048):
            x, w = (
                _empty(size, shape.hidden_size, dtype=dtype) for size in (rows, shape.vocab_size)
            )
            target, row = _int64(rows), torch.zeros(rows, device=DEVICE)
            d_w = _empty(*w.shape, dtype=torch.float32)
            log_probs = partial(linear_logprob, x, w, target, shape.final_softcap)
            yield f"{rows} rows, {dtype}", log_probs
            for sums in (("logp",), ("logp", "entropy", "lse")):
                yield f"{rows} rows, {dtype}, backward", partial(_backward, log_probs, sums, x)
            for level in ("token", "sequence"):
                loss = partial(
                    linear_policy_loss, x, w, target, row, row, PolicyLossOptions(level=level),
                    lengths=target + 1, softcap=shape.final_softcap, weight_grad=d_w,
                )  # fmt: skip
                yield (
                    f"{rows} rows, {dtype}, policy loss by {level}",
                    partial(_backward, loss, ("loss",), x),
                )


def _backward(forward: Callable[[], object], sums: tuple[str, ...], x: Tensor) -> None:
    """The gradient of x of the sum of some results, in inference mode too."""
    with torch.inference_mode(False), torch.enable_grad():
        x.requires_grad_()
        found = forward()
        torch.autograd.grad(sum(getattr(found, name).sum() for name in sums), x)


def write_kv_calls(shape: Shape) -> Calls:
    """Keys as rope leaves them, values as a slice."""
    for label, dtype, rows in _each(shape):
        _, k, v = _slices(shape, rows, dtype)
        to_k, to_v = _empty(2, shape.num_kv_heads, 4096, shape.head_dim, dtype=dtype).unbind()
        slots = torch.arange(rows, device=DEVICE)
        yield label, partial(write_kv, k.contiguous(), v, to_k, to_v, slots)


def merge_states_calls(shape: Shape) -> Calls:
    """Partials into float32, and into the model's dtype."""
    for label, dtype, rows in _each(shape):
        o = _empty(4 * rows, shape.num_heads, shape.head_dim, dtype=torch.float32)
        merge = partial(merge_states, o, o[..., 0].contiguous(), _int64(rows, 4))
        yield label, merge
        yield label, partial(merge, dtype)


def forest_attention_calls(shape: Shape) -> Calls:
    """Decode on trees of two and three levels and without sharing, free and with one partial for
    every split, and prefill; with the model's soft-cap, with and without its window."""
    for dtype in dtypes_of(shape):
        for window in {None, shape.window}:
            heads = replace(Heads.of(shape, window), dtype=dtype)
            for name, work in _workloads(heads):
                for per_split in (False, True):
                    work.plan.per_split = per_split
                    label = f"{name}, {heads.describe()}{', per split' if per_split else ''}"
                    yield label, partial(_attend, work, per_split)


def forest_attention_backward_calls(shape: Shape) -> Calls:
    """Gradients of a sequence and of short branches, with and without those of log-sum-exps."""
    for dtype in dtypes_of(shape):
        for window in {None, shape.window}:
            heads = replace(Heads.of(shape, window), dtype=dtype)
            for tree in (Tree((1,), (2048,)), Tree((1, 4), (512, 20))):
                work = make_prefill(tree, heads, 1, filled=False)
                q = work.queries[0]
                lse = _empty(*q.shape[:2], dtype=torch.float32)
                for d_lse in (None, lse):
                    label = f"{sum(tree.tokens)} tokens, {heads.describe()}"
                    yield label, partial(_attend_backward, work, lse, d_lse)


def _attend_backward(work: Workload, lse: Tensor, d_lse: Tensor | None) -> None:
    q, k, v = work.queries[0], work.k[0], work.v[0]
    plan, options = _recompiled(work.plan), work.heads.options
    run_backward(q, k, v, q, lse, q, d_lse, plan, options)


def _recompiled(plan: ForestPlan, per_split: bool = False) -> ForestPlan:
    """A plan without what it was compiled to: that depends on the target, which changes here."""
    return ForestPlan(plan.tiles, plan.positions, plan.suffix, plan.advancing, per_split)


def _workloads(heads: Heads) -> Iterator[tuple[str, Workload]]:
    for rows in DECODE_ROWS:
        tree = Tree((1, rows), (2048, 512))
        yield f"decode, {tree.describe()}", make_decode(tree, heads, 1, filled=False)
    for tree in (Tree((1, 4, 64), (512, 300, 40)), Tree((16, 16), (700, 16))):
        yield f"decode, {tree.describe()}", make_decode(tree, heads, 1, filled=False)
    for rows in PREFILL_ROWS:
        prefill = make_prefill(Tree((1,), (rows,)), heads, 1, filled=False)
        yield f"prefill of {rows}", prefill
    branches = make_prefill(Tree((1, 4), (512, 20)), heads, 1, filled=False)
    yield "prefill of short branches", branches


def _attend(work: Workload, per_split: bool) -> Tensor:
    plan = _recompiled(work.plan, per_split)
    return forest_attention(work.queries[0], work.k[0], work.v[0], plan, work.heads.options)


def segment_attention_calls(shape: Shape) -> Calls:
    """Long and short segments, over themselves and over a prefix; slices of one projection."""
    for dtype in dtypes_of(shape):
        for pairs, queries, keys in ((1, 2048, 2048), (4, 20, 20), (2, 100, 700), (16, 1, 300)):
            q = _slices(shape, pairs * queries, dtype)[0]
            _, k, v = _slices(shape, pairs * keys, dtype)
            offsets = ([size * i for i in range(pairs + 1)] for size in (queries, keys))
            cu_seqlens_q, cu_seqlens_k = offsets
            for causal in (False, True):
                window = shape.window if causal else None
                options = AttentionOptions(shape.head_dim**-0.5, shape.softcap, window)
                yield (
                    f"{pairs} x {queries} over {keys}, {dtype}",
                    partial(
                        segment_attention, q, k, v, cu_seqlens_q, cu_seqlens_k, options, causal
                    ),
                )  # fmt: skip


OPTIONS = (
    SamplingOptions(temperature=0),
    SamplingOptions(temperature=0.5),
    SamplingOptions(temperature=1),
    SamplingOptions(temperature=0.5, top_k=50),
    SamplingOptions(temperature=0.5, top_p=0.95),
    SamplingOptions(temperature=0.5, min_p=0.05),
    SamplingOptions(temperature=0.5, top_k=50, top_p=0.95, min_p=0.05),
)


def sample_token_calls(shape: Shape) -> Calls:
    """Uniforms of a step and of a block of steps; greedy, plain and with every filter."""
    for batch in BATCHES:
        for positions in (_int64(batch), _int64(batch, 8)):
            yield f"{batch} rows", partial(uniforms, _int64(batch, 2), _int64(batch), positions)
        for dtype in {*dtypes_of(shape), torch.float32}:
            logits = _empty(batch, shape.vocab_size, dtype=dtype)
            uniform = _empty(batch, dtype=torch.float32)
            for options in OPTIONS:
                label = f"{batch} rows, {dtype}, {options}"
                yield label, partial(sample_token, logits, uniform, options, shape.final_softcap)


@cache
def _automaton(anchor: str | None) -> ScoreAutomaton:
    texts = [bytes([byte]) for byte in range(256)]
    return ScoreAutomaton(texts, [0], anchor, 1, 10, DEVICE)


def accept_token_calls(shape: Shape) -> Calls:
    """In decode and after prefill; with no, one and more end tokens."""
    automaton = _automaton("Scores:")
    for batch, ends, stop_at_box, moves in product(
        BATCHES, (0, 1, 2), (False, True), (False, True)
    ):
        scores = automaton.start(_int64(batch), _MAX_SCORES)
        live = LiveSamples.start(_int64(batch) + 9, _int64(batch), scores)
        logprob = _empty(batch, dtype=torch.float32)
        records = Records.empty(batch, 1024, DEVICE)
        padded = -(-batch // 16) * 16
        cursor = (_int64(padded), _int64(padded), _int64(padded)) if moves else None
        yield (
            f"{batch} rows, {ends} end tokens",
            partial(
                accept_token, live, records, _int64(batch), logprob, logprob, automaton,
                _int64(ends), stop_at_box, cursor,
            ),
        )  # fmt: skip


OPERATIONS: dict[str, Callable[[Shape], Calls]] = {
    "rms_norm": rms_norm_calls,
    "rope": rope_calls,
    "gated_act": gated_act_calls,
    "matmul": matmul_calls,
    "linear_logprob": linear_logprob_calls,
    "write_kv": write_kv_calls,
    "forest_attention": forest_attention_calls,
    "forest_attention backward": forest_attention_backward_calls,
    "segment_attention": segment_attention_calls,
    "merge_states": merge_states_calls,
    "sample_token": sample_token_calls,
    "accept_token": accept_token_calls,
}
