"""Decode steps that are replayed: the same tokens as steps that the host launches one by one.

Under the interpreter a stand-in takes the place of the CUDA graph and runs the captured step again;
so all but the capture itself is tested without a GPU: buffers that stay, idle rows, padded plans.
"""

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import engine.generate as generate
from engine.decode import Decoder, GraphDecoder
from engine.generate import Generator, Group, GroupResult
from engine.kv_cache import cell_bytes
from kernels.extract_scores import ScoreAutomaton
from kernels.forest_attention import AttentionOptions
from kernels.sample_token import SamplingOptions
from kernels.score_grammar import ScoreRules
from models.transformer import Transformer
from tests.forests import make_config
from tests.implementations import Implementation

pytestmark = pytest.mark.triton
DEVICE = Implementation("triton").device

Step = Callable[[], None]
ENDS = (3, 9, 14, 21, 28, 33)

TWO = [2] * 64  # scores of each sample


def make_model(windows: tuple[int | None, ...] = (None, 20)) -> Transformer:
    config = replace(
        make_config(1, 16, 16, 2, layers=len(windows)),
        attention=tuple(AttentionOptions(0.25, None, window) for window in windows),
        vocab_size=40,
    )
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(1), std=0.3)
    return model.to(DEVICE).eval()


def make_groups(count: int, k: int, longest: int = 12) -> list[Group]:
    rng = random.Random(0)

    def segment() -> tuple[int, ...]:
        return tuple(rng.randrange(40) for _ in range(rng.randrange(1, longest)))

    head = segment()
    return [
        Group(
            [[head, conversation, tail] for tail in [segment() for _ in range(k)]], (i, 7), TWO, i
        )
        for i, conversation in enumerate([segment() for _ in range(count)])
    ]


def make_generator(model: Transformer, **options: Any) -> Generator:
    defaults: dict[str, Any] = {
        "options": SamplingOptions(1.0), "max_new_tokens": 7, "max_batch": 4, "max_scores": 2,
        "ignore_eos": True,
    }  # fmt: skip
    automaton = ScoreAutomaton([b"x"] * 40, [], ScoreRules(first=True), DEVICE)
    return Generator(model, automaton, **(defaults | options))


def sampled(generator: Generator, groups: list[Group], ends: tuple[int, ...] = ENDS) -> list:
    generator.decoder.end_ids = torch.tensor(ends, dtype=torch.int64, device=DEVICE)
    results: list[GroupResult] = sorted(generator.run(groups), key=lambda r: r.group.tag)
    return [
        [(g.token_ids, g.logprobs, g.sampling_logprobs, g.finish) for g in result.generations]
        for result in results
    ]


class Recorder:
    """A stand-in for a CUDA graph: what it captures is run again. It counts."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, step: Step) -> Step:
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            step()

        return replay


def replaying(model: Transformer, **options: Any) -> tuple[Generator, GraphDecoder, Recorder]:
    """A generator whose steps are captured by a stand-in, its decoder, and the stand-in."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "make_decoder", partial(GraphDecoder, capture=recorder))
        generator = make_generator(model, **options)
    assert isinstance(generator.decoder, GraphDecoder)
    return generator, generator.decoder, recorder


def check_replayed(
    model: Transformer, groups: list[Group], ends: tuple[int, ...] = (), **options: Any
) -> tuple[list, GraphDecoder, Recorder]:
    """Replayed steps give the samples of steps that the host launches: these, and what replayed.
    Both look one block late, as on a GPU: where Triton merges partials may depend on the live set,
    and with it the last bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "make_decoder", Decoder)
        launching = make_generator(model, **options)
    generator, decoder, recorder = replaying(model, **options)
    launching.ahead = generator.ahead = 1
    expected = sampled(launching, groups, ends)
    assert sampled(generator, groups, ends) == expected
    return expected, decoder, recorder


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 keys."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("kernels", "engine") and hasattr(module, "MAX_SPLIT"):
            monkeypatch.setattr(module, "MAX_SPLIT", 8)


def test_replayed_steps_give_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over live sets of several sizes, with samples that end one by one."""
    monkeypatch.setattr(generate, "SYNC_STEPS", 2)
    groups = make_groups(3, 2)
    expected, decoder, recorder = check_replayed(make_model((20,)), groups, ENDS)
    lengths = [len(tokens) for row in expected for tokens, *_ in row]
    assert min(lengths) < 4 and max(lengths) == 7
    # One bucket; captured again only where a plan needed more room.
    assert len(decoder._buckets) == 1 and recorder.captured <= 3
    assert recorder.replayed > 2 * recorder.captured


@pytest.mark.soak
@pytest.mark.usefixtures("short_splits")
def test_suffixes_that_come_to_new_splits() -> None:
    """With splits of 8 tokens: buckets of 1, 2 and 4 splits, and a plan made at each."""
    _, decoder, recorder = check_replayed(make_model((None,)), make_groups(1, 2), max_new_tokens=18)
    assert sorted(decoder._buckets) == [(16, 16), (16, 24)]
    assert recorder.captured == 2 and recorder.replayed == 17 - 2


