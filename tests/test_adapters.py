"""Rewards in other people's trainers, whose calls are made here as they make them."""

import asyncio
import importlib.util
import inspect
import math
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from engine.adapters import nemo_gym, openrlhf, scorer
from engine.adapters.collector import GroupCollector
from engine.adapters.scorer import (
    HttpScorer,
    LocalScorer,
    NoVerdict,
    Question,
    Scored,
    groups_of,
    rewards_of,
)
from engine.adapters.trl import QuorumReward
from engine.adapters.verl import compute_score
from engine.judge import Judge
from engine.request import Row, make_row
from engine.sample import POCKET
from engine.verdict import RowFailure, Sample, Verdict
from tests.judge_server import Served, serving
from train.world.rows import split_rows

OPTIONS: dict[str, Any] = {"k": 2, "max_new_tokens": 200, "stop": "box"}


class LengthJudge:
    """Scores a response by its length. Fails rows that say FAIL, and has no vote on those that say
    LOST."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.options: list[dict[str, Any]] = []

    def submit(
        self, entry: Row, *, deadline_seconds: float | None = None, **options: Any
    ) -> "Future[Verdict | RowFailure]":
        if options.get("k", 1) < 1:
            raise ValueError(f"k = {options['k']} is less than 1")
        self.rows.append(entry)
        self.options.append({**options, "deadline_seconds": deadline_seconds})
        pending: Future[Verdict | RowFailure] = Future()
        pending.set_result(self._outcome(entry))
        return pending

    def _outcome(self, row: Row) -> Verdict | RowFailure:
        asked = row.messages[-1].content
        if "FAIL" in asked:
            return RowFailure(row.id, None, "key", "the prompt is too long")
        order = tuple(range(len(row.responses)))
        lost = Sample(order, "", None, "truncated", None, 5, "length", [], [], [])
        lengths = tuple(map(len, row.responses))
        voted = Sample(order, "", lengths, None, None, 5, "box", [], [], [])
        is_lost = "LOST" in asked
        return Verdict(
            id=row.id, key="key", best=None if is_lost else 0,
            scores=None if is_lost else list(lengths),
            mean_scores=None if is_lost else [float(length) for length in lengths],
            tie=False, k=2, valid=int(not is_lost), votes=int(not is_lost),
            samples=[lost, lost if is_lost else voted],
            prompt_tokens=1, tree_tokens=1, decode_tokens=1,
        )  # fmt: skip


@pytest.fixture
def lengths() -> LengthJudge:
    return LengthJudge()


@pytest.fixture
def served(lengths: LengthJudge) -> Iterator[Served]:
    with serving(lengths) as server:
        yield server


# What they share


def test_a_judge_here_and_one_served_give_what_rows_gives() -> None:
    """With references, principles and a conversation; from several threads, and from a loop."""
    judge = Judge.load(POCKET, max_batch=12)
    rows = split_rows("adapters", "final", 18, "row")
    questions = [
        Question([{"role": m.role, "content": m.content} for m in row.messages], row.responses)
        for row in rows
    ]
    questions[0] = Question(rows[0].messages[-1].content, rows[0].responses, "a b c", "name 5")
    plain = [
        make_row(each.prompt, each.responses, reference=each.reference, principles=each.principles)
        for each in questions
    ]
    expected = []
    for outcome in judge.rows(plain, **OPTIONS):
        assert isinstance(outcome, Verdict)
        means = None if outcome.mean_scores is None else tuple(outcome.mean_scores)
        expected.append((means, outcome.valid, 2))
    assert len({means for means, *_ in expected}) > 12

    def plainly(answers: list[Scored]) -> list[Any]:
        return [(each.scores, each.valid, each.drawn) for each in answers]

    here = LocalScorer(judge, OPTIONS)
    with serving(judge, "secret") as server:
        there = HttpScorer(server.url + "/", OPTIONS, api_key="secret")
        for each in (here, there):
            with ThreadPoolExecutor(3) as threads:
                found = list(threads.map(each.score, [questions[i::3] for i in range(3)]))
            assert [plainly(answers) for answers in found] == [expected[i::3] for i in range(3)]
            assert plainly(asyncio.run(each.score_async(questions))) == expected
        assert len(server.bodies) == 2 * len(questions)
        with pytest.raises(RuntimeError, match=r"401 Unauthorized.*no such key"):
            HttpScorer(server.url, OPTIONS, api_key="other").score(questions)
    judge.close()


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_row_that_fails_fails_alone(where: str, lengths: LengthJudge, served: Served) -> None:
    asked: Any = lengths if where == "here" else served.url
    each = scorer.scorer_of(asked, {"k": 2}, deadline_seconds=9.5)
    questions = [
        Question("a", ["x", "yyy"]),
        Question("FAIL", ["x"]),
        Question("bad \ud800", ["x"]),
        Question("LOST", ["x", "y"]),
        Question([{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}], ["x"]),
        Question("d", ["zz"]),
    ]
    answers = each.score(questions)
    assert [answer.scores for answer in answers] == [(1, 3), None, None, None, None, (2,)]
    assert [(a.valid, a.drawn) for a in answers] == [(1, 2), (0, 0), (0, 0), (0, 2), (0, 0), (1, 2)]
    reasons = [answer.error for answer in answers]
    assert reasons[0] is None and reasons[1] == "the prompt is too long"
    assert reasons[3] == "no sample voted (truncated)"
    assert "surrogate" in str(reasons[2]) and "ends with a message" in str(reasons[4])
    assert lengths.options == [{"k": 2, "deadline_seconds": 9.5}] * 4
    assert each.score([]) == []


def test_options_that_are_wrong_are_an_error(lengths: LengthJudge, served: Served) -> None:
    asked: Any = lengths
    with pytest.raises(ValueError, match="k = 0"):
        LocalScorer(asked, {"k": 0}).score([Question("a", ["x"])])
    with pytest.raises(RuntimeError, match=r"400 Bad Request.*k = 0 is less than 1"):
        HttpScorer(served.url, {"k": 0}).score([Question("a", ["x"])])
    served.busy, served.refusal = 1, (413, {})
    (lost,) = HttpScorer(served.url).score([Question("a", ["x"])])
    assert lost.scores is None and "413 " in str(lost.error)
    with pytest.raises(ValueError, match="'host:8000' does not begin"):
        HttpScorer("host:8000")
    with pytest.raises(ValueError, match="api_key has no meaning"):
        scorer.scorer_of(asked, {}, api_key="x")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Those between two requests, in no time; a clock goes on by as much."""
    waited: list[float] = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout is not None and not self.is_set():
                waited.append(timeout)
            return self.is_set()

    monkeypatch.setattr(scorer, "threading", SimpleNamespace(Event=Event))
    monkeypatch.setattr(scorer, "time", SimpleNamespace(monotonic=lambda: sum(waited)))
    return waited


