"""Rows that are submitted one by one: outcomes as they are done, the same as in a batch."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.generate import Generator
from engine.judge import Judge, JudgeSession
from engine.online import TOO_LATE, Worker
from engine.request import BadRow, Row, make_row
from engine.scalar_judge import ScalarJudge
from engine.session import RowJudge
from engine.verdict import RowFailure, Verdict, to_line
from models import load
from tests.tiny import write_model
from train.world import BASE
from train.world.rows import split_rows

OPTIONS: dict[str, Any] = {"k": 3, "max_new_tokens": 200, "stop": "box"}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return split_rows("online", "final", 12, "row")


@pytest.fixture
def judge() -> Iterator[Judge]:
    judge = Judge.load(BASE, max_batch=12)
    yield judge
    judge.close()


def lines(outcomes: Iterable[Any]) -> list[bytes]:
    return sorted(map(to_line, outcomes))


@pytest.fixture
def generators(monkeypatch: pytest.MonkeyPatch) -> list[Generator]:
    """Those that are made from now on."""
    made: list[Generator] = []
    init = Generator.__init__

    def noted(self: Generator, *arguments: Any, **options: Any) -> None:
        made.append(self)
        init(self, *arguments, **options)

    monkeypatch.setattr(Generator, "__init__", noted)
    return made


# One engine


def test_calls_share_an_engine_and_what_templates_begin_with(
    rows: list[Row], generators: list[Generator]
) -> None:
    judge = Judge.load(BASE)
    outcomes: list[Any] = []
    prefilled = []
    for row in rows[:3]:
        before = judge.usage.prefill_tokens
        outcomes += judge.rows([row], **OPTIONS)
        prefilled.append(judge.usage.prefill_tokens - before)
    assert len(generators) == 1
    alone: list[Any] = []
    for row, tokens in zip(rows[:3], prefilled, strict=True):
        fresh = Judge.load(BASE)
        alone += fresh.rows([row], **OPTIONS)
        head = fresh.usage.prefill_tokens - tokens
        assert (head > 0) == (row is not rows[0])  # the template's tokens, once in all
    assert list(map(to_line, outcomes)) == list(map(to_line, alone))


def test_other_options_that_shape_samples_need_another_engine(
    rows: list[Row], generators: list[Generator]
) -> None:
    judge = Judge.load(BASE)
    for more in ({}, {"seed": 5}, {"vote": "borda", "k": 2}, {"temperature": 0.0}):
        list(judge.rows(rows[:1], **(OPTIONS | more)))
    assert len(generators) == 2
    unfinished = judge.rows(rows, **OPTIONS)
    next(unfinished)
    list(judge.rows(rows[:1], **OPTIONS))  # the other is in use
    assert len(generators) == 4


def test_weights_that_change_between_calls(rows: list[Row], generators: list[Generator]) -> None:
    judge = Judge.load(BASE)
    list(judge.rows(rows[:2], **OPTIONS))
    with torch.no_grad():
        for parameter in judge.model.parameters():
            parameter.mul_(1.25)
    changed = list(judge.rows(rows[:2], **OPTIONS))
    assert len(generators) == 1
    fresh = Judge.load(BASE)
    fresh.model.load_state_dict(judge.model.state_dict())
    assert lines(changed) == lines(list(fresh.rows(rows[:2], **OPTIONS)))
    for parameter in judge.model.parameters():
        parameter.data = parameter.data.clone() / 1.25
    list(judge.rows(rows[:2], **OPTIONS))
    assert len(generators) == 3  # one of `fresh`, and one for weights that lie elsewhere


def test_update_weights(rows: list[Row], judge: Judge, tmp_path: Path) -> None:
    first = judge.submit(rows[0], **OPTIONS)
    other, _ = load(BASE)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    judge.update_weights(other)
    second = judge.submit(rows[0], **OPTIONS).result()
    judge.update_weights(BASE)
    third = judge.submit(rows[0], **OPTIONS).result()
    assert to_line(first.result()) == to_line(third) and to_line(second) != to_line(third)
    assert first.result().key == third.key != second.key
    write_model(tmp_path)
    with pytest.raises(ValueError, match="of another model"):
        judge.update_weights(load(tmp_path)[0])


# Submitted rows


@pytest.mark.parametrize("kind", ["judge", "meta", "scalar"])
def test_outcomes_are_those_of_a_batch(kind: str, rows: list[Row]) -> None:
    """From several threads at once, with a bad line and a row that cannot be judged among them."""
    meta = BASE.with_name("pocket-meta")
    judge: RowJudge = {
        "judge": lambda: Judge.load(BASE, max_batch=12),
        "meta": lambda: Judge.load(BASE, max_batch=12, meta=meta),
        "scalar": lambda: ScalarJudge.load(meta),
    }[kind]()
    options = {} if kind == "scalar" else OPTIONS
    bad = BadRow(None, 7, "not JSON", "0" * 64)
    entries: list[Row | BadRow] = [*rows, bad, make_row("q", ["a"] * 21)]
    expected = lines(list(judge.rows(entries, **options)))
    found: list = []

    def submit(part: list) -> None:
        found.extend([judge.submit(entry, **options) for entry in part])

    threads = [threading.Thread(target=submit, args=[entries[i::3]]) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lines([pending.result(60) for pending in found]) == expected
    judge.close()


def test_the_first_rows_from_several_threads(
    rows: list[Row], judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Worker] = []
    init = Worker.__init__

    def slow(self: Worker, *arguments: Any) -> None:
        time.sleep(0.05)
        made.append(self)
        init(self, *arguments)

    monkeypatch.setattr(Worker, "__init__", slow)
    barrier = threading.Barrier(4)

    def first(row: Row) -> Any:
        barrier.wait()
        return judge.submit(row, **OPTIONS).result(60)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(first, rows[:4]))
    assert len(made) == 1
    assert lines(found) == lines(list(judge.rows(rows[:4], **OPTIONS)))


def test_a_row_joins_those_under_way(rows: list[Row], judge: Judge) -> None:
    long = judge.submit(rows[0], **(OPTIONS | {"k": 8, "stop": "eos", "temperature": 3.0}))
    while not judge.usage.decode_tokens:
        time.sleep(0.001)
    short = judge.submit(rows[1], **(OPTIONS | {"k": 1, "stop": "eos", "temperature": 3.0}))
    assert isinstance(short.result(60), Verdict)
    assert judge._worker is not None and judge._worker.num_pending == (not long.done())
    assert isinstance(long.result(60), Verdict)


def test_options_take_turns(rows: list[Row], judge: Judge, generators: list[Generator]) -> None:
    """Rows of other options wait for those before them, and lose nothing."""
    hot = OPTIONS | {"temperature": 1.0}
    mixed = [OPTIONS, OPTIONS, hot, OPTIONS, hot, hot]
    found = [judge.submit(row, **each) for row, each in zip(rows, mixed, strict=False)]
    outcomes = [pending.result(60) for pending in found]
    assert len(generators) == 4
    for row, each, outcome in zip(rows, mixed, outcomes, strict=False):
        assert to_line(outcome) == to_line(next(judge.rows([row], **each)))


def test_stream(rows: list[Row], judge: Judge) -> None:
    """Lines as they are done, at most `ahead` under way; an early end takes nothing with it."""
    taken = 0

    def source() -> Iterator[Row]:
        nonlocal taken
        for row in rows:
            taken += 1
            yield row

    async def all_of() -> list:
        found = []
        async for outcome in judge.stream(source(), ahead=3, **OPTIONS):
            found.append(outcome)
            assert taken <= len(found) + 3
        return found

    assert lines(asyncio.run(all_of())) == lines(list(judge.rows(rows, **OPTIONS)))

    async def one_of() -> None:
        async for _ in judge.stream(source(), **OPTIONS):
            return

    asyncio.run(one_of())
    assert isinstance(judge.submit(rows[0], **OPTIONS).result(60), Verdict)

    async def arriving() -> Any:
        for row in rows[:3]:
            await asyncio.sleep(0.01)
            yield row

    async def one_by_one() -> int:
        """Each row comes only once the outcome of the one before it is there."""
        told = asyncio.Event()

        async def asked() -> Any:
            for row in rows[:3]:
                yield row
                await told.wait()
                told.clear()

        count = 0
        async for _ in judge.stream(asked(), **OPTIONS):
            count += 1
            told.set()
        return count

    assert asyncio.run(asyncio.wait_for(one_by_one(), 60)) == 3

    async def broken() -> Any:
        yield rows[0]
        raise OSError("the source is gone")

    async def to_its_end() -> list:
        found = []
        with pytest.raises(OSError, match="the source is gone"):
            async for outcome in judge.stream(broken(), **OPTIONS):
                found.append(outcome)
        return found

    assert len(asyncio.run(to_its_end())) == 1

    async def later() -> list:
        return [outcome async for outcome in judge.stream(arriving(), **OPTIONS)]

    assert lines(asyncio.run(later())) == lines(list(judge.rows(rows[:3], **OPTIONS)))


# Rows that end early


def endless(k: int = 8) -> dict[str, Any]:
    """Samples that do not end for a while."""
    return {"k": k, "max_new_tokens": 1000, "stop": "eos", "temperature": 50.0, "seed": 1}


def test_a_deadline(rows: list[Row], judge: Judge) -> None:
    late = judge.submit(rows[0], deadline_seconds=0.05, **endless())
    key = judge.key(rows[0], **endless())
    assert late.result(60) == RowFailure(rows[0].id, None, key, TOO_LATE)
    gone = judge.submit(rows[0], deadline_seconds=0.0, **OPTIONS).result(60)
    assert isinstance(gone, RowFailure) and gone.error == TOO_LATE
    whole = judge.submit(rows[0], deadline_seconds=60, **OPTIONS).result(60)
    assert to_line(whole) == to_line(next(judge.rows([rows[0]], **OPTIONS)))


def test_what_is_there_counts(rows: list[Row], judge: Judge) -> None:
    """More samples than are decoded together: the first are done when the row ends. What is there
    are samples of the whole row, and the cache is empty afterwards."""
    (row,) = split_rows("online", "final", 1, "several", least=3)
    (whole,) = judge.rows([row], **(OPTIONS | {"k": 200}))
    assert isinstance(whole, Verdict)
    (session,) = judge._idle
    assert isinstance(session, JudgeSession)
    free_blocks = session.generator.cache.free_blocks
    pending = judge.submit(row, **(OPTIONS | {"k": 200}))
    before = judge.usage.decode_tokens
    while judge.usage.decode_tokens < before + 1500:
        time.sleep(0.001)
    beside = judge.submit(rows[1], **OPTIONS)
    pending.end()
    part = pending.result(60)
    assert isinstance(part, Verdict) and part.partial and b'"partial":true' in to_line(part)
    assert 0 < len(part.samples) < 200 and part.k == 200
    assert part.votes == part.valid == sum(s.scores is not None for s in part.samples)
    texts = [(s.order, s.text) for s in whole.samples]
    places = [texts.index((s.order, s.text)) for s in part.samples]
    assert sorted(places) == places != [*range(len(places))]  # a later one was done earlier
    votes = [sample.scores for sample in part.samples if sample.scores]
    assert part.scores == [sum(column) for column in zip(*votes, strict=True)]
    assert to_line(beside.result(60)) == to_line(next(judge.rows([rows[1]], **OPTIONS)))
    judge.between_rows(lambda: None)
    assert judge._idle == [session]
    session.generator.forest.check([])
    cache = session.generator.cache
    assert cache.idle_slots == cache.num_slots and cache.free_blocks == free_blocks


def test_cancelled_before_it_begins(rows: list[Row], judge: Judge) -> None:
    first = judge.submit(rows[0], **endless())
    other = judge.submit(rows[1], **OPTIONS)  # of another session: it waits
    assert other.cancel()
    first.end()
    first.result(60)
    assert other.cancelled()
    assert isinstance(judge.submit(rows[1], **OPTIONS).result(60), Verdict)


# Faults


def test_options_are_refused_at_once(rows: list[Row], judge: Judge) -> None:
    for bad in ({"k": 0}, {"seed": -1}, {"k_meta": 1}, {"temperature": -1.0}, {"top_p": 2.0}):
        with pytest.raises(ValueError):
            judge.submit(rows[0], **bad)
    assert judge._worker is None


def test_a_fault_fails_the_rows_under_way_and_no_others(
    rows: list[Row], judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(Judge, "verdict", fault)
        with pytest.raises(RuntimeError, match="out of memory"):
            judge.submit(rows[0], **OPTIONS).result(60)
        patched.setattr(Judge, "_new_session", fault)
        with pytest.raises(RuntimeError, match="out of memory"):
            judge.submit(rows[0], **OPTIONS).result(60)
    assert isinstance(judge.submit(rows[0], **OPTIONS).result(60), Verdict)


def test_a_panic_of_a_library(
    rows: list[Row], judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        pass

    def fault(*_: Any) -> None:
        raise Panic("in another language")

    for name in ("verdict", "_flight"):
        with monkeypatch.context() as patched:
            patched.setattr(Judge, name, fault)
            with pytest.raises(Panic):
                judge.submit(rows[0], **OPTIONS).result(60)
    assert isinstance(judge.submit(rows[0], **OPTIONS).result(60), Verdict)


def test_a_process_may_end_while_rows_are_under_way(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from engine import Judge, make_row\n"
        "judge = Judge.load('models/pocket', max_batch=4)\n"
        "for i in range(40):\n"
        "    judge.submit(make_row(f'q {i}', ['a', 'b']), k=8, stop='eos', temperature=50.0)\n"
        "while not judge.usage.decode_tokens: pass\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, str(script)], cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_close(rows: list[Row], judge: Judge) -> None:
    found = [judge.submit(row, **OPTIONS) for row in rows]
    worker = judge._worker
    assert isinstance(worker, Worker)
    judge.close()
    assert all(pending.done() for pending in found) and not judge._idle
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit(rows[0], judge._options(OPTIONS))
    assert isinstance(judge.submit(rows[0], **OPTIONS).result(60), Verdict)
