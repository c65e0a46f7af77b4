"""The server of rewards: what goes in and out, what it refuses, and how it ends."""

import asyncio
import dataclasses
import html
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from engine import sample, serve
from engine.chat import chat_segments, make_chat
from engine.judge import Judge
from engine.options import JudgeOptions
from engine.request import make_row
from engine.sample import POCKET
from engine.scalar_judge import ScalarJudge
from engine.server.app import Server
from engine.server.limits import Limits
from engine.server.shapes import Shapes
from engine.session import RowJudge
from engine.verdict import Verdict
from tests import fake_online, forks
from tests.rows import num_threads
from train.world.rows import split_rows

JUDGING = [
    "/v1/judge", "/get_reward", "/compare", "/rerank", "/v1/rerank", "/v2/rerank", "/classify",
    "/v1/chat/completions",
]  # fmt: skip
ROW = {"id": "r", "prompt": "q", "responses": ["a", "b"]}
OPTIONS: dict[str, Any] = {"k": 3, "max_new_tokens": 200, "stop": "box"}


def server_of(
    judge: RowJudge, keys: tuple[bytes, ...] = (), end: str = "", **limits: Any
) -> Server:
    defaults = dataclasses.asdict(JudgeOptions())
    shapes = Shapes(judge, defaults, Limits(**limits), ["tiny"], end)
    return Server(shapes, keys, io.StringIO())


@pytest.fixture
def fake() -> Iterator[fake_online.Judge]:
    judge = fake_online.Judge()
    yield judge
    judge.gate.set()
    judge.close()


@pytest.fixture
def client(fake: fake_online.Judge) -> TestClient:
    return TestClient(server_of(fake))


@pytest.fixture(scope="module")
def pocket() -> Iterator[Judge]:
    judge = Judge.load(POCKET, max_batch=24)
    yield judge
    judge.close()


@pytest.fixture(scope="module")
def scalar() -> Iterator[ScalarJudge]:
    judge = ScalarJudge.load(POCKET.with_name("pocket-meta"))
    yield judge
    judge.close()


def lines_of(server: Server) -> list[dict[str, Any]]:
    assert isinstance(server._log_stream, io.StringIO)
    return [json.loads(line) for line in server._log_stream.getvalue().splitlines()]


# -- the same rows, the same bytes -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:line 4. the judge does not see source:UserWarning")
def test_lines_are_those_of_engine_sample(pocket: Judge, tmp_path: Path) -> None:
    """One by one, together and as they are done; bad rows are failures in their places."""
    drawn = split_rows("serve", "final", 3, "row")
    rows: list[dict[str, Any]] = [
        {"prompt": row.messages[0].content, "responses": list(row.responses), "label": row.label}
        for row in drawn
    ]
    rows += [{"prompt": "q\u2028é", "chosen": "a\r", "rejected": "b", "source": 7}]
    rows += [{"id": "wide", "prompt": "q", "responses": ["a"] * 21}]
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample.main([
        "--data", str(data), "--out", str(out), "--k", "3", "--max-new-tokens", "200",
        "--stop", "box",
    ])  # fmt: skip
    lines = out.read_bytes().splitlines(keepends=True)
    client = TestClient(server_of(pocket))
    for row, line in zip(rows, lines, strict=True):
        answer = client.post("/v1/judge", json={**row, "options": OPTIONS})
        assert answer.status_code == 200 and answer.content == line
    together = client.post("/v1/judge", json={"rows": rows, "options": OPTIONS})
    whole = b'{"outcomes":[' + b",".join(line[:-1] for line in lines) + b"]}"
    assert together.content == whole
    bad = [rows[0], {"id": "x", "prompt": "q"}, 7, rows[1]]
    outcomes = client.post("/v1/judge", json={"rows": bad, "options": OPTIONS}).json()["outcomes"]
    assert [outcomes[0], outcomes[3]] == [json.loads(lines[0]), json.loads(lines[1])]
    assert outcomes[1]["id"] == "x" and "`responses`" in outcomes[1]["error"]
    assert "a row is a JSON object, not 7" in outcomes[2]["error"]
    events = events_of(client, {"rows": bad, "options": OPTIONS, "stream": True})
    found = {int(event["id"]): event for event in events[:-1]}
    assert [found[i]["event"] for i in range(4)] == ["verdict", "failure", "failure", "verdict"]
    assert found[0]["data"].encode() + b"\n" == lines[0]
    assert found[3]["data"].encode() + b"\n" == lines[1]
    assert events[-1] == {"event": "done", "data": '{"verdicts":2,"failures":2}'}


