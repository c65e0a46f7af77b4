"""Forest attention over forests that hypothesis draws: every query as over its own sequence."""

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.forest_attention import AttentionOptions, forest_attention_ref
from kernels.launch import INTERPRETED
from tests.forests import Grove, Sample, Segment, Shape
from tests.implementations import DTYPES, Implementation, assert_exact
from tests.oracles.attention import over_sequences
from tests.rows import num_threads
from tests.spec.test_forest_attention import check_decode, check_prefill, cut, pieces_of

EDGES = [63, 64, 65, 255, 256, 257, 300]
LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from(EDGES))
GENERATED = st.one_of(st.integers(0, 40), st.sampled_from([255, 256, 257, 300]))


@st.composite
def forests(draw: st.DrawFn, most: int = 3 if INTERPRETED else 5) -> list[Sample]:
    """Some segments in trees of 1 to 4 levels, and samples that end at any of them."""
    prompts: list[tuple[Segment, ...]] = []
    for name in range(draw(st.integers(1, most))):
        parents = [(), *(prompt for prompt in prompts if len(prompt) < 4)]
        prompts.append((*draw(st.sampled_from(parents)), (name, draw(LENGTHS))))
    ends = draw(st.lists(st.sampled_from(prompts), min_size=3, max_size=most + 2))
    return [Sample(100 + i, end, draw(GENERATED)) for i, end in enumerate(ends)]


@st.composite
def shapes(draw: st.DrawFn, *dtypes: torch.dtype) -> Shape:
    """Heads that fill a vector of C++, or the rows of a Triton program, in part and more."""
    return Shape(
        kv_heads=draw(st.integers(1, 2)),
        groups=draw(st.sampled_from([1, 2, 3, 5, 17])),
        head_dim=draw(st.sampled_from([2, 8, 16, 20, 32])),
        v_head_dim=draw(st.sampled_from([1, 8, 16, 20, 40])),
        dtype=draw(st.sampled_from(dtypes)),
    )


@st.composite
def options_for(draw: st.DrawFn, shape: Shape) -> AttentionOptions:
    """Scores of a standard deviation of 0.6 or 1.5: larger ones multiply their rounding errors."""
    scale = draw(st.sampled_from([0.2, 0.5])) / math.sqrt(shape.head_dim)
    softcap = draw(st.sampled_from([None, 3.0]))
    return AttentionOptions(scale, softcap, draw(st.sampled_from([None, 1, 2, 37, 255, 300, 5000])))


@given(st.data(), forests(most=3), shapes(torch.float64))
@settings(max_examples=12)
def test_reference_is_attention_over_each_own_sequence(
    data: st.DataObject, samples: list[Sample], shape: Shape
) -> None:
    options = data.draw(options_for(shape))
    decode, prefill = Grove(samples, shape, capacity=300), Grove(samples, shape, written=False)
    whole = prefill.whole()
    for grove, (q, plan), sequences in (
        (decode, decode.decode(), [(1, decode.cells_of(i)) for i in range(len(samples))]),
        (prefill, prefill.prefill(whole), pieces_of(prefill, whole)),
    ):
        results = forest_attention_ref(q, *grove.caches, plan, options)
        assert_exact(results, over_sequences(sequences, options), q, *grove.caches)


@given(st.data(), forests(), st.booleans(), st.integers(0, 60), st.sampled_from([100, 4096]))
@settings(
    max_examples=6 if INTERPRETED else 20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_decode_and_prefill(
    on: Implementation,
    data: st.DataObject,
    samples: list[Sample],
    per_split: bool,
    keys_per_partial: int,
    tokens: int,
) -> None:
    """Decode in any blocks, whatever is inlined and however partials are made. Prefill in forwards
    that cut nodes anywhere; what is not yet prefilled is NaN."""
    shape = data.draw(shapes(*DTYPES[on.name]))
    options = data.draw(options_for(shape))
    grove = Grove(samples, shape, capacity=300, seed=len(samples), device=on.device)
    forward = grove.decode(per_split=per_split, keys_per_partial=keys_per_partial)
    fresh = Grove(samples, shape, written=False, device=on.device)
    with num_threads(data.draw(st.sampled_from([1, 2]))):
        check_decode(on, grove, forward, options)
        parts = cut(fresh.fresh, tokens)
        rows = [check_prefill(on, fresh, pieces, options, per_split) for pieces in parts]
    assert sum(map(len, rows)) == fresh.tree_tokens
