"""A prefill by `segment_attention` has the hidden states of one by `forest_attention`."""

import sys
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import engine.segment_prefill as module
from engine.forest import Forest, Node
from engine.forward import CachedForward, take_pieces
from engine.judge import Judge
from engine.segment_prefill import SegmentPrefill
from kernels.forest_attention import AttentionOptions
from models.config import Latent, ModelConfig
from models.latent_attention import by_head
from models.layers import linear
from models.transformer import Transformer, causal_attend
from tests.forests import make_cache, make_config

FULL = AttentionOptions(0.25)
PROMPTS: list[list[tuple[int, ...]]] = [
    [(1,) * 20, (2,) * 9, (3,) * 5],
    [(1,) * 20, (2,) * 9, (4,) * 33],
    [(1,) * 20, (5,) * 70],
    [(6,) * 17],
]
TOKENS = 20 + 9 + 5 + 33 + 70 + 17


def make_model(
    *options: AttentionOptions, dtype: torch.dtype, latent: Latent | None = None
) -> Transformer:
    sizes = (2, 16, 16, 2) if latent is None else (4, 16, 20, 1)
    config = make_config(*sizes, layers=len(options), latent=latent)
    model = Transformer(replace(config, attention=options))
    model.init_weights(torch.Generator().manual_seed(0), std=0.3)
    return model.to(dtype)


def prefilled(model: Transformer, backend: Any, room: int = 1 << 20) -> Tensor:
    """Hidden states of all tokens of a forest, in forwards of at most `room` tokens."""
    cache = make_cache(0, 16, 400, model.config, model.head_weight.dtype)
    forest = Forest(cache)
    ends, tokens = forest.grow(PROMPTS)
    fresh: list[Node] = []
    for end in ends:
        fresh += forest.allocate(end) or []
    forward = CachedForward(model, cache, prefill_backend=backend)
    queue = deque((node, 0) for node in fresh)
    hidden = []
    with torch.no_grad():
        while queue:
            pieces = take_pieces(queue, room)
            count = sum(stop - first for _, first, stop in pieces)
            hidden.append(forward.prefill(pieces)[:count])
    assert tokens == TOKENS
    return torch.cat(hidden)