def events_of(client: TestClient, body: Any, **headers: str) -> list[dict[str, str]]:
    answer = client.post("/v1/judge", json=body, headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in answer.content.decode().split("\n\n")[:-1]:
        events.append(dict(line.split(": ", 1) for line in block.split("\n")))
    return events


def test_events_come_as_rows_are_done(fake: fake_online.Judge) -> None:
    """The second row is done while the first waits, which the event of the second sets free."""
    rows = [{"id": "slow", "prompt": "WAIT", "responses": ["a"]}, {**ROW, "id": "fast"}]

    async def run() -> list[bytes]:
        sent = []

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))
            if b"fast" in sent[-1]:
                fake.gate.set()

        await server_of(fake)(*asgi({"rows": rows, "stream": True}, send))
        return sent

    sent = asyncio.run(run())
    assert [b"fast" in part for part in sent[1:3]] == [True, False] and b"slow" in sent[2]


def asgi(
    body: Any, send: Any, path: str = "/v1/judge", after: Callable[[], Any] | None = None
) -> Any:
    """The arguments of an application: a request, what takes the answer, and what the client does
    once it has sent its body: by default it waits."""
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(),
        "query_string": b"", "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    messages = iter([{"type": "http.request", "body": json.dumps(body).encode()}])

    async def receive() -> Any:
        for message in messages:
            return message
        if after is None:
            await asyncio.Event().wait()
        else:
            await after()
        return {"type": "http.disconnect"}

    return scope, receive, send


# -- others' shapes --------------------------------------------------------------------------------


def test_openrlhf(pocket: Judge) -> None:
    client = TestClient(server_of(pocket, end="<|end|>"))
    good, other = split_rows("serve", "final", 2, "row")
    prompt, text = good.messages[0].content, good.responses[0]
    body = {
        "query": [f"{prompt}{text}<|end|>", f"{prompt}{text}", "else"],
        "prompts": [prompt, prompt, other.messages[0].content],
        "labels": ["", "4", None], "options": OPTIONS,
    }  # fmt: skip
    answer = client.post("/get_reward", json=body).json()
    expected = [pocket(prompt, [text], reference=reference, **OPTIONS) for reference in (None, "4")]
    means = [verdict.mean_scores[0] if verdict.mean_scores else None for verdict in expected]
    assert means[0] is not None and answer["rewards"] == [*means, None]
    assert answer["scores"][0] == pytest.approx((means[0] - 1) / 9) and answer["scores"][2] is None
    assert answer["extra_logs"]["no_verdict"] == [0.0, float(means[1] is None), 1.0]
    assert answer["extra_logs"]["votes"] == [*(float(verdict.votes) for verdict in expected), 0.0]
    assert answer["errors"] == [None, None, "the query does not begin with its prompt"]
    lost = client.post("/get_reward", json={"query": ["x"], "prompts": ["y"]}).json()
    assert lost["rewards"] is None and lost["scores"] is None
    assert lost["extra_logs"] == {"no_verdict": [1.0], "votes": [0.0]}
    uneven = client.post("/get_reward", json={**body, "prompts": [prompt]})
    assert uneven.status_code == 400 and "3 query, 1 prompts" in uneven.json()["error"]


def test_nemo_gym(client: TestClient) -> None:
    def response(*texts: str) -> dict[str, Any]:
        parts = [{"type": "output_text", "text": text} for text in texts]
        return {
            "output": [{"type": "reasoning", "summary": []}, {"type": "message", "content": parts}]
        }

    body = {
        "conversation_history": [{"role": "user", "content": "q"}],
        "response_objs": [response("a", "b"), response("c"), {"output": []}], "principle": "short",
        "options": {"k": 2},
    }  # fmt: skip
    answer = client.post("/compare", json=body).json()
    row = {"prompt": "q", "responses": ["ab", "c", ""], "principles": "short", "options": {"k": 2}}
    verdict = client.post("/v1/judge", json=row).json()
    assert answer["rewards"] == verdict["mean_scores"]
    pairs = {(r["response_i"], r["response_j"]) for r in answer["comparison_results"]}
    assert pairs == {(0, 1), (1, 2), (2, 0)} and len(answer["comparison_results"]) == 6
    for result in answer["comparison_results"]:
        scores = verdict["samples"][result["judge_idx"]]["scores"]
        assert result["score_1"] == scores[result["response_i"]]
        assert result["score_2"] == scores[result["response_j"]]
    each = [score for each in verdict["samples"] for score in each["scores"]]
    assert answer["metrics"]["mean_individual_score"] == pytest.approx(sum(each) / 6)
    lost = client.post("/compare", json={
        **body, "conversation_history": [{"role": "user", "content": "UNREAD"}]
    }).json()  # fmt: skip
    assert lost["rewards"] == [None] * 3 and lost["metrics"]["mean_individual_score"] is None


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank(client: TestClient, path: str) -> None:
    documents = ["a", {"text": "b"}, "c", "d"]
    body = {"query": "q", "documents": documents, "model": "tiny"}
    results = client.post(path, json=body).json()["results"]
    row = {"prompt": "q", "responses": list("abcd")}
    means = client.post("/v1/judge", json=row).json()["mean_scores"]
    assert [result["relevance_score"] for result in results] == sorted(means, reverse=True)
    assert all(r["relevance_score"] == means[r["index"]] for r in results)
    assert all(r["document"]["text"] == "abcd"[r["index"]] for r in results)
    assert client.post(path, json={**body, "top_n": 2}).json()["results"] == results[:2]
    bare = client.post(path, json={**body, "return_documents": False}).json()["results"]
    assert all("document" not in result for result in bare)
    unread = client.post(path, json={**body, "query": "UNREAD"}).json()["results"]
    assert [(r["index"], r["relevance_score"]) for r in unread] == [(i, None) for i in range(4)]
    assert client.post(path, json={**body, "model": "large"}).status_code == 404


