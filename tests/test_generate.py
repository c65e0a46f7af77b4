"""`Generator` on token ids: prefill and decode against transformers, joining and retiring."""

import random
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import engine.generate as generate
from engine.decode import Leaf
from engine.generate import Generation, Generator, Group, GroupResult
from kernels.accept_token import LiveSamples
from kernels.extract_scores import ScoreAutomaton
from kernels.sample_token import SamplingOptions
from kernels.score_grammar import ScoreRules
from models import load
from models.transformer import Transformer
from tests.rows import needs_cpp
from tests.tiny import DEEPSEEK, FAMILIES, VOCAB_SIZE, write_model

Prompt = list[tuple[int, ...]]
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}

TWO = [2] * 64  # scores of each sample


def make_generator(model: Transformer, **options: object) -> Generator:
    defaults: dict[str, object] = {
        "options": SamplingOptions(1.0),
        "max_new_tokens": 20,
        "max_batch": 16,
        "max_scores": 4,
        "ignore_eos": True,
    }
    vocab = model.config.vocab_size
    automaton = ScoreAutomaton([b"x"] * vocab, [], ScoreRules(first=True))
    return Generator(model, automaton, **(defaults | options))  # type: ignore[arg-type]


def make_groups(count: int, seed: int = 0, longest: int = 40, k: int = 3) -> list[Group]:
    """Rows of k samples over a common head, a conversation, and two orders of two segments."""
    rng = random.Random(seed)

    def segment() -> tuple[int, ...]:
        return tuple(rng.randrange(5, VOCAB_SIZE) for _ in range(rng.randrange(1, longest)))

    head = segment()
    groups = []
    for i in range(count):
        conversation, first, second, tail = segment(), segment(), segment(), segment()
        orders: list[Prompt] = [
            [head, conversation, first, second, tail],
            [head, conversation, second, first, tail],
        ]
        groups.append(Group([orders[j % 2] for j in range(k)], (i, 7), TWO, tag=i))
    return groups


def run(generator: Generator, groups: list[Group]) -> list[GroupResult]:
    """All results by tag; checks the cache against the live leaves after every retirement."""
    results = []
    for result in generator.run(iter(groups)):
        results.append(result)
        generator.cache.check()
    generator.forest.check([])
    assert generator.cache.idle_slots == generator.cache.num_slots
    return sorted(results, key=lambda result: result.group.tag)


def flat(prompt: Prompt) -> list[int]:
    return [token for segment in prompt for token in segment]


def drawn(result: GroupResult) -> list[tuple]:
    return [(g.token_ids, g.logprobs, g.sampling_logprobs, g.finish) for g in result.generations]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    directory = tmp_path_factory.mktemp("tiny")
    write_model(directory, "qwen3")
    return load(directory)[0]


VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("qwen3", YARN),
    ("deepseek_v2", DEEPSEEK),
]


