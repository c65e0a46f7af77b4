"""Properties of forest attention in Triton over forests that hypothesis draws."""

import pytest

pytest.importorskip("hypothesis")  # machines with a GPU may lack it

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.forest import decode_tiles
from kernels.forest_attention import AttentionOptions, ForestPlan, forest_attention
from tests.forests import Grove, Sample, Segment, Shape
from tests.oracles.attention import Tolerance
from tests.triton_device import DEVICE, DTYPES, on_triton

pytestmark = on_triton

LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 255, 256, 257]))
GENERATED = st.one_of(st.integers(0, 20), st.sampled_from([255, 256, 257]))
OPTIONS = st.builds(
    AttentionOptions,
    st.sampled_from([0.1, 0.35]),
    st.sampled_from([None, 30.0]),
    st.sampled_from([None, 1, 37, 255, 300]),
)


@st.composite
def forests(draw: st.DrawFn) -> list[Sample]:
    """Up to 4 segments in trees of 1 to 3 levels, and samples that end at any of them."""
    prompts: list[tuple[Segment, ...]] = []
    for name in range(draw(st.integers(1, 4))):
        parents = [(), *(prompt for prompt in prompts if len(prompt) < 3)]
        prompts.append((*draw(st.sampled_from(parents)), (name, draw(LENGTHS))))
    ends = draw(st.lists(st.sampled_from(prompts), min_size=1, max_size=5))
    return [Sample(100 + i, end, draw(GENERATED)) for i, end in enumerate(ends)]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    return Shape(
        kv_heads=1,
        groups=draw(st.integers(1, 5)),
        head_dim=draw(st.sampled_from([2, 16, 24])),
        v_head_dim=draw(st.sampled_from([1, 16, 20])),
        dtype=draw(st.sampled_from(DTYPES)),
    )


@given(forests(), shapes(), OPTIONS, st.integers(0, 60), st.booleans())
@settings(max_examples=14, suppress_health_check=[HealthCheck.too_slow])
def test_decode(
    samples: list[Sample], shape: Shape, options: AttentionOptions, weight: int, per_split: bool
) -> None:
    """Whatever is inlined and however partials are made."""
    grove = Grove(samples, shape, capacity=272, device=DEVICE)
    q, shared = grove.decode()
    tiles = decode_tiles(grove.ends, weight)
    plan = ForestPlan(tiles, shared.positions, shared.suffix, True, per_split)
    out = forest_attention(q, *grove.caches, plan, options)
    tolerance = Tolerance(shape.dtype)
    for i in range(len(samples)):
        tolerance.compare(out[i : i + 1], grove.sequence(i), options)
    tolerance.check()
    assert plan.executed == plan.num_tiles(options.window)


@given(forests(), shapes(), OPTIONS, st.booleans())
@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
def test_prefill(
    samples: list[Sample], shape: Shape, options: AttentionOptions, per_split: bool
) -> None:
    """What is not yet written is NaN."""
    grove = Grove(samples, shape, written=False, device=DEVICE)
    q, plan = grove.prefill(grove.whole(), per_split)
    out = forest_attention(q, *grove.caches, plan, options)
    tolerance = Tolerance(shape.dtype)
    for node, first, stop in grove.whole():
        tolerance.compare(out[: stop - first], grove.attend_to(node, stop), options)
        out = out[stop - first :]
    tolerance.check()