def test_classify(scalar: ScalarJudge, client: TestClient) -> None:
    served = TestClient(server_of(scalar))
    verdict = next(scalar.rows([make_row("q", ["an answer"])]))
    assert isinstance(verdict, Verdict) and verdict.mean_scores is not None
    score = verdict.mean_scores[0]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "an answer"}]
    text = scalar.prompts.write_chat([("user", "q"), ("assistant", "an answer")], False)

    def probs(**body: Any) -> list[float]:
        answer = served.post("/classify", json=body)
        assert answer.status_code == 200, answer.json()
        return [prob for each in answer.json()["data"] for prob in each["probs"]]

    assert probs(messages=turns, use_activation=False) == [score]
    assert probs(messages=turns) == [pytest.approx(1 / (1 + math.exp(-score)))]
    assert probs(input=[text, "no", text], use_activation=False) == [score, None, score]
    between = text[text.index("q") + 1 : text.index("an answer")]
    twice = text.replace("an answer", f"an {between} answer")
    assert between and "send messages" in served.post("/classify", json={"input": twice}).text
    refused = client.post("/classify", json={"messages": turns})
    assert refused.status_code == 400 and "sequence classifier" in refused.json()["error"]
    assert served.post("/v1/chat/completions", json={"messages": turns}).status_code == 400
    assert served.post("/v1/judge", json={**ROW, "options": {"k": 2}}).status_code == 400