def test_a_busy_server_is_asked_again(served: Served, pauses: list[float]) -> None:
    served.busy = 2
    question = Question("a", ["x", "yyy"])
    assert HttpScorer(served.url).score([question])[0].scores == (1, 3)
    assert pauses == [7, 7] and len(served.bodies) == 3
    pauses.clear()
    served.busy, served.refusal = 7, (503, {})
    assert HttpScorer(served.url).score([question])[0].scores == (1, 3)
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    pauses.clear()
    served.busy, served.refusal = 1, (0, {})  # it goes away in the middle
    assert HttpScorer(served.url).score([question])[0].scores == (1, 3)
    assert pauses == [1]
    served.busy, served.refusal = 1, (429, {"Retry-After": "61"})
    with pytest.raises(RuntimeError, match=r"429 Too Many Requests.*busy.*asked for 60 s"):
        HttpScorer(served.url, patience_seconds=60).score([question])


def test_a_server_that_is_not_there(pauses: list[float]) -> None:
    with serving(LengthJudge()) as server:
        pass
    with pytest.raises(RuntimeError, match="refused; asked for 10 s"):
        HttpScorer(server.url, patience_seconds=10).score([Question("a", ["x"])])
    assert pauses == [1, 2, 4]


def test_a_refusal_ends_what_is_asked_beside_it(served: Served) -> None:
    """The second of two requests would be made again after an hour."""
    served.busy, served.refusal = 1, (429, {"Retry-After": "3600"})
    asked = HttpScorer(served.url, {"k": 0}, patience_seconds=7200)
    questions = [Question("a", ["x"]), Question("b", ["x"])]
    for ask in (asked.score, lambda each: asyncio.run(asked.score_async(each))):
        served.busy = 1
        with pytest.raises(RuntimeError):
            ask(questions)