@pytest.mark.soak
@pytest.mark.usefixtures("short_splits")
def test_a_block_ends_within_replayed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device goes on in the next block, which lies elsewhere, without the host."""
    seen = []
    run = GraphDecoder.run

    def watched(decoder: GraphDecoder, steps: int) -> None:
        before = decoder._cursor.cache_index[:2].tolist()
        run(decoder, steps)
        after = decoder._cursor.cache_index[:2].tolist()
        seen.append((steps, [b - a for a, b in zip(before, after, strict=True)]))
        for leaf in decoder.leaves:
            assert len(leaf.blocks) == 2 and leaf.blocks[1] != leaf.blocks[0] + 8

    monkeypatch.setattr(GraphDecoder, "run", watched)
    _, _, recorder = check_replayed(
        make_model((None,)), make_groups(1, 2), max_new_tokens=10, max_batch=2
    )
    (steps, moved), *_ = seen
    assert steps == 8 and all(step != 8 for step in moved)
    assert (recorder.captured, recorder.replayed) == (1, 8)


@pytest.mark.soak
@pytest.mark.usefixtures("products_in_order", "short_splits")
def test_samples_that_are_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys come back into other blocks, and steps that were captured before read them."""
    model, groups = make_model((None,)), make_groups(1, 3)
    options: dict[str, Any] = {"max_new_tokens": 20, "deterministic": True}
    expected = sampled(replaying(model, **options)[0], groups, ())
    cell = cell_bytes(model.config, torch.float32)
    generator, _, _ = replaying(model, **options, cache_bytes=(16 + 5 * 16 + 6 * 16) * cell)
    counts = []
    set_aside = generator._set_aside

    def counted(leaf: Any, waiting: Any) -> None:
        counts.append(leaf.count)
        set_aside(leaf, waiting)

    monkeypatch.setattr(generator, "_set_aside", counted)
    assert sampled(generator, groups, ()) == expected
    assert counts


def test_many_rows_take_a_power_of_two() -> None:
    """17 samples in 32 rows: idle rows have scratch cells of their own."""
    groups = make_groups(1, 17, longest=4)
    _, decoder, _ = check_replayed(
        make_model((None,)), groups, ENDS, max_new_tokens=2, max_batch=17
    )
    assert [rows for rows, _ in decoder._buckets] == [32]


# -- on a GPU alone --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("max_batch", [3, 40])
def test_captured_steps_give_the_same_samples(max_batch: int) -> None:
    """Real CUDA graphs, over several buckets and suffixes of several splits."""
    model, groups = make_model(), make_groups(12, 4, longest=300)
    options = {"max_new_tokens": 600, "max_batch": max_batch}
    expected = sampled(replaying(model, **options)[0], groups, (3,))
    generator = make_generator(model, **options)
    assert isinstance(generator.decoder, GraphDecoder) and generator.ahead == 1
    assert sampled(generator, groups, (3,)) == expected
    buckets = generator.decoder._buckets
    assert len({rows for rows, _ in buckets}) == (1 if max_batch == 3 else 3)
    assert all(bucket.replay is not None for bucket in buckets.values())
    # Device time of everything has been counted.
    assert generator.usage.decode_seconds > 0 and not generator._spans


@contextmanager
def synchronizing_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a plan, a live set or a block of steps either, once kernels are compiled."""
    model, groups = make_model(), make_groups(6, 4)
    generator = make_generator(model, max_batch=8)
    decoder = generator.decoder
    assert isinstance(decoder, GraphDecoder)
    sampled(generator, groups)  # captures
    guarded = []

    def guard(name: str) -> None:
        inner = getattr(decoder, name)

        def call(*arguments: object) -> object:
            guarded.append(name)
            with synchronizing_is_an_error():
                return inner(*arguments)

        monkeypatch.setattr(decoder, name, call)

    for name in ("load", "run", "poll", "forward", "draw"):
        guard(name)
    captured = {key: bucket.replay for key, bucket in decoder._buckets.items()}
    again = sampled(generator, groups)
    assert {key: bucket.replay for key, bucket in decoder._buckets.items()} == captured
    assert set(guarded) == {"load", "run", "poll", "forward", "draw"}
    assert len(again) == 6
    with pytest.raises(RuntimeError, match="synchroniz"), synchronizing_is_an_error():
        torch.ones(1, device=DEVICE).item()


BROKEN = """
import torch
from engine.decode import CudaGraphs

CudaGraphs()(lambda: torch.ones(1, device="cuda").item())
"""


@pytest.mark.gpu
def test_what_cannot_be_captured_is_an_error() -> None:
    """In a process of its own: after a capture that broke off, torch's allocator and current stream
    are those of the capture."""
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True)
    assert done.returncode == 1
    assert "RuntimeError: the decode step cannot be captured as a CUDA graph" in done.stderr