def test_chat(pocket: Judge) -> None:
    """Greedy text is that of the model's largest logits; a seed decides the draws; texts open no
    turn."""
    client = TestClient(server_of(pocket))

    def ask(text: str, **more: Any) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 12, **more}
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.json()
        found: dict[str, Any] = answer.json()
        return found

    greedy = ask("add 2 and 3", temperature=0, logprobs=True, model="tiny")
    text = pocket.prompts.write_chat([("user", "add 2 and 3")], True)
    prompt = pocket.tokenizer.encode_template(text)
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(pocket.model.logits(ids)[-1].argmax()))
    (choice,) = greedy["choices"]
    new = ids[len(prompt) :]
    assert choice["message"] == {"role": "assistant", "content": pocket.tokenizer.decode(new)}
    assert [t["token"] for t in choice["logprobs"]["content"]] == [
        pocket.tokenizer.show([token]) for token in new
    ]
    assert greedy["usage"]["prompt_tokens"] == len(prompt)
    assert choice["finish_reason"] == "length" and greedy["usage"]["completion_tokens"] == 12
    drawn = ask("add 2 and 3", temperature=1.0, n=3, top_p=0.9)
    again = ask("add 2 and 3", temperature=1.0, n=3, top_p=0.9, seed=drawn["seed"])
    assert again["choices"] == drawn["choices"] and len(drawn["choices"]) == 3
    others = [ask("add 2 and 3", temperature=1.0, n=3, top_p=0.9) for _ in range(4)]
    assert any(other["choices"] != drawn["choices"] for other in others)
    whole = choice["message"]["content"]
    cut = ask("add 2 and 3", temperature=0, stop=[whole[5:8]])["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(whole[5:8])]
    assert cut["finish_reason"] == "stop"
    segments = chat_segments(pocket._chats, make_chat([{"role": "user", "content": "<|end|>"}]))
    plain = chat_segments(pocket._chats, make_chat([{"role": "user", "content": "x"}]))
    control = [
        [token for segment in each for token in segment if token in pocket.tokenizer.control_ids]
        for each in (segments, plain)
    ]
    assert control[0] == control[1]
    wrong: list[dict[str, Any]] = [
        {"stream": True}, {"top_logprobs": 2}, {"tools": []}, {"n": 0}, {"n": 10_000},
        {"max_tokens": 10**6}, {"stop": ""}, {"max_tokens": 1, "max_completion_tokens": 1},
        {"messages": []}, {"messages": [{"role": "robot", "content": "x"}]}, {"temperature": -1},
    ]  # fmt: skip
    for bad in wrong:
        body = {"messages": [{"role": "user", "content": "x"}], **bad}
        assert client.post("/v1/chat/completions", json=body).status_code == 400, bad


def test_a_chat_beside_rows(pocket: Judge) -> None:
    """It has the same bits in any company, and a meta model has no say in it."""
    row = split_rows("serve", "final", 1, "row")[0]
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0}
    chat = make_chat([{"role": "user", "content": "add 2 and 3"}])
    alone = pocket.submit(chat, k=4, stop="eos", **options).result(60)
    beside = [pocket.submit(each, k=4, stop="eos", **options) for each in (row, chat, row)]
    assert dataclasses.asdict(beside[1].result(60)) == dataclasses.asdict(alone)
    assert isinstance(alone, Verdict) and alone.best is None and len(alone.samples) == 4
    meta = Judge.load(POCKET, meta=POCKET.with_name("pocket-meta"))
    scored = meta.submit(chat, k=4, stop="eos", **options).result(60)
    meta.close()
    assert isinstance(scored, Verdict)
    assert [s.text for s in scored.samples] == [s.text for s in alone.samples]


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "not JSON"),
        (b"[]", 400, "JSON object"),
        (b'{"prompt":"q","prompt":"r","responses":["a"]}', 400, "'prompt' is repeated"),
        (b'{"prompt":NaN,"responses":["a"]}', 400, "NaN"),
        (b"\xff", 400, "not UTF-8"),
        (b"[" * 100_000, 400, "nested"),
        (b'{"prompt":' + b"[" * 70 + b"]" * 70 + b',"responses":["a"]}', 422, "nested"),
        (b'{"prompt":"\\ud800","responses":["a"]}', 422, "surrogate"),
        (b'{"prompt":"q","responses":["a"],"\\udfff":1}', 422, "surrogate"),
        (b'{"prompt":"q","responses":["a"],"id":""}', 422, "id is empty"),
        (b'{"prompt":"q","responses":[]}', 422, "0 responses"),
        (b'{"prompt":"q","responses":["a"],"colour":1}', 422, "colour"),
        (b'{"prompt":"q","responses":["a"],"label":1e999}', 422, "finite"),
        (b'{"prompt":"q","responses":["a"],"id":' + b"9" * 5000 + b"}", 400, "digit"),
        (b'{"prompt":"q","responses":["a"],"options":[]}', 400, "options is []"),
        (b'{"prompt":"q","responses":["a"],"options":{"k":0}}', 400, "k = 0"),
        (b'{"prompt":"q","responses":["a"],"options":{"k":1.0}}', 400, "int"),
        (b'{"prompt":"q","responses":["a"],"options":{"k":true}}', 400, "int"),
        (b'{"prompt":"q","responses":["a"],"options":{"k":257}}', 400, "more than 256"),
        (b'{"prompt":"q","responses":["a"],"options":{"top_k":1e99}}', 400, "int"),
        (b'{"prompt":"q","responses":["a"],"options":{"top_k":9999999999}}', 400, "top_k"),
        (b'{"prompt":"q","responses":["a"],"options":{"temperature":1e999}}', 400, "finite"),
        (b'{"prompt":"q","responses":["a"],"options":{"temperature":-1}}', 400, "temperature"),
        (b'{"prompt":"q","responses":["a"],"options":{"seed":-1}}', 400, "seed"),
        (b'{"prompt":"q","responses":["a"],"options":{"\\ud800":1}}', 400, "unknown option"),
        (b'{"prompt":"q","responses":["a"],"options":{"attention":"torch"}}', 400, "server alone"),
        (b'{"prompt":"q","responses":["a"],"options":{"max_new_tokens":7777}}', 400, "no cache"),
        (b'{"prompt":"q","responses":["a"],"deadline_seconds":-1}', 400, "deadline_seconds"),
        (b'{"prompt":"q","responses":["a"],"deadline_seconds":"1"}', 400, "deadline_seconds"),
        (b'{"prompt":"q","responses":["a"],"stream":1}', 400, "stream"),
        (b'{"rows":[]}', 400, "rows"),
        (b'{"rows":[{}],"prompt":"q"}', 400, "'prompt' beside rows"),
        (b'{"prompt":"TOO LONG","responses":["a"]}', 422, "9000 tokens"),
    ],
)  # fmt: skip
def test_wrong_bodies(client: TestClient, body: bytes, status: int, words: str) -> None:
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/judge", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]
    assert client.post("/v1/judge", json=ROW).status_code == 200


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "\ud800", "q", "UNREAD"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from([
            "rows", "prompt", "responses", "id", "label", "options", "k", "seed", "chosen",
            "rejected", "stream", "deadline_seconds", "query", "prompts", "labels", "documents",
            "top_n", "conversation_history", "response_objs", "output", "type", "content", "text",
            "principle", "messages", "role", "model", "input", "temperature", "n", "stop", "meta",
        ]) | st.text(max_size=3),
        inner,
        max_size=5,
    ),
    max_leaves=15,
)  # fmt: skip


