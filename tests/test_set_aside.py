"""Caches that are too small for all samples at full length: blocks are taken as samples grow, and
samples that are set aside go on as if they had never been."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.forced import ScoreForm
from engine.generate import Generator, Group
from engine.judge import Judge
from engine.kv_cache import cell_bytes, round_up, scratch_cells
from engine.verdict import Verdict
from kernels.forest_attention.plan import splits_of
from kernels.score_grammar import ScoreRules
from models import load
from models.transformer import Transformer
from tests.rows import needs_cpp
from tests.test_generate import drawn, in_rounds, live_of, make_generator, make_groups, run
from tests.test_judge import drawn as drawn_by_judge
from tests.test_judge import world_rows
from tests.tiny import VOCAB_SIZE, write_model
from train.world import BASE

CELL = 3 * 2 * 48 * 4  # bytes of a token's keys and values
SPLIT = 48  # a multiple of the 16 cells by which slabs are placed, so that gaps may be too small


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    directory = tmp_path_factory.mktemp("tiny")
    write_model(directory, "qwen3")
    return load(directory)[0]


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits and blocks of few keys, so that short samples take many."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("kernels", "engine") and hasattr(module, "MAX_SPLIT"):
            monkeypatch.setattr(module, "MAX_SPLIT", SPLIT)


def with_cells(model: Transformer, cells: int, **options: Any) -> Generator:
    """A generator whose prompts and samples have so many cells."""
    max_batch = options.setdefault("max_batch", 16)
    return make_generator(model, cache_bytes=CELL * (cells + scratch_cells(max_batch)), **options)


class Watch:
    """What is set aside and what comes back: leaves, and tokens of each at that time; and the most
    blocks in use. alone: how often a leaf was set aside that nobody was beside;
    let_go: how often prompts were let go for a block."""

    def __init__(self, generator: Generator) -> None:
        self.aside: list[tuple[Any, int]] = []
        self.back: list[tuple[Any, int]] = []
        self.most_blocks = self.alone = self.let_go = 0
        set_aside, join, grow = generator._set_aside, generator._join, generator._grow
        let_go, growing = generator._let_go, False
        take_block = generator.cache.take_block

        def watched_set_aside(leaf: Any, waiting: Any) -> None:
            assert leaf.aside is None and leaf.number == max(x.number for x in generator.leaves)
            self.aside.append((leaf, leaf.count))
            self.alone += len(generator.leaves) == 1
            set_aside(leaf, waiting)

        def watched_grow(*arguments: Any) -> bool:
            nonlocal growing
            growing = True
            done = grow(*arguments)
            growing = False
            return done

        def watched_let_go(pending: Any) -> None:
            self.let_go += growing
            let_go(pending)

        def watched_join(joining: list[Any]) -> None:
            self.back += [(leaf, leaf.count) for leaf in joining if leaf.aside is not None]
            join(joining)

        def watched_take_block() -> int | None:
            block = take_block()
            self.most_blocks = max(self.most_blocks, len(generator.cache._blocks))
            return block

        generator._set_aside = watched_set_aside  # type: ignore[method-assign]
        generator._grow = watched_grow  # type: ignore[method-assign, assignment]
        generator._let_go = watched_let_go  # type: ignore[method-assign]
        generator._join = watched_join  # type: ignore[method-assign]
        generator.cache.take_block = watched_take_block  # type: ignore[method-assign]


@needs_cpp
def test_room_for_two_and_a_half_of_sixteen(
    tiny: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit the samples of a roomy run, of which some have several blocks on the host."""
    groups = make_groups(1, k=16)
    roomy = make_generator(tiny, max_new_tokens=520)
    watch = Watch(roomy)
    expected = [drawn(result) for result in run(roomy, groups)]
    assert not watch.aside and watch.most_blocks == 16 * 3
    small = with_cells(tiny, 5 * 3 * 256 // 2 + 300, max_new_tokens=520)
    watch, live = Watch(small), live_of(small, monkeypatch)
    blocks = small.cache.free_blocks
    assert [drawn(result) for result in run(small, groups)] == expected
    assert len(watch.aside) == len(watch.back) > 3
    assert max(live) <= blocks // 2  # each that begins leaves room for its second block
    assert max(count for _, count in watch.aside) > 256
    assert sorted(watch.aside, key=id_of) == sorted(watch.back, key=id_of)
    assert watch.most_blocks <= 8
    # Every token was drawn once.
    assert small.usage.decode_tokens == roomy.usage.decode_tokens == 16 * 519


def id_of(entry: tuple[Any, int]) -> tuple[int, int]:
    return entry[0].number, entry[1]


def compared(
    model: Transformer, groups: list[Group], step: int, extra: int, ahead: int, **options: Any
) -> Watch:
    """Samples that every `step`-th token ends, in a cache that holds one prompt, one sample and
    16 * `extra` cells: they are those of a roomy one. Cells that nobody has written are NaN."""

    def sampled(generator: Generator) -> list[Any]:
        generator.decoder.end_ids = torch.tensor(range(0, VOCAB_SIZE, step))
        return [drawn(result) for result in run(generator, groups)]

    expected = sampled(make_generator(model, **options))
    assert all(expected)
    prompts = [prompt for group in groups for prompt in group.prompts]
    least = max(sum(map(round_up, map(len, prompt))) for prompt in prompts)
    least += splits_of(options["max_new_tokens"]) * SPLIT
    small = with_cells(model, least + 16 * extra, **options)
    small.ahead = ahead
    for cache in (*small.cache.k, *small.cache.v):
        cache[:, small.cache.base :] = float("nan")
    watch = Watch(small)
    assert sampled(small) == expected
    assert sorted(watch.aside, key=id_of) == sorted(watch.back, key=id_of)
    return watch


def test_short_samples_take_what_they_use(tmp_path: Path) -> None:
    """64 samples of at most 8,192 tokens, in a cache for 5 of that length."""
    write_model(tmp_path, "qwen3", max_position_embeddings=16384)
    model, _ = load(tmp_path)
    groups = make_groups(1, k=64, longest=20)
    generator = with_cells(model, 5 * 8192, max_new_tokens=8192, max_batch=64)
    generator.decoder.end_ids = torch.tensor(range(0, VOCAB_SIZE, 320))
    watch = Watch(generator)
    (result,) = run(generator, groups)
    lengths = [len(generation.token_ids) for generation in result.generations]
    assert max(lengths) > 2000 and not watch.aside
    # All begin together, and a run of 8 steps takes blocks for the tokens after it.
    runs = [
        sum(length > count for length in lengths) * -(-(count + 8) // 256)
        for count in range(9, max(lengths), 8)
    ]
    assert watch.most_blocks == max(64, *runs) > 64


@needs_cpp
@pytest.mark.usefixtures("short_splits")
def test_forced_scores_after_samples_that_were_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the judge: the text of a sample that is cut becomes a segment beside other samples'
    blocks."""
    judge, rows = Judge.load(BASE), world_rows(3)
    options: dict[str, Any] = {
        "k": 12, "max_new_tokens": 100, "temperature": 1.3, "force_scores": True
    }  # fmt: skip
    calls: list[int] = []
    set_aside = Generator._set_aside

    def counted(self: Generator, leaf: Any, waiting: Any) -> None:
        calls.append(leaf.count)
        set_aside(self, leaf, waiting)

    monkeypatch.setattr(Generator, "_set_aside", counted)
    judged = {}
    for cells in (1 << 14, 1200):
        small = Judge(
            judge.model,
            judge.tokenizer,
            judge_template=judge.prompts.judge_template,
            settings=judge.settings,
            cache_bytes=cells * cell_bytes(judge.model.config, torch.float32),
        )
        judged[cells] = [*small.rows(rows, **options)]
        assert bool(calls) == (cells == 1200)
    roomy, narrow = judged.values()
    assert [*map(drawn_by_judge, narrow)] == [*map(drawn_by_judge, roomy)]
    samples = [s for verdict in roomy if isinstance(verdict, Verdict) for s in verdict.samples]
    assert {sample.forced for sample in samples} == {True, False}


@pytest.mark.soak
@pytest.mark.usefixtures("short_splits", "in_torch")
def test_samples_that_were_set_aside_in_torch(tiny: Transformer) -> None:
    """Log-probs stay those of a plain forward."""
    groups = make_groups(1, longest=16, k=4)
    generator = with_cells(tiny, 8 * SPLIT, max_new_tokens=3 * SPLIT)
    watch = Watch(generator)
    (result,) = run(generator, groups)
    assert watch.aside and len(watch.aside) == len(watch.back)
    for prompt, generation in zip(groups[0].prompts, result.generations, strict=True):
        text = [token for segment in prompt for token in segment]
        logits = tiny.logits(text + generation.token_ids)[len(text) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(generation.token_ids)[:, None])
        assert (expected[:, 0] - torch.tensor(generation.logprobs)).abs().max() < 1e-4


@pytest.mark.usefixtures("short_splits")
def test_a_group_that_fails_gives_back_what_its_other_samples_hold() -> None:
    """A sample fills the cache, and its text with an opening is too long for it, while the other
    sample of its group is set aside."""
    judge = Judge.load(BASE)
    form = ScoreForm(judge.tokenizer, ScoreRules())
    length = 4 * SPLIT
    cells = length + 16 + scratch_cells(2)
    generator = make_generator(
        judge.model, form=form, max_new_tokens=length, max_batch=2,
        cache_bytes=cells * cell_bytes(judge.model.config, torch.float32),
    )  # fmt: skip
    watch = Watch(generator)
    prompt = [tuple(range(5, 21))]
    (result,) = run(generator, [Group([prompt] * 2, (1, 2), [2, 2], tag=0)])
    assert result.error is not None and "tokens in 208 cells of cache" in result.error
    assert len(watch.aside) == 1 and not watch.back


@needs_cpp
@pytest.mark.usefixtures("short_splits")
def test_any_cache_gives_the_same_samples(tiny: Transformer) -> None:
    """Rows over one head, some in rounds; samples that end anywhere; one poll late, as on a GPU."""
    set_aside = []

    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        rows, longest = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([8, 40]))
        groups = make_groups(rows, seed=data.draw(st.integers(0, 99)), longest=longest, k=6)
        if data.draw(st.booleans()):
            sizes = [[2, 4], [1, 1, 2], [6], [3]]
            groups = list(map(in_rounds, groups, sizes[:rows]))
        step, extra = data.draw(st.sampled_from([40, 160])), data.draw(st.integers(0, 16))
        length, batch = (
            data.draw(st.sampled_from([97, 140])),
            data.draw(st.sampled_from([2, 5, 24])),
        )
        ahead = data.draw(st.integers(0, 1))
        watch = compared(tiny, groups, step, extra, ahead, max_new_tokens=length, max_batch=batch)
        set_aside.append(len(watch.aside))

    check()
    assert sum(n > 0 for n in set_aside) > 1


@needs_cpp
@pytest.mark.usefixtures("short_splits")
def test_a_lone_sample_that_finds_no_block_comes_back_in_one_piece(tiny: Transformer) -> None:
    """All prompts but its own have been let go, and the gaps between its slabs and blocks are too
    short: it is set aside, and its prompt is computed again."""
    groups = make_groups(4, seed=84, k=6)
    watch = compared(tiny, groups, 40, 0, 1, max_new_tokens=140, max_batch=5)
    assert watch.alone == len(watch.aside) == 1 and watch.let_go > 0