def test_groups() -> None:
    assert groups_of("aabb", 2) == [[0, 1], [2, 3]]
    assert groups_of("aaaabb", 2) == [[0, 1], [2, 3], [4, 5]]  # a prompt that is there twice
    assert groups_of("abab", 2) == [[0, 2], [1, 3]]
    assert groups_of("aaabb", 2) == [[0, 1, 2], [3, 4]]
    assert groups_of("aaab") == [[0, 1, 2], [3]]
    assert groups_of("", 2) == []


def test_rewards() -> None:
    scores = [3.0, 8.0, 3.0, 1.0]
    assert rewards_of(scores, "mean") == scores
    assert rewards_of(scores, "rank") == [0.5, 1.0, 0.5, 0.0]
    found = np.array(rewards_of(scores, "standardised"))
    assert found == pytest.approx((np.array(scores) - 3.75) / np.std(scores), rel=1e-12)
    assert rewards_of([4.0, 4.0], "rank") == [0.5, 0.5]
    assert rewards_of([4.0, 4.0], "standardised") == [0.0, 0.0]
    assert rewards_of([4.0], "mean") == [4.0]
    assert rewards_of([4.0], "rank") is None and rewards_of([4.0], "standardised") is None
    assert rewards_of(None, "mean") is None


# TRL


def trl_call(reward: Any, prompts: list[Any], completions: list[Any], **columns: Any) -> list[Any]:
    """As GRPOTrainer calls it; returns rewards, metrics and extra columns."""
    metrics: dict[str, float] = {}
    extra: dict[str, list[Any]] = {}
    arguments: dict[str, Any] = {
        "prompts": prompts, "completions": completions,
        "completion_ids": [[1, 2]] * len(prompts), "trainer_state": object(),
        "log_metric": metrics.__setitem__, "log_extra": extra.__setitem__,
    }  # fmt: skip
    found = reward(**arguments, **columns)
    if inspect.iscoroutine(found):
        found = asyncio.run(found)
    return [found, metrics, extra]


@pytest.mark.parametrize("is_async", [False, True])
def test_trl(is_async: bool, lengths: LengthJudge) -> None:
    asked: Any = lengths
    whole = QuorumReward(asked, name="mine", num_generations=2, k=4)
    reward: Any = whole.as_async() if is_async else whole
    assert reward.__name__ == "mine" and inspect.iscoroutinefunction(reward) == is_async
    prompts = ["a", "a", "a", "a", "LOST", "LOST"]
    found, metrics, extra = trl_call(reward, prompts, ["x", "yy", "", "zzzz", "x", "y"])
    assert found == [1, 2, 0, 4, None, None]
    assert [row.responses for row in lengths.rows] == [("x", "yy"), ("", "zzzz"), ("x", "y")]
    assert lengths.options[0]["k"] == 4
    assert metrics == {"mine/valid_share": 2 / 6, "mine/no_verdict": 2 / 6}
    assert extra == {"mine/valid_share": [0.5] * 4 + [0.0] * 2}
    failed, metrics, extra = trl_call(reward, ["FAIL", "FAIL"], ["x", "y"])
    assert failed == [None, None] and math.isnan(metrics["mine/valid_share"])
    assert metrics["mine/no_verdict"] == 1 and extra == {"mine/valid_share": [None, None]}


