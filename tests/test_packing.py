"""Packed batches: their layout, and a tree's loss and gradients against each trajectory alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models import load
from models.transformer import Transformer, causal_attend
from tests.tiny import FAMILIES, write_model
from train.packing import pack, packed_attention
from train.trajectories import Trajectory

HEAD, A, B, TAIL = (5, 6, 7), (8, 9), (10,), (11, 12, 13, 14)


def test_a_batch_is_laid_out_as_its_tree() -> None:
    """Two judgements of one prompt, one of a prompt that shares its head, one of another."""
    batch = pack(
        [
            Trajectory([HEAD, A, TAIL], [20, 21, 2]),
            Trajectory([HEAD, B, TAIL], [30, 2]),
            Trajectory([HEAD, A, TAIL], [22, 2]),
            Trajectory([(9,)], [2]),
        ]
    )
    # head | A tail | 20 21 | 22 | B tail 30 | 9, where what does not branch is one segment
    tokens = [5, 6, 7, 8, 9, 11, 12, 13, 14, 20, 21, 22, 10, 11, 12, 13, 14, 30, 9]
    assert batch.num_tokens == len(tokens) == 19 and len(batch.token_ids) == 32
    assert batch.token_ids.tolist() == tokens + [0] * 13
    at = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 9, 3, 4, 5, 6, 7, 8, 0]
    assert batch.positions.tolist() == at + [0] * 13
    assert batch.predicting.tolist() == [8, 9, 10, 16, 17, 8, 11, 18]
    assert batch.target.tolist() == [20, 21, 2, 30, 2, 22, 2, 2]
    assert batch.lengths == (3, 2, 2, 1) and batch.longest == 11
    seen = {(query, key) for query, _, key, _, _ in batch.plan.tiles.tolist()}
    assert seen == {
        (0, 0), (3, 0), (3, 3), (9, 0), (9, 3), (9, 9), (11, 0), (11, 3), (11, 11),
        (12, 0), (12, 12), (18, 18),
    }  # fmt: skip
    for tensor in (batch.token_ids, batch.positions, batch.predicting, batch.target):
        assert tensor.dtype == torch.int64


def test_one_trajectory_is_one_segment() -> None:
    batch = pack([Trajectory([HEAD, A], [20, 21, 2])])
    assert batch.plan.tiles.tolist() == [[0, 7, 0, 7, 0]]


@pytest.mark.parametrize(
    ("prompt", "completion"), [([], [1]), ([()], [1]), ([(1,)], [])], ids=["none", "empty", "mute"]
)
def test_nothing_to_predict_or_to_predict_from_is_refused(
    prompt: list[tuple[int, ...]], completion: list[int]
) -> None:
    with pytest.raises(ValueError, match="trajectory 1 has an empty"):
        pack([Trajectory([(1,)], [2]), Trajectory(prompt, completion)])
    with pytest.raises(ValueError, match="no trajectories"):
        pack([])


@st.composite
def groups(draw: st.DrawFn) -> list[Trajectory]:
    """Judgements of prompts that share segments here and there; some are the same text twice."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 320, (length,), generator=generator).tolist())

    pool = [ids(draw(st.integers(1, 70))) for _ in range(4)]
    prompts = draw(st.lists(st.lists(st.sampled_from(pool), min_size=1, max_size=3), max_size=3,
                            min_size=1))  # fmt: skip
    return [
        Trajectory(prompt, ids(draw(st.integers(1, 40))))
        for prompt in prompts
        for _ in range(draw(st.integers(1, 3)))
    ]


def gradients(model: Transformer, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def alone(model: Transformer, trajectory: Trajectory) -> Tensor:
    """Log-probs of a completion under plain causal attention over its own sequence, on whole
    logits."""
    prompt = [t for segment in trajectory.prompt for t in segment]
    ids = torch.tensor([*prompt, *trajectory.completion])
    hidden = model(ids[:-1], torch.arange(len(ids) - 1), causal_attend(model.config))
    log_p = torch.log_softmax(model.head(hidden), -1)
    return log_p[torch.arange(len(ids) - 1), ids[1:]][len(prompt) - 1 :]


def together(model: Transformer, trajectories: list[Trajectory]) -> Tensor:
    batch = pack(trajectories)
    hidden = model(batch.token_ids, batch.positions, packed_attention(model.config, batch))
    log_p = torch.log_softmax(model.head(hidden[batch.predicting]), -1)
    return log_p[torch.arange(len(batch.target)), batch.target]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """With soft-caps in one family, and windows of 9 or 11 tokens in two."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    write_model(directory, request.param)
    return load(directory)[0].double()


@settings(max_examples=8, deadline=None)
@given(trajectories=groups())
def test_a_tree_is_its_trajectories_one_by_one(
    model: Transformer, trajectories: list[Trajectory]
) -> None:
    """Log-probs, and the gradients of every parameter, with other weights on every token."""
    weight: Callable[[Tensor], Tensor] = lambda x: torch.linspace(-1, 1, len(x)).to(x)  # noqa: E731
    expected = torch.cat([alone(model, each) for each in trajectories])
    exact = gradients(model, (weight(expected) * expected).sum())
    found = together(model, trajectories)
    ours = gradients(model, (weight(found) * found).sum())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-11


def test_a_sequence_beyond_the_context_is_refused(model: Transformer) -> None:
    longest = Trajectory([tuple(range(1, 100)) * 41], list(range(5, 44)))
    assert len(longest.prompt[0]) + 39 == 4098
    with pytest.raises(ValueError, match="4097 tokens, the context 4096"):
        packed_attention(model.config, pack([longest]))