@pytest.mark.parametrize(("family", "options"), VARIANTS)
@pytest.mark.parametrize("chunk", [4096, 48])
def test_prefill_and_decode_equal_transformers(
    family: str,
    options: dict[str, Any],
    chunk: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every token's log-prob, over shared segments longer than the windows (9 and 11 tokens), with
    prefill in one piece and in pieces that cut segments."""
    theirs = write_model(tmp_path, family, **options)
    model, _ = load(tmp_path)
    monkeypatch.setattr(generate, "PREFILL_TOKENS", chunk)
    generator = make_generator(model)
    forwards: list[int] = []
    monkeypatch.setattr(generator, "_forward_prefill", counting(generator, forwards))
    groups = make_groups(3)
    results = run(generator, groups)
    for group, result in zip(groups, results, strict=True):
        for prompt, generation in zip(group.prompts, result.generations, strict=True):
            ids = flat(list(prompt)) + generation.token_ids
            with torch.inference_mode():
                logits = theirs(torch.tensor([ids])).logits[0, -len(generation.token_ids) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(generation.token_ids)[:, None])
            error = (expected[:, 0] - torch.tensor(generation.logprobs)).abs().max()
            assert error < 1e-5
    assert (len(forwards) > 3) == (chunk == 48)
    assert sum(forwards) == generator.usage.prefill_tokens


def counting(generator: Generator, forwards: list[int]) -> object:
    inner = generator._forward_prefill

    def forward(pieces: list) -> Tensor:
        forwards.append(sum(stop - first for _, first, stop in pieces))
        return inner(pieces)

    return forward


@needs_cpp
def test_prefill_in_pieces_changes_no_bit(
    tiny: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = make_groups(3, longest=400)
    whole = [drawn(r) for r in run(make_generator(tiny), groups)]
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 100)
    assert [drawn(r) for r in run(make_generator(tiny), groups)] == whole


@needs_cpp
def test_joining_and_retiring_change_no_bit(tiny: Transformer) -> None:
    groups = make_groups(9, k=4)
    alone = [drawn(run(make_generator(tiny), [group])[0]) for group in groups]
    for max_batch in (1, 3, 7, 64):
        generator = make_generator(tiny, max_batch=max_batch)
        assert [drawn(r) for r in run(generator, groups)] == alone
        assert generator.usage.decode_tokens == 9 * 4 * 19


@needs_cpp
@pytest.mark.parametrize("length", [1, 255, 256, 257])
def test_segments_as_long_as_a_split_change_no_bit(tiny: Transformer, length: int) -> None:
    """Greedy samples of a row alone, first, and last under another id, when its head was read."""
    rng = random.Random(length)
    head, one, two = (tuple(rng.randrange(5, VOCAB_SIZE) for _ in range(length)) for _ in range(3))
    prompts: list[Prompt] = [[head, one, two, (6,)], [head, two, one, (6,)]]
    first, last = (Group(prompts, (i, 7), TWO, tag=i) for i in (0, 9))
    others = [Group([[head, one, (i,)]], (i, 7), TWO, tag=i) for i in range(1, 9)]
    options = {"options": SamplingOptions(0.0), "max_batch": 4}
    (alone,) = run(make_generator(tiny, **options), [first])
    together = run(make_generator(tiny, **options), [first, *others, last])
    assert drawn(together[0]) == drawn(together[9]) == drawn(alone)


@needs_cpp
def test_samples_of_unequal_length_retire_one_by_one(tiny: Transformer) -> None:
    """With end tokens on, samples end anywhere, some behind their first split of 256; so leaves of
    all ages meet. What comes before the end is unchanged."""
    groups = make_groups(8, k=4)
    full = run(make_generator(tiny, max_new_tokens=300), groups)
    generator = make_generator(tiny, max_new_tokens=300, max_batch=5)
    ends = set(range(0, VOCAB_SIZE, 64))
    generator.decoder.end_ids = torch.tensor(sorted(ends))
    ended = run(generator, groups)
    lengths = set()
    for longer, shorter in zip(full, ended, strict=True):
        for a, b in zip(longer.generations, shorter.generations, strict=True):
            stop = next((i + 1 for i, t in enumerate(a.token_ids) if t in ends), 300)
            assert b.token_ids == a.token_ids[:stop] and b.logprobs == a.logprobs[:stop]
            assert b.finish == ("eos" if b.token_ids[-1] in ends else "length")
            lengths.add(len(b.token_ids))
    assert len(lengths) > 8 and min(lengths) < 50 and max(lengths) > 256


def test_suffixes_longer_than_a_split(tiny: Transformer, tmp_path: Path) -> None:
    """600 generated tokens take three splits of 256; log-probs stay those of a plain forward."""
    groups = make_groups(1, k=2)
    (result,) = run(make_generator(tiny, max_new_tokens=600), groups)
    for prompt, generation in zip(groups[0].prompts, result.generations, strict=True):
        start = len(flat(list(prompt)))
        logits = tiny.logits(flat(list(prompt)) + generation.token_ids)[start - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(generation.token_ids)[:, None])
        assert len(generation.token_ids) == 600
        assert (expected[:, 0] - torch.tensor(generation.logprobs)).abs().max() < 1e-4


def test_a_sample_ends_at_the_models_context(tiny: Transformer) -> None:
    context = tiny.config.max_position_embeddings
    prompt: Prompt = [tuple([7] * (context - 5))]
    (result,) = run(make_generator(tiny), [Group([prompt], (1, 2), TWO, tag=0)])
    assert len(result.generations[0].token_ids) == 5
    assert result.generations[0].finish == "length"
    (refused,) = run(make_generator(tiny), [Group([[tuple([7] * context)]], (1, 2), TWO, tag=0)])
    assert refused.error == f"the prompt has {context} tokens, the model's context is {context}"


def test_a_prompt_may_end_within_another(tiny: Transformer) -> None:
    """Also when the shorter one joins later, over keys that are in the cache already."""
    head, middle, tail = tuple(range(10, 30)), tuple(range(40, 50)), (60, 61)
    prompts: list[Prompt] = [[head, middle, tail], [head, middle], [head]]
    group = Group(prompts, (3, 4), TWO, tag=0)
    alone = []
    for prompt in prompts:
        logits = tiny.logits(flat(prompt))[-1]
        alone.append(int(logits.argmax()))
    for max_batch in (1, 2, 8):
        generator = make_generator(tiny, max_batch=max_batch, options=SamplingOptions(0.0))
        (result,) = run(generator, [group])
        assert [g.token_ids[0] for g in result.generations] == alone
        assert generator.usage.prefill_tokens == 32 + {1: 2, 2: 1, 8: 0}[max_batch]


@pytest.mark.parametrize("max_batch", [1, 2, 5, 32])
def test_a_prompt_is_computed_once_however_few_the_slots(tiny: Transformer, max_batch: int) -> None:
    groups = make_groups(3, k=12)
    generator = make_generator(tiny, max_batch=max_batch)
    results = run(generator, groups)
    head = len(groups[0].prompts[0][0])
    trees = sum(result.tree_tokens for result in results)
    assert generator.usage.prefill_tokens == trees - 2 * head


def test_a_head_that_was_allocated_but_never_computed_is_not_used(tiny: Transformer) -> None:
    """A row fails, or waits, after its head found room: the next row with that head computes it."""
    head, tail = tuple(range(10, 30)), (40, 41)
    first = Group([[head, tuple([9] * 900), tail]], (1, 1), TWO, tag=0)
    second = Group([[head, (7, 8, 9), tail]], (2, 2), TWO, tag=1)
    other = Group([[tuple(range(50, 80)), tuple([5] * 200), tail]], (3, 3), TWO, tag=2)
    third = Group([[head, tuple([6] * 260), tail]], (4, 4), TWO, tag=3)
    groups = [first, second, other, third]
    alone = [drawn(run(make_generator(tiny), [group])[0]) for group in groups]
    small = make_generator(tiny, cache_bytes=3 * 2 * 48 * 4 * 600, max_batch=4)
    for cache in (*small.cache.k, *small.cache.v):
        cache.fill_(float("nan"))
        cache[:, : small.cache.base] = 0
    results = run(small, groups)
    assert results[0].error is not None
    assert [drawn(r) for r in results[1:]] == alone[1:]


def test_a_group_without_samples_is_done_at_once(tiny: Transformer) -> None:
    groups = make_groups(2)
    groups.insert(1, Group([], (0, 0), TWO, tag=0.5))
    results = run(make_generator(tiny), groups)
    assert [len(r.generations) for r in results] == [3, 0, 3]


def live_of(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many leaves every live set has that is loaded from now on."""
    live: list[int] = []
    load = generator.decoder.load

    def count(state: LiveSamples, leaves: Sequence[Leaf]) -> None:
        live.append(len(leaves))
        load(state, leaves)

    monkeypatch.setattr(generator.decoder, "load", count)
    return live


def test_a_small_cache_makes_a_smaller_batch(
    tiny: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = make_groups(6, longest=60, k=4)
    expected = [drawn(r) for r in run(make_generator(tiny), groups)]
    cell = 3 * 2 * 48 * 4
    small = make_generator(tiny, cache_bytes=cell * 500)
    live = live_of(small, monkeypatch)
    assert [drawn(r) for r in run(small, groups)] == expected
    assert 1 < max(live) < 16


def test_a_prompt_that_no_cache_holds_is_an_error_and_the_rest_goes_on(tiny: Transformer) -> None:
    groups = make_groups(3, longest=20, k=2)
    huge = Group([[tuple([9] * 900)]], (5, 5), TWO, tag=1)
    groups = [groups[0], huge, Group(groups[2].prompts, groups[2].key, TWO, tag=2)]
    results = run(make_generator(tiny, cache_bytes=3 * 2 * 48 * 4 * 600), groups)
    assert [bool(result.error) for result in results] == [False, True, False]
    assert results[1].error is not None and "944 cells of cache" in results[1].error
    with pytest.raises(ValueError, match="bytes of cache"):
        make_generator(tiny, cache_bytes=1000)


def test_nan_in_one_row_does_not_reach_another(tiny: Transformer) -> None:
    """What a slot's last owner has left there, be it NaN, is not read by the next."""
    generator = make_generator(tiny, max_batch=2)
    groups = make_groups(2, k=2)
    expected = [drawn(r) for r in run(make_generator(tiny, max_batch=2), groups)]
    for cache in (*generator.cache.k, *generator.cache.v):
        cache[:, generator.cache.base :] = float("nan")
    assert [drawn(r) for r in run(generator, groups)] == expected


def in_rounds(group: Group, sizes: Sequence[int]) -> Group:
    """The group with rounds of these sizes, then no more."""

    def next_round(drawn: Sequence[Generation]) -> int:
        starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        assert len(drawn) in starts, "a round was not complete"
        return [*sizes, 0][starts.index(len(drawn))]

    return Group(group.prompts, group.key, group.num_scores, group.tag, next_round)


# Ending early or with all 6 samples; the last two ask for more than there are.
ROUNDS = [[2], [1, 1, 2], [1] * 6, [6], [2, 4], [3, 2], [4, 4], [9]]


@needs_cpp
@pytest.mark.parametrize("max_batch", [1, 2, 5, 32])
def test_rounds_draw_the_first_samples_of_all(tiny: Transformer, max_batch: int) -> None:
    """Bit for bit, however few the slots; every prompt is computed once, between rounds too."""
    groups = make_groups(len(ROUNDS), k=6)
    full = [drawn(result) for result in run(make_generator(tiny, max_new_tokens=6), groups)]
    generator = make_generator(tiny, max_new_tokens=6, max_batch=max_batch)
    results = run(generator, list(map(in_rounds, groups, ROUNDS)))
    for result, everything, sizes in zip(results, full, ROUNDS, strict=True):
        assert len(result.generations) == min(sum(sizes), 6)
        assert drawn(result) == everything[: sum(sizes)]
    head = len(groups[0].prompts[0][0])
    trees = sum(result.tree_tokens for result in results)
    assert generator.usage.prefill_tokens == trees - (len(groups) - 1) * head
    assert generator.usage.decode_tokens == sum(len(r.generations) for r in results) * 5


def test_only_the_prompts_that_were_drawn_count(tiny: Transformer) -> None:
    prompts: list[Prompt] = [[(9,), (10, 11)], [(9,), (12,)], [(9,), (13, 14, 15)]]
    generator = make_generator(tiny)
    (result,) = run(generator, [in_rounds(Group(prompts, (1, 1), TWO, tag=0), [2])])
    assert result.tree_tokens == generator.usage.prefill_tokens == 4


def test_other_groups_take_the_free_slots_between_rounds(tiny: Transformer) -> None:
    """A group of one sample at a time leaves a slot free: the next ones come in, but none of them
    before its own next sample."""
    groups = make_groups(4, k=4)
    groups[0] = in_rounds(groups[0], [1] * 4)
    generator = make_generator(tiny, max_new_tokens=6, max_batch=3)
    assert [r.group.tag for r in generator.run(iter(groups))] == [1, 0, 2, 3]


@needs_cpp
@pytest.mark.parametrize("max_batch", [1, 2, 4])
@pytest.mark.parametrize("cells", [190, 1000])
def test_held_prompts_that_fill_the_cache_are_let_go(
    tiny: Transformer, max_batch: int, cells: int
) -> None:
    """Each group holds three prompts for its next rounds; the small cache has no room for them."""
    groups = []
    for i in range(4):
        tails = [tuple(range(5 + i + j, 45 + i + 11 * j)) for j in range(3)]
        groups.append(Group([[(9, 8), tails[j % 3]] for j in range(6)], (i, 3), TWO, tag=i))
    sizes = [[3, 3], [4, 1], [1, 1, 1, 1], [2, 1, 3]]
    full = [drawn(result) for result in run(make_generator(tiny, max_new_tokens=6), groups)]
    generator = make_generator(
        tiny, max_new_tokens=6, max_batch=max_batch, cache_bytes=3 * 2 * 48 * 4 * cells
    )
    results = run(generator, list(map(in_rounds, groups, sizes)))
    for result, everything, size in zip(results, full, sizes, strict=True):
        assert result.error is None and drawn(result) == everything[: sum(size)]
    trees = sum(result.tree_tokens for result in results)
    assert (generator.usage.prefill_tokens > trees) == (cells == 190)


def test_rows_are_pulled_only_as_there_is_room(tiny: Transformer) -> None:
    pulled = []

    def source() -> Iterator[Group]:
        for group in make_groups(10, k=4):
            pulled.append(group.tag)
            yield group

    generator = make_generator(tiny, max_batch=8)
    seen = []
    for result in generator.run(source()):
        seen.append(result.group.tag)
        assert len(pulled) <= len(seen) + 4
    assert len(seen) == 10


def test_greedy_repeats_and_ignores_the_key(tiny: Transformer) -> None:
    groups = make_groups(2, k=2)
    same = [Group(g.prompts, (99, 98), TWO, tag=g.tag) for g in groups]
    first = run(make_generator(tiny, options=SamplingOptions(0.0)), groups)
    second = run(make_generator(tiny, options=SamplingOptions(0.0)), same)
    assert [drawn(r) for r in first] == [drawn(r) for r in second]
    assert all(p == 0 for r in first for g in r.generations for p in g.sampling_logprobs)


def test_float64_is_refused(tiny: Transformer) -> None:
    with pytest.raises(ValueError, match=r"torch\.float64 cannot be sampled in: .* float32"):
        make_generator(deepcopy(tiny).double())


def test_limits_below_one_are_refused(tiny: Transformer) -> None:
    for name in ("max_batch", "max_new_tokens"):
        with pytest.raises(ValueError, match=name):
            make_generator(tiny, **{name: 0})
