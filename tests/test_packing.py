"""Packed batches: their layout, and attention that keeps the sequences apart."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.config import LayerAttention, ModelConfig, Rope
from train.data import Trajectory
from train.packing import pack, packed_attention

CONFIG = ModelConfig(
    architecture="qwen3",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    v_head_dim=6,
    max_position_embeddings=32,
    rms_norm_eps=1e-6,
    rope=Rope(10000.0, None),
    attention=(LayerAttention(0.4, None, None), LayerAttention(0.3, None, 20)),
    attention_bias=False,
    qk_norm=True,
    norm_plus_one=False,
    sandwich_norms=False,
    embedding_scale=None,
    activation="silu",
    final_softcap=None,
    tied=True,
    eos_token_ids=frozenset({0}),
    dtype=None,
)


def test_pack_lays_sequences_back_to_back() -> None:
    batch = pack([Trajectory([5, 6, 7], [8, 9]), Trajectory([1], [2]), Trajectory([3, 4], [5, 6])])
    assert batch.lengths == (4, 1, 3)
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 1, 3, 4, 5]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 0, 1, 2]
    assert batch.predicting.tolist() == [2, 3, 4, 6, 7]
    assert batch.target.tolist() == [8, 9, 2, 5, 6]
    for tensor in (batch.token_ids, batch.positions, batch.predicting, batch.target):
        assert tensor.dtype == torch.int64


@pytest.mark.parametrize("prompt,completion", [([], [1]), ([1], [])])
def test_nothing_to_predict_or_to_predict_from_is_refused(
    prompt: list[int], completion: list[int]
) -> None:
    with pytest.raises(ValueError, match="trajectory 1 has an empty"):
        pack([Trajectory([1], [2]), Trajectory(prompt, completion)])
    with pytest.raises(ValueError, match="no trajectories"):
        pack([])


def one_by_one(layer: int, lengths: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each sequence, query and head by itself."""
    out, start = torch.zeros_like(q), 0
    scale, heads_per_kv = CONFIG.attention[layer].scale, CONFIG.num_heads // CONFIG.num_kv_heads
    for length in lengths:
        for i in range(start, start + length):
            for head in range(CONFIG.num_heads):
                kv = head // heads_per_kv
                scores = k[start : i + 1, kv] @ q[i, head] * scale
                out[i, head] = scores.softmax(0) @ v[start : i + 1, kv]
        start += length
    return out


def draw(lengths: list[int], seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(sum(lengths), heads, 6, generator=generator, dtype=torch.float64).to(dtype)
        for heads in (4, 2, 2)
    ]


@settings(max_examples=25)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 1), st.integers(0, 99))
def test_packed_attention_is_attention_of_each_sequence_alone(
    lengths: list[int], layer: int, seed: int
) -> None:
    exact = one_by_one(layer, lengths, *draw(lengths, seed, torch.float64))
    packed = packed_attention(CONFIG, lengths)
    torch.testing.assert_close(packed(layer, *draw(lengths, seed, torch.float64)), exact)
    # In float32: within a few times the error of the plain computation in float32.
    single = draw(lengths, seed, torch.float32)
    error = (one_by_one(layer, lengths, *single) - exact).abs().max()
    floor = torch.finfo(torch.float32).eps * exact.abs().max()
    assert (packed(layer, *single) - exact).abs().max() <= 4 * (error + floor)


def test_gradients_are_those_of_each_sequence_alone() -> None:
    lengths = [3, 7, 1]
    grads = []
    for packed in (True, False):
        tensors = [x.requires_grad_() for x in draw(lengths, 0, torch.float64)]
        out = (
            packed_attention(CONFIG, lengths)(0, *tensors)
            if packed
            else one_by_one(0, lengths, *tensors)
        )
        (out * torch.arange(out.numel()).reshape(out.shape)).sum().backward()
        grads.append([x.grad for x in tensors])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_sequence_is_blind_to_the_others_and_to_its_future() -> None:
    lengths = [4, 6, 5]
    q, k, v = draw(lengths, 1, torch.float32)
    attend = packed_attention(CONFIG, lengths)
    before = attend(0, q, k, v)
    k[7:], v[7:] = 1e6, 1e30  # from the middle of the second sequence on
    after = attend(0, q, k, v)
    assert torch.equal(after[:7], before[:7])
    assert (after[7:] != before[7:]).all()


def test_what_torch_attention_lacks_is_refused() -> None:
    capped = replace(CONFIG, attention=(CONFIG.attention[0], LayerAttention(0.4, 50.0, None)))
    with pytest.raises(ValueError, match=r"layer 1 has a soft-cap of 50\.0"):
        packed_attention(capped, [3])
    with pytest.raises(ValueError, match="layer 1 has a window of 20 < 21"):
        packed_attention(CONFIG, [3, 21])
    with pytest.raises(ValueError, match="33 tokens, the context 32"):
        packed_attention(CONFIG, [33])
    packed_attention(CONFIG, [20])