@pytest.fixture(scope="module")
def hostile() -> Iterator[list[TestClient]]:
    """A judge without a model, for all shapes but two, and a scalar model for these."""
    judges = [fake_online.Judge(), ScalarJudge.load(POCKET.with_name("pocket-meta"))]
    yield [TestClient(server_of(judge), raise_server_exceptions=False) for judge in judges]
    for judge in judges:
        judge.close()


@given(path=st.sampled_from(JUDGING), value=_JSON, cut=st.integers(0, 60), whole=st.booleans())
def test_hostile_bodies(
    hostile: list[TestClient], path: str, value: Any, cut: int, whole: bool
) -> None:
    """No body of JSON or of a part of it is a fault of the server, and every error says why."""
    body = json.dumps(value).encode("utf-8", "surrogatepass")
    check_hostile(hostile, path, body if whole else body[:cut])


@given(path=st.sampled_from(JUDGING), data=st.data())
def test_hostile_fields(hostile: list[TestClient], path: str, data: st.DataObject) -> None:
    """Right bodies with one value or two in place of others."""
    body = json.loads(json.dumps(RIGHT[path]))
    for _ in range(data.draw(st.integers(1, 2))):
        where: Any = body
        while True:
            places = list(where) if isinstance(where, dict) else list(range(len(where)))
            if not places:
                break
            place = data.draw(st.sampled_from(places))
            if not isinstance(where[place], dict | list) or data.draw(st.booleans()):
                where[place] = data.draw(_JSON)
                break
            where = where[place]
    check_hostile(hostile, path, json.dumps(body).encode())


def check_hostile(hostile: list[TestClient], path: str, body: bytes) -> None:
    client = hostile[path in ("/classify", "/v1/chat/completions")]
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404, 413, 422), (body, answer.text)
    if answer.status_code != 200:
        assert isinstance(answer.json()["error"], str) and answer.json()["error"]


_TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
RIGHT: dict[str, Any] = {
    "/v1/judge": {"rows": [ROW, {"prompt": "q", "chosen": "a", "rejected": "b"}],
                  "options": {"k": 2, "seed": 1}, "deadline_seconds": 5, "stream": False},
    "/get_reward": {"query": ["qa"], "prompts": ["q"], "labels": ["4"], "options": {"k": 1}},
    "/compare": {"conversation_history": [{"role": "user", "content": "q"}], "principle": "p",
                 "response_objs": [{"output": [{"type": "message", "content": [
                     {"type": "output_text", "text": "a"}]}]}]},
    "/rerank": {"query": "q", "documents": ["a", {"text": "b"}], "top_n": 1},
    "/classify": {"messages": _TURNS, "use_activation": True},
    "/v1/chat/completions": {"messages": _TURNS[:1], "n": 1, "max_tokens": 2, "temperature": 0.5},
}  # fmt: skip
RIGHT |= {"/v1/rerank": RIGHT["/rerank"], "/v2/rerank": RIGHT["/rerank"]}


def test_right_bodies_are_right(hostile: list[TestClient]) -> None:
    """Those that are altered above; the chat is refused, since no judge with a chat is there."""
    for path, body in RIGHT.items():
        client = hostile[path in ("/classify", "/v1/chat/completions")]
        expected = 400 if path == "/v1/chat/completions" else 200
        assert client.post(path, json=body).status_code == expected, path


def test_methods_paths_and_types(client: TestClient) -> None:
    assert client.get("/v1/judge").status_code == 405
    assert client.post("/health").status_code == 405
    assert client.get("/judge").status_code == 404
    assert client.post("/v1/judge/", json=ROW).status_code == 404
    body = json.dumps(ROW).encode()
    for kind in ("", "text/plain", "application/x-www-form-urlencoded",
                 "application/json; charset=latin-1", "application/jsonx"):  # fmt: skip
        answer = client.post("/v1/judge", content=body, headers={"content-type": kind})
        assert answer.status_code == 415, kind
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    assert client.post("/v1/judge", content=body, headers=packed).status_code == 415
    kind = "Application/JSON; charset=UTF-8"
    answer = client.post("/v1/judge", content=body, headers={"content-type": kind})
    assert answer.status_code == 200


def test_a_long_body_is_not_read(fake: fake_online.Judge) -> None:
    """Neither one that says its length, nor what comes past the limit of one that does not."""
    server = server_of(fake, max_body_bytes=1000)

    def post(headers: list[tuple[bytes, bytes]], chunks: int) -> tuple[int, int]:
        read, statuses = 0, []
        scope, _, _ = asgi(ROW, None)
        scope["headers"] += headers

        async def receive() -> Any:
            nonlocal read
            read += 1
            return {"type": "http.request", "body": b" " * 600, "more_body": read < chunks}

        async def send(message: Any) -> None:
            statuses.append(message.get("status"))

        asyncio.run(server(scope, receive, send))
        return statuses[0], read

    assert post([(b"content-length", b"1001")], 99) == (413, 0)
    assert post([(b"content-length", b"9" * 400)], 99) == (413, 0)
    assert post([], 99) == (413, 2)
    assert post([], 1) == (400, 1)


