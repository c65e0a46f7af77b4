"""A deterministic run: a sample has the same bits alone and in company, through every operation."""

import random
from dataclasses import replace

import pytest
import torch

import engine.generate as generate
from engine.decode import Decoder
from engine.generate import Generator, Group
from kernels.extract_scores import ScoreAutomaton
from kernels.forest_attention import AttentionOptions
from kernels.sample_token import SamplingOptions
from kernels.score_grammar import ScoreRules
from models.transformer import Transformer
from tests.forests import make_config
from tests.implementations import ON_GPU, Implementation

pytestmark = pytest.mark.implementations("cpp", "triton")
LONG = ON_GPU  # the interpreter takes milliseconds for a program
VOCAB = 70
CONFIG = replace(
    make_config(1, 16, 16, groups=2, layers=2),
    vocab_size=VOCAB,
    hidden_size=1536 if LONG else 32,
    intermediate_size=2560 if LONG else 48,  # sums long enough to be cut
    attention=(AttentionOptions(0.25, None, 20), AttentionOptions(0.25)),
    attention_bias=True,
    final_softcap=20.0,
    tied=False,
)
TOKENS = 300 if LONG else 3  # suffixes of more than one split
K = 40 if LONG else 9  # two groups of them: more rows than the 16 that few are padded to
Bits = dict[tuple[int, int], tuple[list[int], list[float], list[float]]]

TWO = [2] * 64  # scores of each sample


def groups_of(count: int, first: int = 0) -> list[Group]:
    """Groups of `count` samples under one head, with one of two last segments: three splits each,
    or more."""
    rng = random.Random(0)

    def segment(tokens: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCAB) for _ in range(tokens))

    head = segment(600 if LONG else 40)
    groups = []
    for i in range(2):
        row, *last = segment(7 + 20 * i), segment(3), segment(5)
        groups.append(Group([[head, row, last[j % 2]] for j in range(count)], (i, 7), TWO, tag=i))
    return groups[first:]


def drawn(on: Implementation, model: Transformer, groups: list[Group], max_batch: int) -> Bits:
    """All samples, by group and index."""
    automaton = ScoreAutomaton([b"x"] * VOCAB, [], ScoreRules(first=True), on.device)
    generator = Generator(
        model,
        automaton,
        options=SamplingOptions(1.0),
        max_new_tokens=TOKENS,
        max_batch=max_batch,
        max_scores=2,
        deterministic=True,
    )
    return {
        (result.group.tag, j): (g.token_ids, g.logprobs, g.sampling_logprobs)
        for result in generator.run(groups)
        for j, g in enumerate(result.generations)
    }


@pytest.mark.usefixtures("products_in_order")
def test_a_sample_has_the_same_bits_in_any_company(
    on: Implementation, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on.name == "triton" and not ON_GPU and dtype != torch.float32:
        pytest.skip("the interpreter takes long")
    model = Transformer(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0), std=0.3)
    model = model.to(dtype).to(on.device)
    # What a CUDA graph replays passes no door where launches are counted, so here the host launches
    # every step; the runs below are replayed.
    with monkeypatch.context() as patch, on.counted() as counts:
        patch.setattr(generate, "make_decoder", Decoder)
        together = drawn(on, model, groups_of(K), 2 * K)
    assert len(together) == 2 * K
    assert {len(tokens) for tokens, _, _ in together.values()} == {TOKENS}
    assert len({tuple(tokens) for tokens, _, _ in together.values()}) > K
    if on.name == "triton":
        forwards, heads = counts["_norm_rope_write_kernel"] // 2, counts["_tile_stats_kernel"]
        assert forwards >= TOKENS and heads >= TOKENS
        assert counts["_matmul_kernel"] == 4 * 2 * forwards + heads
        # Lists of keys are one wide launch, whoever shares them; a decode has suffixes too.
        launches = counts["_forest_attention_kernel"] // 2
        assert forwards + TOKENS - 1 <= launches <= 2 * forwards
    else:
        assert counts["decode"] and counts["sample_token"]

    monkeypatch.setattr(generate, "PREFILL_TOKENS", 32)
    for groups, max_batch in ((groups_of(1, first=1), 1), (groups_of(2)[::-1], 3)):
        some = drawn(on, model, groups, max_batch)
        assert some == {sample: together[sample] for sample in some}
        assert len(some) == sum(len(group.prompts) for group in groups)
