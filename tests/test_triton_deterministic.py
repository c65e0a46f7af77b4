"""A deterministic run, every kernel in Triton: a sample has the same bits alone and in company."""

import random
from typing import Any

import pytest
import torch

import engine.generate as generate
from engine.generate import Generator, Group
from kernels.extract_scores import ScoreAutomaton
from kernels.forest_attention import AttentionOptions
from kernels.launch import intercept
from kernels.sample_token import SamplingOptions
from models.config import ModelConfig, Rope
from models.transformer import Transformer
from tests.triton_device import DEVICE, ON_GPU, on_triton

pytestmark = on_triton

VOCAB = 70
CONFIG = ModelConfig(
    architecture="qwen3",
    vocab_size=VOCAB,
    hidden_size=1536 if ON_GPU else 32,
    intermediate_size=2560 if ON_GPU else 48,  # on a GPU sums long enough to be cut
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    v_head_dim=16,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    rope=Rope(10_000.0, None),
    attention=(AttentionOptions(0.25, None, 20), AttentionOptions(0.25, None, None)),
    attention_bias=True,
    qk_norm=True,
    norm_plus_one=False,
    sandwich_norms=False,
    embedding_scale=None,
    activation="silu",
    final_softcap=20.0,
    tied=False,
    eos_token_ids=frozenset(),
    dtype=None,
)
TOKENS = 300 if ON_GPU else 3  # on a GPU suffixes of more than one split
K = 40 if ON_GPU else 9  # two groups of them: more rows than the 16 that few are padded to


def build(dtype: torch.dtype) -> Transformer:
    generator = torch.Generator().manual_seed(0)
    model = Transformer(CONFIG)
    model.init_weights(generator, std=0.3)
    return model.to(dtype).to(DEVICE)


def make_groups() -> list[Group]:
    """Samples under one head, with one of two last segments: three splits each, or more."""
    rng = random.Random(0)

    def segment(tokens: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCAB) for _ in range(tokens))

    head = segment(600 if ON_GPU else 40)
    groups = []
    for i in range(2):
        row, first, second = segment(7 + 20 * i), segment(3), segment(5)
        prompts = [[head, row, first], [head, row, second]]
        groups.append(Group([prompts[j % 2] for j in range(K)], (i, 7), 2, tag=i))
    return groups


Bits = dict[tuple[int, int], tuple[list[int], list[float], list[float]]]


def run(
    model: Transformer, groups: list[Group], max_batch: int
) -> tuple[Bits, list[tuple[str, dict[str, Any]]]]:
    """All samples, by group and index, and all launches."""
    automaton = ScoreAutomaton([b"x"] * VOCAB, [], "Scores:", 1, 10, DEVICE)
    generator = Generator(
        model,
        automaton,
        options=SamplingOptions(1.0),
        max_new_tokens=TOKENS,
        max_batch=max_batch,
        max_scores=2,
        deterministic=True,
    )
    found: list[tuple[str, dict[str, Any]]] = []

    def launch(kernel: Any, grid: Any, arguments: Any, options: dict[str, Any]) -> None:
        found.append((kernel.__name__, options))
        kernel[grid](*arguments, **options)

    with intercept(launch):
        results = list(generator.run(groups))
    drawn = {
        (result.group.tag, j): (g.token_ids, g.logprobs, g.sampling_logprobs)
        for result in results
        for j, g in enumerate(result.generations)
    }
    return drawn, found


def alone(group: Group, count: int) -> Group:
    """A group's first samples."""
    return Group(group.prompts[:count], group.key, group.num_scores, tag=group.tag)


@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32] if ON_GPU else [torch.float32]
)
def test_a_sample_has_the_same_bits_in_any_company(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(dtype)
    together, found = run(model, make_groups(), 2 * K)
    assert len(together) == 2 * K
    assert {len(tokens) for tokens, _, _ in together.values()} == {TOKENS}
    assert len({tuple(tokens) for tokens, _, _ in together.values()}) > K
    names = [name for name, _ in found]
    forwards = names.count("_write_kv_kernel") // CONFIG.num_layers
    heads = names.count("_tile_stats_kernel")
    assert forwards >= TOKENS and heads >= TOKENS
    assert names.count("_matmul_kernel") == 4 * CONFIG.num_layers * forwards + heads
    # One partial result for every split: no list of keys is laid out to suit the company.
    lists = [o for name, o in found if name == "_forest_attention_kernel" and not o["SUFFIX"]]
    assert {options["M"] > 16 for options in lists} == {True}

    monkeypatch.setattr(generate, "PREFILL_TOKENS", 32)
    for groups, max_batch in (
        ([alone(make_groups()[1], 1)], 1),
        ([alone(group, 2) for group in reversed(make_groups())], 3),
    ):
        some, _ = run(model, groups, max_batch)
        assert some == {sample: together[sample] for sample in some}
        assert len(some) == sum(len(group.prompts) for group in groups)