def test_trl_conversations_and_columns(lengths: LengthJudge) -> None:
    asked: Any = lengths
    reward = QuorumReward(asked, reward="rank", reference="solution", principles="rubric")
    user = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    prompts = [user, user, user, [{"role": "user", "content": "b"}]]
    completions = [[{"role": "assistant", "content": text}] for text in ("x", "yyy", "zz", "w")]
    columns = {"solution": ["1", "1", "2", None], "rubric": ["p", "p", "p", None], "other": [7] * 4}
    found, *_ = trl_call(reward, prompts, completions, **columns)
    assert found == [0, 1, None, None]  # those alone in their group have no rank
    rows = [(row.messages[-1].content, row.responses, row.reference, row.principles)
            for row in lengths.rows]  # fmt: skip
    assert rows == [
        ("a", ("x", "yyy"), "1", "p"), ("a", ("zz",), "2", "p"), ("b", ("w",), None, None),
    ]  # fmt: skip
    assert [message.role for message in lengths.rows[0].messages] == ["system", "user"]
    with pytest.raises(ValueError, match="'solution' is no column"):
        trl_call(reward, prompts, completions)
    tools = [[{"role": "assistant", "content": "x"}, {"role": "tool", "content": "y"}]]
    with pytest.raises(ValueError, match="a completion of 2 messages"):
        trl_call(QuorumReward(asked), [user], tools)
    for bad in ({"reward": "best"}, {"num_generations": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} = "):
            QuorumReward(asked, **bad)


# verl


def test_verl(served: Served, lengths: LengthJudge) -> None:
    """Sixty at once, as from a batch of rollouts; all have the same keys."""

    async def batch() -> list[dict[str, float]]:
        calls = [
            compute_score(
                data_source="set", solution_str="x" * (i + 1), ground_truth=4, url=served.url,
                extra_info={"question": "LOST" if i == 7 else f"q{i}", "num_turns": 2},
                no_verdict=5.5, use_ground_truth=i == 3, options={"k": 2},
                reward_router_address=None,
            )
            for i in range(60)
        ]  # fmt: skip
        return await asyncio.gather(*calls)

    found = asyncio.run(batch())
    assert [each["score"] for each in found] == [5.5 if i == 7 else i + 1 for i in range(60)]
    assert {tuple(each) for each in found} == {("score", "valid_share", "no_verdict")}
    assert [i for i, each in enumerate(found) if each["no_verdict"]] == [7]
    assert {row.messages[0].content: row.reference for row in lengths.rows if row.reference} == {
        "q3": "4"
    }
    call: Any = {"data_source": "", "solution_str": "x", "ground_truth": None, "url": served.url}
    with pytest.raises(NoVerdict, match="no sample voted"):
        asyncio.run(compute_score(**call, extra_info={"question": "LOST"}))
    with pytest.raises(ValueError, match="'question' is not in extra_info, which has index"):
        asyncio.run(compute_score(**call, extra_info={"index": 1}))


def test_a_collected_group_is_one_row(lengths: LengthJudge) -> None:
    """Whatever comes first, and beside another group; equal responses have equal scores."""
    asked: Any = lengths
    texts = ["ccc", "a", "bb", "a"]

    async def ask(order: list[int]) -> dict[int, float]:
        collector = GroupCollector(LocalScorer(asked), 4, 60)

        async def one(index: int) -> tuple[int, float]:
            scored, place = await collector.score("g", Question("q", [texts[index]]))
            assert scored.scores is not None
            return index, scored.scores[place]

        others = [collector.score("h", Question("r", ["x"])) for _ in range(4)]
        found, _ = await asyncio.gather(asyncio.gather(*map(one, order)), asyncio.gather(*others))
        assert not collector._groups and not collector._tasks
        return dict(found)

    for order in ([0, 1, 2, 3], [3, 2, 0, 1]):
        assert asyncio.run(ask(order)) == {0: 3, 1: 1, 2: 2, 3: 1}
    assert [row.responses for row in lengths.rows if row.messages[0].content == "q"] == [
        ("a", "a", "bb", "ccc")
    ] * 2


def test_patience_is_with_all_groups(lengths: LengthJudge) -> None:
    """A group waits on as long as others' responses come."""
    asked: Any = lengths

    class Loop(asyncio.SelectorEventLoop):
        """Its timers fire when they are told to."""

        timers: ClassVar[list[Any]] = []

        def call_later(  # type: ignore[override]
            self, delay: float, callback: Any, *arguments: Any, **_: Any
        ) -> Any:
            handle = asyncio.TimerHandle(0, callback, arguments, self)
            self.timers.append((delay, handle, callback))
            return handle

    async def ask() -> list[Any]:
        collector = GroupCollector(LocalScorer(asked), 3, 60)
        keys = "gghg"
        calls = [
            asyncio.create_task(collector.score(key, Question(key, [f"{key}{i}"])))
            for i, key in enumerate(keys)
        ]
        await asyncio.sleep(0)
        live = [callback for _, handle, callback in Loop.timers if not handle.cancelled()]
        assert [delay for delay, *_ in Loop.timers] == [60] * 4 and len(live) == 1
        live[0]()
        return await asyncio.gather(*calls)

    with asyncio.Runner(loop_factory=Loop) as runner:
        found = runner.run(ask())
    assert [place for _, place in found] == [0, 1, 0, 2]
    assert sorted(row.responses for row in lengths.rows) == [("g0", "g1", "g3"), ("h2",)]


def test_a_group_that_is_not_whole(lengths: LengthJudge) -> None:
    """It is judged when its patience is over, and a fault reaches all who wait."""
    asked: Any = lengths

    async def ask(question: str) -> Any:
        collector = GroupCollector(LocalScorer(asked), 4, 0.02)
        calls = [collector.score("g", Question(question, ["x" * i])) for i in (1, 2)]
        return await asyncio.gather(*calls, return_exceptions=True)

    (first, place), (second, other) = asyncio.run(ask("q"))
    assert first == second and first.scores == (1, 2) and (place, other) == (0, 1)
    assert len(lengths.rows) == 1

    def fault(*_: Any, **__: Any) -> None:
        raise MemoryError("full")

    lengths.submit = fault  # type: ignore[method-assign, assignment]
    assert [str(error) for error in asyncio.run(ask("q"))] == ["full"] * 2
    for size, seconds in ((0, 1.0), (2, 0.0)):
        with pytest.raises(ValueError, match=r"(size|patience_seconds) = 0"):
            GroupCollector(LocalScorer(asked), size, seconds)


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class, with a stand-in for its base in verl."""

    class RewardManagerBase:
        def __init__(self, config: Any, tokenizer: Any, compute_score: Any) -> None:
            self.config, self.tokenizer = config, tokenizer
            self.loop = asyncio.get_event_loop()

    name = "verl.experimental.reward_loop.reward_manager.base"
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    sys.modules[name].RewardManagerBase = RewardManagerBase  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "engine.adapters.verl_groups", raising=False)
    from engine.adapters.verl_groups import QuorumRewardManager

    yield QuorumRewardManager
    monkeypatch.delitem(sys.modules, "engine.adapters.verl_groups")


class Config(dict):
    """As omegaconf's: keys are attributes."""

    def __getattr__(self, name: str) -> Any:
        value = self[name]
        return Config(value) if isinstance(value, dict) else value


def verl_config(quorum: dict[str, Any], workers: int = 1) -> Config:
    return Config(
        reward={"num_workers": workers, "reward_kwargs": {"quorum": quorum}},
        actor_rollout_ref={"rollout": {"n": 2}},
    )


class Batch(list):
    """As verl's DataProto: a slice is one too."""

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return Batch(found) if isinstance(key, slice) else found


def rollout(uid: str, text: str, question: str) -> Batch:
    """A sample padded on both sides, as verl has it; the first sequence does not count."""
    codes = torch.tensor([ord(letter) for letter in text])
    item = SimpleNamespace(
        batch={
            "responses": torch.cat([codes, torch.zeros(3, dtype=torch.int64)]),
            "attention_mask": torch.tensor([0, 1, 1] + [1] * len(text) + [0] * 3),
        },
        non_tensor_batch={
            "uid": uid, "raw_prompt": np.array([{"role": "user", "content": question}]),
            "reward_model": {"ground_truth": 12},
        },
    )  # fmt: skip
    return Batch([None, item])


class Letters:
    """A tokenizer whose ids are code points."""

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(map(chr, ids.tolist()))


def test_verl_groups(manager: Any, served: Served, lengths: LengthJudge) -> None:
    settings = {
        "url": served.url, "no_verdict": 5.5, "options": {"k": 2}, "reward": "rank",
        "use_ground_truth": True,
    }  # fmt: skip

    async def batch() -> list[Any]:
        made = manager(verl_config(settings), Letters(), None)
        data = [
            rollout("g", "yyy", "a"), rollout("h", "x", "LOST"), rollout("i", "xx", "a"),
            rollout("g", "x", "a"), rollout("h", "y", "LOST"), rollout("i", "x", "a"),
        ]  # fmt: skip
        return await asyncio.gather(*(made.run_single(each) for each in data))

    found = asyncio.run(batch())
    assert [each["reward_score"] for each in found] == [1, 5.5, 1, 0, 5.5, 0]
    assert [each["reward_extra_info"]["no_verdict"] for each in found] == [0, 1, 0] * 2
    assert sorted(row.responses for row in lengths.rows) == [("x", "xx"), ("x", "y"), ("x", "yyy")]
    assert {row.reference for row in lengths.rows} == {"12"}

    async def make(*arguments: Any) -> None:
        manager(verl_config(*arguments), Letters(), None)

    for arguments, named in (
        ((settings, 8), "num_workers = 8"), (({},), "no url"),
        ((settings | {"reward": "best"},), "reward = 'best'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            asyncio.run(make(*arguments))


# OpenRLHF


def test_openrlhf(served: Served, lengths: LengthJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded as OpenRLHF loads it, by its path, and called in threads with one response each."""
    monkeypatch.setenv("QUORUM_URL", served.url)
    monkeypatch.setenv("QUORUM_OPTIONS", '{"k": 2}')
    monkeypatch.setenv("QUORUM_NO_VERDICT", "5.5")
    monkeypatch.delenv("QUORUM_MODEL", raising=False)
    spec = importlib.util.spec_from_file_location("reward_func", Path(openrlhf.__file__))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prompt = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    label = '{"prompt": [{"role": "user", "content": "q"}], "principles": "p"}'
    barrier = threading.Barrier(8)

    def call(index: int) -> Any:
        barrier.wait()
        query = prompt + "x" * index + "<|im_end|><|endoftext|>"
        asked = "LOST" if index == 5 else label
        return module.reward_func([query], [prompt], [asked])

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(call, range(8)))
    rewards = [each["rewards"].tolist() for each in found]
    assert rewards == [[5.5 if i == 5 else i] for i in range(8)]
    assert found[4]["scores"].tolist() == pytest.approx([3 / 9])
    logs = [each["extra_logs"] for each in found]
    assert [each["quorum_no_verdict"].item() for each in logs] == [float(i == 5) for i in range(8)]
    assert logs[0]["quorum_valid_share"].item() == 0.5
    assert {row.principles for row in lengths.rows} == {"p", None}
    assert {len(row.responses) for row in lengths.rows} == {1}
    assert len(module._made) == 1


def test_openrlhf_refusals(lengths: LengthJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Any = lengths
    reward_func = openrlhf.make_reward_func(LocalScorer(asked))
    with pytest.raises(NoVerdict, match="too long"):
        reward_func(["px"], ["p"], ["FAIL"])
    for query, label, named in (
        ("x", "q", "'x' does not begin with its prompt"), ("px", "", "label is empty"),
        ("px", '{"reference": "r"}', "has no prompt"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            reward_func([query], ["p"], [label])
    with pytest.raises(ValueError, match="no width"):
        openrlhf.make_reward_func(LocalScorer(asked), score_range=(3, 3))
    for name in ("QUORUM_URL", "QUORUM_MODEL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="set QUORUM_URL"):
        scorer.scorer_of_environment()
    monkeypatch.setenv("QUORUM_MODEL", str(POCKET))
    monkeypatch.setenv("QUORUM_OPTIONS", '{"k": 3}')
    local = scorer.scorer_of_environment()
    assert isinstance(local, LocalScorer) and isinstance(local.judge, Judge)
    monkeypatch.setenv("QUORUM_OPTIONS", "[3]")
    with pytest.raises(ValueError, match=r"QUORUM_OPTIONS = \[3\] is no JSON object"):
        scorer.scorer_of_environment()


# NeMo-Gym


def test_nemo_gym(lengths: LengthJudge) -> None:
    """A body as genrm_compare takes it, with reasoning, which is not judged, and no text at all."""
    asked: Any = lengths

    def response(*texts: str) -> dict[str, Any]:
        parts = [{"type": "output_text", "text": text} for text in texts]
        thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
        return {"id": "r", "output": [thought, {"type": "message", "content": parts}]}

    body = {
        "conversation_history": [{"role": "user", "content": "q"}],
        "response_objs": [response("ab", "c"), response(), response("x")],
        "principle": "be short",
    }
    found = asyncio.run(nemo_gym.answer(LocalScorer(asked), body))
    assert found == {
        "rewards": [3.0, 0.0, 1.0],
        "comparison_results": None,
        "metrics": {"no_verdict": 0.0, "valid_share": 0.5},
    }
    assert lengths.rows[0].principles == "be short"
    assert lengths.rows[0].responses == ("abc", "", "x")
    lost = body | {"conversation_history": [{"role": "user", "content": "FAIL"}]}
    with pytest.raises(NoVerdict):
        asyncio.run(nemo_gym.answer(LocalScorer(asked), lost))
    given = asyncio.run(nemo_gym.answer(LocalScorer(asked), lost, reward="rank", no_verdict=0.5))
    assert given["rewards"] == [0.5] * 3 and given["metrics"] == {"no_verdict": 1.0}
