"""Live samples that write boxes, end, or run into their limit, for tests of `accept_token`."""

import random
from dataclasses import fields

import torch
from torch import Tensor

from kernels.accept_token import LiveSamples, Records
from kernels.extract_scores import ScoreAutomaton, ScoreState

PIECES = [
    *(b"Scores: ", b"\\boxed{", b"1", b"7", b", ", b"2, 3", b"}", b"the ", b"\n", b"", b"x"),
    *(b"Scores: \\boxed{5, 6", b"}\n\\boxed{4}", b"11", b"<s>", b"</s>", b"<end>"),
]
SPECIAL_IDS = {14, 15, 16}
END_IDS = torch.tensor([15, 9, 16])
_SCRIPTS = [[0, 1, 3, 4, 2, 6], [0, 1, 5, 6], [11, 6], [0, 1, 3, 15], [14, 0, 1, 2, 6]]


def make_live(
    batch: int, max_tokens: int, automaton: ScoreAutomaton, finished: bool = False
) -> tuple[LiveSamples, Records]:
    """Samples of all limits in shuffled slots, some of them finished, and poisoned records with
    more slots than samples."""
    device = automaton.start(torch.zeros(0, dtype=torch.int64), 0).control.device
    generator = torch.Generator().manual_seed(batch)

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (batch,), generator=generator)

    records = Records.empty(batch + 3, max_tokens, device)
    records.tokens.fill_(-7)
    records.logprobs.fill_(float("nan"))
    slot = torch.randperm(batch + 3, generator=generator)[:batch]
    limit = torch.where(draw(0, 3) > 0, max_tokens, draw(1, max_tokens + 1))
    live = LiveSamples.start(limit.to(device), slot.to(device), automaton.start(draw(1, 4), 3))
    if finished:
        live.finished.copy_(draw(0, 5) == 0)
    return live, records


def draw_tokens(rng: random.Random, live: LiveSamples) -> tuple[Tensor, Tensor, Tensor]:
    """A token and two log-probs for each sample; most samples follow a script that leads to a
    box."""
    tokens = []
    for slot, count in zip(live.slot.tolist(), live.count.tolist(), strict=True):
        script = _SCRIPTS[slot % len(_SCRIPTS)] if slot % 3 else []
        follows = count < len(script) and rng.randrange(8)
        tokens.append(script[count] if follows else rng.randrange(len(PIECES)))
    device = live.token.device
    drawn = [[-rng.random() for _ in tokens] for _ in range(2)]
    logprobs = torch.tensor(drawn, dtype=torch.float32, device=device)
    token = torch.tensor(tokens, dtype=torch.int64, device=device)
    return token, logprobs[0], logprobs[1]


def assert_same_scores(state: ScoreState, expected: ScoreState) -> None:
    """Equal in all that is ever read. What stands in the slot of an item under way, and behind it,
    depends on how long the tokens of other rows were; it is written before it is read."""
    complete = torch.arange(state.items.shape[1] - 1, device=state.n.device) < state.count[:, None]
    items, theirs = (x.items[:, :-1].where(complete, 0) for x in (state, expected))
    assert items.equal(theirs), "items"
    for f in fields(ScoreState):
        if f.name != "items":
            assert getattr(state, f.name).equal(getattr(expected, f.name)), f.name


def assert_same(
    live: LiveSamples, records: Records, theirs: LiveSamples, their_records: Records
) -> None:
    """Equal in every tensor."""
    for name, value in live.tensors().items():
        assert value.equal(theirs.tensors()[name]), name
    assert_same_scores(live.scores, theirs.scores)
    for ours, other in zip(records.tensors(), their_records.tensors(), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=0, equal_nan=True)