def test_a_slow_body(fake: fake_online.Judge) -> None:
    server = server_of(fake, body_seconds=0.05)
    statuses = []

    async def never() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    scope, _, _ = asgi(ROW, send)
    asyncio.run(server(scope, never, send))
    assert statuses[0] == 408


def test_keys(fake: fake_online.Judge, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key\n\n second \n")
    keys = serve.read_keys(tmp_path / "keys")
    assert keys == [b"first-key", b"second"]
    client = TestClient(server_of(fake, tuple(keys)))
    wrong = [
        None, "", "Bearer", "Bearer ", "Bearer first-ke", "Bearer first-key2", "Bearer x" * 500,
        "Basic first-key", "first-key", b"Bearer \xff\xfe",
    ]  # fmt: skip
    for path in JUDGING:
        for value in wrong:
            headers: Any = {} if value is None else {"authorization": value}
            answer = client.post(path, content=b"{", headers=headers)
            assert answer.status_code == 401, (path, value)
            assert answer.headers["www-authenticate"] == "Bearer"
    for key in ("Bearer first-key", "bearer second"):
        headers = {"authorization": key}
        assert client.post("/v1/judge", json=ROW, headers=headers).status_code == 200
    for page in ("/health", "/ready", "/metrics", "/v1/models", "/docs"):
        assert client.get(page).status_code == 200
    for text in ("", "\n", "a b\n", "schlüssel\n"):
        (tmp_path / "keys").write_text(text)
        with pytest.raises(ValueError, match="keys"):
            serve.read_keys(tmp_path / "keys")


def test_more_rows_than_a_request_may_have(fake: fake_online.Judge) -> None:
    client = TestClient(server_of(fake, max_rows=2))
    assert client.post("/v1/judge", json={"rows": [ROW] * 2}).status_code == 200
    assert client.post("/v1/judge", json={"rows": [ROW] * 3}).status_code == 413
    body = {"query": ["qa"] * 3, "prompts": ["q"] * 3}
    assert client.post("/get_reward", json=body).status_code == 413
    with pytest.raises(ValueError, match="max_rows = 9 is more than max_pending"):
        Limits(max_rows=9, max_pending=8)


# -- many at a time --------------------------------------------------------------------------------

WAIT = {"prompt": "WAIT", "responses": ["a", "b"]}


def until(condition: Callable[[], Any]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def posting(client: TestClient, body: Any, answers: list[Any]) -> threading.Thread:
    thread = threading.Thread(
        target=lambda: answers.append(client.post("/v1/judge", json=body).status_code)
    )
    thread.start()
    return thread


def test_no_room(fake: fake_online.Judge) -> None:
    """All rows of a request are accepted or none."""
    server = server_of(fake, max_pending=3, max_rows=3)
    client = TestClient(server)
    answers: list[int] = []
    thread = posting(client, {"rows": [WAIT] * 2}, answers)
    until(lambda: len(server._pending) == 2)
    refused = client.post("/v1/judge", json={"rows": [ROW] * 2})
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert len(server._pending) == 2
    assert client.post("/v1/judge", json=ROW).status_code == 200
    second = posting(client, WAIT, answers)
    until(lambda: len(server._pending) == 3)
    assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
    assert client.post("/v1/judge", content=b"not read").status_code == 429
    fake.gate.set()
    thread.join()
    second.join()
    assert answers == [200, 200] and not server._pending
    assert client.get("/ready").status_code == 200


def test_deadlines(client: TestClient) -> None:
    """What is done by then, marked; a row of which nothing is, is a failure. Others go on."""
    body = {"rows": [WAIT, ROW, {**WAIT, "prompt": "WAIT NOTHING"}], "deadline_seconds": 1.0}
    outcomes = client.post("/v1/judge", json=body).json()["outcomes"]
    assert [outcome.get("partial") for outcome in outcomes] == [True, None, None]
    assert outcomes[1]["best"] is not None and "its time was over" in outcomes[2]["error"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_rows(fake: fake_online.Judge, stream: bool) -> None:
    server, sent = server_of(fake), []

    async def run() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        async def leave() -> None:
            while len(server._pending) < 2:
                await asyncio.sleep(0.001)

        rows = [{**WAIT, "id": "one"}, {**WAIT, "id": "two"}]
        await server(*asgi({"rows": rows, "stream": stream}, send, after=leave))

    asyncio.run(run())
    until(lambda: not server._pending)
    assert set(fake.ended) <= {"one", "two"} and not server._tickets
    assert lines_of(server)[-1]["status"] == 499
    assert not any(b"verdict" in message.get("body", b"") for message in sent)


def test_a_fault_is_of_its_rows_alone(fake: fake_online.Judge) -> None:
    server = server_of(fake)
    client = TestClient(server)
    answer = client.post("/v1/judge", json={"prompt": "FAULT", "responses": ["a"]})
    assert answer.status_code == 500 and answer.json()["error"] == "RuntimeError: out of memory"
    assert lines_of(server)[-1]["error"].startswith("RuntimeError")
    assert client.post("/v1/judge", json=ROW).status_code == 200
    assert client.get("/health").status_code == 200


def test_a_fault_of_the_server_is_told(
    fake: fake_online.Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = server_of(fake)
    client = TestClient(server, raise_server_exceptions=False)

    def fault(_: Any) -> bytes:
        raise KeyError(5 * "q")  # an error may hold a text of the row

    with monkeypatch.context() as patched:
        patched.setattr("engine.server.shapes.to_line", fault)
        answer = client.post("/v1/judge", json=ROW)
    assert answer.status_code == 500 and "qqqqq" not in answer.text
    told = lines_of(server)[-1]["error"]
    assert told.startswith("KeyError") and ", in fault" in told and "qqqqq" not in told
    assert client.post("/v1/judge", json=ROW).status_code == 200


def test_the_engines_thread_has_ended(fake: fake_online.Judge) -> None:
    client = TestClient(server_of(fake))
    client.post("/v1/judge", json=ROW)
    assert client.get("/health").status_code == 200 and fake._worker is not None
    fake._worker.close()
    assert client.get("/health").status_code == client.get("/ready").status_code == 503


# -- pages, logs, metrics --------------------------------------------------------------------------


def test_logs_hold_no_text(fake: fake_online.Judge) -> None:
    server = server_of(fake)
    client = TestClient(server)
    bodies: list[Any] = [
        {"prompt": "private q", "responses": ["private a"]}, {"private": 1}, "private",
        {"rows": [ROW, {"id": "private", "prompt": 3}]},
    ]  # fmt: skip
    for body in bodies:
        client.post("/v1/judge", json=body, headers={"x-request-id": "mine"})
    client.get("/private")
    named = client.get("/health", headers={"x-request-id": "bad id\x01"})
    lines = lines_of(server)
    assert [line["status"] for line in lines] == [200, 422, 400, 200, 404, 200]
    assert [line["rows"] for line in lines] == [1, 1, 0, 2, 0, 0]
    assert [line["failures"] for line in lines] == [0, 1, 0, 1, 0, 0]
    assert [line["route"] for line in lines] == ["/v1/judge"] * 4 + ["other", "/health"]
    assert [line["id"] for line in lines[:4]] == ["mine"] * 4
    assert lines[5]["id"] == named.headers["x-request-id"] != "bad id\x01"
    assert "private" not in json.dumps(lines)


def test_metrics(fake: fake_online.Judge) -> None:
    client = TestClient(server_of(fake))
    rows = [ROW, {**ROW, "prompt": "UNREAD"}, {"prompt": 1}]
    client.post("/v1/judge", json={"rows": rows, "options": {"k": 5}})
    fake.usage.decode_tokens = 77
    found = {}
    for line in client.get("/metrics").text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found[name] = float(value)
    assert found["quorum_rows_total"] == 2 and found["quorum_failures_total"] == 1
    assert found["quorum_samples_total"] == 10 and found["quorum_votes_total"] == 5
    assert found['quorum_invalid_samples_total{reason="missing"}'] == 5
    assert found['quorum_tokens_total{kind="decode"}'] == 77 and found["quorum_pending_rows"] == 0
    assert found['quorum_requests_total{route="/v1/judge",status="200"}'] == 1
    assert found['quorum_request_seconds_count{route="/v1/judge"}'] == 1


def test_pages(client: TestClient) -> None:
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert all(path in page.text for path in [*JUDGING, "/health", "/ready", "/metrics"])


def test_examples_of_the_page(hostile: list[TestClient], client: TestClient) -> None:
    """Every example of curl is JSON that its route takes."""
    page = html.unescape(client.get("/docs").text)
    found = re.findall(
        r"curl localhost:8000(/\S+) -H 'content-type: application/json' -d '([^']*)'", page
    )
    assert {path for path, _ in found} >= set(JUDGING) - {"/v1/rerank", "/v2/rerank"}
    for path, body in found:
        scalar = path in ("/classify", "/v1/chat/completions")
        answer = hostile[scalar].post(path, json=json.loads(body))
        expected = 400 if path == "/v1/chat/completions" else 200
        assert answer.status_code == expected, (path, answer.text)


# -- the end ---------------------------------------------------------------------------------------


def test_a_drain_finishes_what_was_accepted(fake: fake_online.Judge) -> None:
    server, sent = server_of(fake), []

    async def run() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        accepted = asyncio.create_task(server(*asgi(WAIT, send)))
        while not server._pending:
            await asyncio.sleep(0.001)
        drain = asyncio.create_task(server.drain(60))
        await asyncio.sleep(0)
        refused: list[Any] = []

        async def note(message: Any) -> None:
            refused.append(message)

        await server(*asgi(ROW, note))
        assert refused[0]["status"] == 503 and not drain.done()
        fake.gate.set()
        await asyncio.gather(accepted, drain)

    asyncio.run(run())
    assert sent[0]["status"] == 200 and server.dropped == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_drain_that_is_too_short(fake: fake_online.Judge, stream: bool) -> None:
    server, sent = server_of(fake), []

    async def run() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        accepted = asyncio.create_task(server(*asgi({"rows": [ROW, WAIT], "stream": stream}, send)))
        while len(server._pending) != 1:
            await asyncio.sleep(0.001)
        await server.drain(0)
        await accepted

    asyncio.run(run())
    assert server.dropped == 1
    assert sent[0]["status"] == (200 if stream else 503)
    assert b"the server is stopping" in sent[-2 if stream else -1]["body"]


def started(*options: str) -> tuple[Any, int, Any]:
    """A server in a process of its own, its port, and the lines that it logs."""
    reader, writer = os.pipe()
    with num_threads(1):
        process = forks.start(
            forks.command, "engine.serve", "--port", "0", *options, streams={"stderr": writer}
        )
    os.close(writer)
    log = open(reader)  # noqa: SIM115
    first = json.loads(log.readline())
    assert first["event"] == "listening"
    return process, first["port"], log


@pytest.mark.parametrize(("seconds", "status"), [("60", 0), ("0", 1)])
def test_a_signal_ends_the_process(seconds: str, status: int) -> None:
    """What was accepted is answered, within the time; meanwhile nothing else is."""
    process, port, log = started("--drain-seconds", seconds, "--max-batch", "4")
    url = f"http://127.0.0.1:{port}"
    slow = {
        "prompt": "q", "responses": ["a", "b"],
        "options": {"k": 16, "max_new_tokens": 200, "temperature": 50.0, "stop": "eos"},
    }  # fmt: skip
    answers: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{url}/v1/judge", json=slow, timeout=120))
    )
    thread.start()

    def pending() -> bool:
        return "quorum_pending_rows 1.0" in httpx.get(f"{url}/metrics").text

    until(pending)
    with socket.create_connection(("127.0.0.1", port)) as junk:  # no HTTP: a line of the log too
        junk.sendall(b"\x16\x03\x01\r\n\r\n")
        assert junk.recv(100).startswith(b"HTTP/1.1 400")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    if status == 0:
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        assert httpx.post(f"{url}/v1/judge", json=ROW).status_code == 503
    thread.join()
    process.join()
    lines = [json.loads(line) for line in log]
    log.close()
    assert process.exitcode == status
    assert answers[0].status_code == (503 if status else 200)
    assert any("Invalid HTTP" in line.get("message", "") for line in lines)
    assert lines[-1]["event"] == "stopped" and lines[-1]["dropped"] == status
    if not status:
        assert len(answers[0].json()["samples"]) == 16
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_what_the_user_got_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with serve.bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        cases = [
            (["--port", str(taken.getsockname()[1])], "in use"),
            (["--port", "70000"], "70000"),
            (["--drain-seconds", "nan"], "nan"),
            (["--api-keys", str(tmp_path / "none")], "none"),
            (["--max-pending", "1"], "max_rows"),
            (["--k", "0"], "k = 0"),
            (["--port", "0", "--k-meta", "2"], "needs a meta model"),
            (["--port", "0", "--model", "nowhere"], "nowhere"),
        ]
        for arguments, words in cases:
            assert serve.main(arguments) == 2
            shown = capsys.readouterr().err
            assert shown.startswith("error: ") and shown.count("\n") == 1 and words in shown


def test_without_its_packages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert serve.main([]) == 2
    assert "pip install 'quorum-grm[serve]'" in capsys.readouterr().err


def test_nothing_else_imports_its_packages() -> None:
    """Nor torch, which the help of a command needs as little."""
    program = (
        "import sys, engine, engine.serve, engine.sample, train.commands\n"
        "print({'starlette', 'uvicorn', 'prometheus_client', 'torch'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
    root = Path(serve.__file__).parent.parent
    imports = re.compile(
        r"^ *(?:from|import) (?:starlette|uvicorn|prometheus_client)", re.MULTILINE
    )
    found = [
        str(path.relative_to(root))
        for folder in ("kernels", "models", "engine", "train")
        for path in sorted((root / folder).rglob("*.py"))
        if imports.search(path.read_text())
    ]
    assert found == ["engine/serve.py", "engine/server/app.py", "engine/server/metrics.py"]