MODELS = {
    "full": (FULL, FULL),
    "capped": (AttentionOptions(0.25, 5.0),) * 2,
    "windows": (AttentionOptions(0.25, None, 12), FULL, AttentionOptions(0.25, 5.0, 37)),
    "a window of one, and of all": (
        AttentionOptions(0.25, None, 1), AttentionOptions(0.25, None, 1000), FULL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("room", [1 << 20, 30, 7])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_hidden_states_are_those_of_forest_attention(
    options: tuple[AttentionOptions, ...], room: int
) -> None:
    """In float64; also where forwards cut nodes anywhere."""
    model = make_model(*options, dtype=torch.float64)
    torch.testing.assert_close(
        prefilled(model, "torch", room), prefilled(model, None), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("q_rank", [None, 9])
def test_absorbed_attention_equals_expanded(backend: Any, q_rank: int | None) -> None:
    """Of latents, in float64: with a cache, and each sequence by itself without one."""
    model = make_model(FULL, FULL, dtype=torch.float64, latent=Latent(q_rank, 24, 10, 6))
    hidden = prefilled(model, backend, room=30).split([20, 9, 5, 33, 70, 17])
    attend, start = causal_attend(model.config), {1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5}
    for prompt in PROMPTS:
        ids = torch.tensor(sum(prompt, ()))
        with torch.no_grad():
            alone = model(ids, torch.arange(len(ids)), attend)
        both = torch.cat([hidden[start[segment[0]]] for segment in prompt])
        torch.testing.assert_close(both, alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("product", [linear, lambda x, w, b: x @ w.T])
def test_each_head_is_multiplied_by_itself(product: Any) -> None:
    x, weight = torch.rand(7, 3, 5), torch.rand(3, 4, 5)
    expected = torch.einsum("thk,hnk->thn", x, weight)
    torch.testing.assert_close(by_head(x, weight, product), expected)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("backend", ["flash-attn", "xformers"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_other_backends(backend: Any, options: tuple[AttentionOptions, ...]) -> None:
    """In bfloat16, as far from float64 as our own attention is, within a factor of 2."""
    if backend == "xformers":
        options = tuple(replace(each, softcap=None) for each in options)
    model = make_model(*options, dtype=torch.bfloat16)
    exact = prefilled(make_model(*options, dtype=torch.bfloat16).double(), None)
    theirs, ours = (
        (prefilled(model, each).double() - exact).square().mean().sqrt() for each in (backend, None)
    )
    assert 0 < theirs <= 2 * ours


def test_a_shared_segment_is_one_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """All queries below a node in one pair; a window, one pair for each piece and no further."""
    cache = make_cache(0, 16, 400)
    forest = Forest(cache)
    ends, _ = forest.grow(PROMPTS)
    fresh = [node for end in ends for node in forest.allocate(end) or []]
    calls: list[tuple[list[int], list[int], bool]] = []

    def counted(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        calls.append((rest[0], rest[1], rest[3]))
        return attention(q, k, v, *rest)

    attention = module.segment_attention
    monkeypatch.setattr(module, "segment_attention", counted)
    pieces = [(node, 0, len(node.token_ids)) for node in fresh]
    segments = SegmentPrefill(pieces, "torch", torch.device("cpu"))
    q = torch.zeros(160, 1, 1)
    lengths = [len(node.token_ids) for node in fresh]
    cumulated = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert segments.attend(q, cache.k[0], cache.v[0], FULL).shape == (160, 1, 1)
    assert calls[0] == (cumulated, cumulated, True)
    # The head over 9 + 5 + 33 + 70 queries, the segment below it over 5 + 33.
    assert calls[1:] == [([0, 117, 155], [0, 20, 29], False)]
    calls.clear()
    segments.attend(q, cache.k[0], cache.v[0], AttentionOptions(1.0, None, 4))
    keys = [20, 9 + 3, 5 + 3, 33 + 3, 70 + 3, 17]
    assert calls == [(cumulated, [0, *torch.tensor(keys).cumsum(0).tolist()], True)]


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("backend", "options", "dtype", "message"),
    [
        ("triton", FULL, torch.bfloat16, "'triton' does not run on cpu here"),
        ("flash-attn", FULL, torch.float32, "flash-attn takes float16 and bfloat16"),
        ("xformers", AttentionOptions(1.0, 5.0), torch.bfloat16, "xformers has no soft-cap"),
        ("cudnn", FULL, torch.bfloat16, "got 'cudnn'"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_at_once(
    backend: Any, options: AttentionOptions, dtype: torch.dtype, message: str
) -> None:
    model = make_model(FULL, options, dtype=dtype)
    cache = make_cache(0, 16, 16, model.config, dtype)
    with pytest.raises(ValueError, match=message):
        CachedForward(model, cache, prefill_backend=backend)


def test_an_absent_package_is_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    model = make_model(FULL, dtype=torch.bfloat16)
    config: ModelConfig = model.config
    with pytest.raises(ValueError, match=r"pip install 'quorum-grm\[flash\]'"):
        CachedForward(model, make_cache(0, 16, 16, config), prefill_backend="flash-attn")


def test_the_option_reaches_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts go through the backend, the key says so, and a plain key is as it was."""
    judge = Judge.load("models/pocket", dtype="float32", device="cpu")
    calls = 0
    attention = module.segment_attention

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return attention(*args)

    monkeypatch.setattr(module, "segment_attention", counted)
    arguments: dict[str, Any] = {"k": 2, "temperature": 0.0, "max_new_tokens": 40, "id": "a"}
    plain = judge("Which is longer?", ["a", "bb"], **arguments)
    assert not calls
    verdict = judge("Which is longer?", ["a", "bb"], attention="torch", **arguments)
    assert calls and calls % judge.model.config.num_layers == 0
    assert [s.token_ids[:8] for s in verdict.samples] == [s.token_ids[:8] for s in plain.samples]
    assert verdict.key != plain.key
    with pytest.raises(ValueError, match="'triton' does not run on cpu"):
        judge.rows([], attention="triton")
    with pytest.raises(ValueError, match="attention = 'cudnn' is not auto"):
        judge.rows([], attention="cudnn")
    with pytest.raises(ValueError, match="deterministic needs attention = 'auto'"):
        judge.rows([], attention="torch", deterministic=True)
