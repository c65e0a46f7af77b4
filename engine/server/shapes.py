"""Bodies and answers of the routes: our own, and those that others' trainers and clients speak.

Every reader takes the fields of a body and gives an `Asked`. A reward is a response's mean score.
Where a row has no verdict it is null, and the reason stands beside it: nothing becomes 0.

What others' fields say beyond what is done here is refused, not passed over. Not done here: HTTP.
"""

import math
import secrets
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, TypeVar

import msgspec

from engine.chat import make_chat
from engine.judge import Judge
from engine.labels import quote
from engine.options import JudgeOptions
from engine.request import Row, RowError, check_json
from engine.scalar_judge import ScalarJudge
from engine.server.asked import (
    Asked,
    Outcome,
    Refused,
    read_deadline,
    read_flag,
    read_options,
    read_row,
    read_rows,
    to_json,
)
from engine.server.limits import Limits
from engine.session import RowJudge
from engine.verdict import RowFailure, Sample, Verdict, to_line

S = TypeVar("S", bound=msgspec.Struct)
_OF_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "max_new_tokens", "deterministic", "attention",
)  # fmt: skip


@dataclass(frozen=True)
class Shapes:
    """The readers of one server. defaults: its own options, `JudgeOptions` by name; names: those of
    its model, the first of which it tells; end: cut off the end of OpenRLHF's queries."""

    judge: RowJudge
    defaults: Mapping[str, Any]
    limits: Limits
    names: Sequence[str]
    end: str = ""

    # -- ours --------------------------------------------------------------------------------------

    def judge_rows(self, fields: dict[str, Any]) -> Asked:
        """`/v1/judge`: a row, or several; the answer is their lines."""
        asked = self._asked(fields)
        asked.streams = read_flag(fields.pop("stream", None), "stream")
        if "rows" in fields:
            asked.entries = read_rows(fields.pop("rows"), self.limits)
            if fields:
                raise Refused(400, f"unknown key {quote(next(iter(fields)))} beside rows")
            asked.answer = _lines
        else:
            asked.entries, asked.one = [read_row(fields)], True
            asked.answer = lambda outcomes: to_line(outcomes[0])
        return asked

    # -- OpenRLHF ----------------------------------------------------------------------------------

    def get_reward(self, fields: dict[str, Any]) -> Asked:
        """`/get_reward`: every query is a row of one response, which is what follows its prompt. A
        label that is a text is the row's reference."""
        asked = self._asked(fields)
        body = _read(fields, _Queries)
        labels = [None] * len(body.query) if body.labels is None else body.labels
        if not len(body.query) == len(body.prompts) == len(labels):
            raise Refused(
                400,
                f"{len(body.query)} query, {len(body.prompts)} prompts and {len(labels)} labels",
            )
        rows = [
            self._query(query, prompt, label)
            for query, prompt, label in zip(body.query, body.prompts, labels, strict=True)
        ]
        if len(rows) > self.limits.max_rows:
            raise Refused(413, f"{len(rows)} queries; a request may have {self.limits.max_rows}")
        asked.entries, asked.answer = rows, self._rewards
        return asked

    def _query(self, query: str, prompt: str, label: Any) -> Row | RowFailure:
        if not query.startswith(prompt):
            return RowFailure(None, None, None, "the query does not begin with its prompt")
        response = query[len(prompt) :]
        if self.end:
            response = response.removesuffix(self.end)
        reference = label if label != "" else None
        return read_row({"prompt": prompt, "responses": [response], "reference": reference})

    def _rewards(self, outcomes: Sequence[Outcome]) -> bytes:
        rewards = [_means(outcome, 1)[0] for outcome in outcomes]
        scores = [None if reward is None else self._share(reward) for reward in rewards]
        # The client makes tensors of what is no null as a whole.
        none = all(reward is None for reward in rewards)
        return to_json(
            {
                "rewards": None if none else rewards,
                "scores": None if none else scores,
                "extra_logs": {
                    "no_verdict": [float(reward is None) for reward in rewards],
                    "votes": [
                        float(each.votes) if isinstance(each, Verdict) else 0.0 for each in outcomes
                    ],
                },
                "errors": [
                    each.error if isinstance(each, RowFailure) else None for each in outcomes
                ],
            }
        )

    def _share(self, score: float) -> float:
        """A score from 0 to 1: its place in the judge's range, or the logistic of a scalar."""
        if type(self.judge) is Judge:
            low, high = self.judge.settings.score_min, self.judge.settings.score_max
            return min(max((score - low) / (high - low), 0.0), 1.0)
        return _logistic(score)

    # -- NeMo-Gym ----------------------------------------------------------------------------------

    def compare(self, fields: dict[str, Any]) -> Asked:
        """`/compare`: the responses of one conversation, judged as one row."""
        asked = self._asked(fields)
        body = _read(fields, _Comparison)
        texts = [_output_text(each, i) for i, each in enumerate(body.response_objs)]
        row = {
            "prompt": body.conversation_history, "responses": texts, "principles": body.principle
        }  # fmt: skip
        asked.entries, asked.one = [read_row(row)], True
        asked.answer = lambda outcomes: _comparison(_verdict(outcomes), len(texts))
        return asked

    # -- vLLM and Jina -----------------------------------------------------------------------------

    def rerank(self, fields: dict[str, Any]) -> Asked:
        """`/rerank`: documents are a row's responses, and the best come first."""
        asked = self._asked(fields)
        body = _read(fields, _Ranking)
        self._check_model(body.model)
        if body.top_n is not None and body.top_n < 0:
            raise Refused(400, f"top_n = {body.top_n} is less than 0")
        texts = [each if isinstance(each, str) else each.text for each in body.documents]
        asked.entries = [read_row({"prompt": body.query, "responses": texts})]
        asked.one = True

        def answer(outcomes: Sequence[Outcome]) -> bytes:
            verdict = _verdict(outcomes)
            scores = _means(verdict, len(texts))
            # Where there is no verdict all are null, in the order in which they came.
            places = sorted(range(len(texts)), key=lambda i: -(scores[i] or 0.0))
            results = [
                {"index": i, "document": {"text": texts[i]}, "relevance_score": scores[i]}
                for i in places[: body.top_n or None]
            ]
            if not body.return_documents:
                for result in results:
                    del result["document"]
            return to_json(
                {
                    "id": f"rerank-{secrets.token_hex(8)}", "model": self.names[0],
                    "usage": _usage(verdict), "results": results,
                }
            )  # fmt: skip

        asked.answer = answer
        return asked

    def classify(self, fields: dict[str, Any]) -> Asked:
        """`/classify`: the scalar of conversations, each of which ends with the response."""
        asked = self._asked(fields)
        judge = self.judge
        if not isinstance(judge, ScalarJudge):
            raise Refused(
                400, "this server's model writes judgements: /classify needs a sequence classifier"
            )
        body = _read(fields, _Classification)
        self._check_model(body.model)
        if (body.input is None) == (body.messages is None):
            raise Refused(400, "classify needs input or messages, and not both")
        conversations: list[Sequence[Any] | RowFailure]
        if body.messages is not None:
            conversations = [body.messages]
        else:
            texts = [body.input] if isinstance(body.input, str) else body.input or []
            conversations = [_turns_of(text, judge) for text in texts]
        if not 1 <= len(conversations) <= self.limits.max_rows:
            raise Refused(
                413 if conversations else 400,
                f"{len(conversations)} inputs; a request has 1 to {self.limits.max_rows}",
            )
        asked.entries = [_answered(each) for each in conversations]
        asked.one = len(conversations) == 1
        activate = body.use_activation is not False

        def answer(outcomes: Sequence[Outcome]) -> bytes:
            data = []
            for i, outcome in enumerate(outcomes):
                score = _means(outcome, 1)[0]
                prob = _logistic(score) if activate and score is not None else score
                failed = {"error": outcome.error} if isinstance(outcome, RowFailure) else {}
                data.append(
                    {"index": i, "label": "LABEL_0", "probs": [prob], "num_classes": 1, **failed}
                )
            return to_json(
                {
                    "id": f"classify-{secrets.token_hex(8)}", "object": "list",
                    "created": int(time.time()), "model": self.names[0], "data": data,
                    "usage": _usage(*(each for each in outcomes if isinstance(each, Verdict))),
                }
            )  # fmt: skip

        asked.answer = answer
        return asked

    # -- OpenAI ------------------------------------------------------------------------------------

    def chat(self, fields: dict[str, Any]) -> Asked:
        """`/v1/chat/completions`: n texts that the judge's model writes. Without a seed one is
        drawn, and told."""
        if type(self.judge) is not Judge:
            raise Refused(400, "this server's model writes no chat: it is no plain language model")
        deadline = read_deadline(fields.pop("deadline_seconds", None))
        body = _read(fields, _Completion)
        self._check_model(body.model)
        for name, neutral in _NEUTRAL.items():
            if getattr(body, name) not in neutral:
                raise Refused(400, f"{name} = {quote(getattr(body, name))} is not supported")
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise Refused(400, "max_tokens beside max_completion_tokens")
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if "" in stops:
            raise Refused(400, "stop holds an empty text")
        seed = secrets.randbits(53) if body.seed is None else body.seed
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        given = {
            "k": 1 if body.n is None else body.n, "seed": seed, "temperature": body.temperature,
            "top_p": body.top_p, "top_k": body.top_k, "min_p": body.min_p, "max_new_tokens": most,
        }  # fmt: skip
        asked = {name: value for name, value in given.items() if value is not None}
        options = read_options(asked, self._of_chats, self.limits)
        try:
            check_json(body.messages, "messages")
            chat = make_chat(body.messages)
        except RowError as error:
            raise Refused(400, f"messages: {error}") from None

        def answer(outcomes: Sequence[Outcome]) -> bytes:
            return self._completion(_verdict(outcomes), stops, seed, bool(body.logprobs))

        return Asked([chat], options, answer, deadline, one=True)

    @cached_property
    def _of_chats(self) -> dict[str, Any]:
        """The options of chats: of the server's own those that are not about scores. They end as
        the judge's rows do where these end by themselves, so that both can share a session."""
        assert isinstance(self.judge, Judge)
        shared = {name: self.defaults[name] for name in _OF_SAMPLING}
        stop = None if self.judge.settings.stop == "eos" else "eos"
        return asdict(JudgeOptions()) | shared | {"stop": stop}

    def _completion(
        self, verdict: Verdict, stops: Sequence[str], seed: int, logprobs: bool
    ) -> bytes:
        assert isinstance(self.judge, Judge)
        choices = []
        for i, sample in enumerate(verdict.samples):
            ends = [place for stop in stops if (place := sample.text.find(stop)) >= 0]
            text = sample.text[: min(ends)] if ends else sample.text
            choices.append(
                {
                    "index": i,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop" if ends or sample.finish == "eos" else "length",
                    "logprobs": _logprobs(sample, self.judge) if logprobs else None,
                }
            )
        prompt = verdict.tree_tokens
        return to_json(
            {
                "id": f"chatcmpl-{secrets.token_hex(8)}", "object": "chat.completion",
                "created": int(time.time()), "model": self.names[0], "seed": seed,
                "choices": choices,
                "usage": {
                    "prompt_tokens": prompt, "completion_tokens": verdict.decode_tokens,
                    "total_tokens": prompt + verdict.decode_tokens,
                },
            }
        )  # fmt: skip

    # -- all of them -------------------------------------------------------------------------------

    def _asked(self, fields: dict[str, Any]) -> Asked:
        """What all routes have in common, taken out of the fields."""
        options = read_options(fields.pop("options", None), self.defaults, self.limits)
        deadline = read_deadline(fields.pop("deadline_seconds", None))
        return Asked([], options, lambda outcomes: b"", deadline)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            raise Refused(404, f"there is no model {quote(name)} here, but {self.names[0]!r}")


# -- others' bodies --------------------------------------------------------------------------------


class _Queries(msgspec.Struct, forbid_unknown_fields=True):
    query: list[str]
    prompts: list[str]
    labels: list[Any] | None = None


class _Comparison(msgspec.Struct, forbid_unknown_fields=True):
    conversation_history: list[Any]
    response_objs: list[dict[str, Any]]
    principle: str | None = None


class _Document(msgspec.Struct):
    text: str


class _Ranking(msgspec.Struct, forbid_unknown_fields=True):
    query: str
    documents: list[str | _Document]
    top_n: int | None = None
    model: str | None = None
    return_documents: bool = True


class _Classification(msgspec.Struct, forbid_unknown_fields=True):
    input: str | list[str] | None = None
    messages: list[Any] | None = None
    model: str | None = None
    use_activation: bool | None = None


class _Completion(msgspec.Struct, forbid_unknown_fields=True):
    messages: list[Any]
    model: str | None = None
    n: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    user: str | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    response_format: dict[str, Any] | None = None


# Fields that are taken where they ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_logprobs": (None, 0),
    "stream": (None, False),
    "frequency_penalty": (None, 0.0),
    "presence_penalty": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "response_format": (None, {"type": "text"}),
}


def _read(fields: Mapping[str, Any], kind: type[S]) -> S:
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise Refused(400, str(error)) from None


def _output_text(response: Mapping[str, Any], index: int) -> str:
    """The text of a response as OpenAI's Responses API has it: of its messages, without what it has
    thought or called."""
    output, texts = response.get("output"), []
    if not isinstance(output, list):
        raise Refused(400, f"response_objs[{index}].output is {quote(output)} and no list")
    for item in output:
        if not isinstance(item, dict):
            raise Refused(400, f"response_objs[{index}].output holds {quote(item)}")
        if item.get("type") != "message":
            continue
        content = item.get("content")
        parts = [{"type": "output_text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise Refused(400, f"response_objs[{index}] has content {quote(content)}")
        for part in parts:
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str) or part.get("type") != "output_text":
                raise Refused(400, f"response_objs[{index}] has content {quote(part)}")
            texts.append(text)
    return "".join(texts)


def _answered(turns: Sequence[Any] | RowFailure) -> Row | RowFailure:
    """The row of a conversation that ends with the response."""
    if isinstance(turns, RowFailure):
        return turns
    last = turns[-1] if turns else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        error = "the conversation does not end with a message of the assistant"
        return RowFailure(None, None, None, error)
    return read_row({"prompt": list(turns[:-1]), "responses": [last.get("content")]})


def _turns_of(text: str, judge: ScalarJudge) -> list[dict[str, str]] | RowFailure:
    """The turns of a text that the model's own chat template has made of a question and its answer;
    a failure where it is no such text, or could be read in two ways."""
    question, answer = secrets.token_hex(16), secrets.token_hex(16)
    whole = judge.prompts.write_chat([("user", question), ("assistant", answer)], False)
    begin, _, rest = whole.partition(question)
    between, _, end = rest.partition(answer)
    if not text.startswith(begin):  # many clients cut off the first token's text
        first = judge.tokenizer.special_tokens.get("bos_token", "")
        begin = begin.removeprefix(first) if first else begin
    if not text.endswith(end):  # or the line's end
        end = end.rstrip()
    inside = text[len(begin) : len(text) - len(end)]
    if not (text.startswith(begin) and text.endswith(end) and inside.count(between) == 1):
        error = "the input is no question and answer in the model's chat template: send messages"
        return RowFailure(None, None, None, error)
    asked, _, said = inside.partition(between)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


# -- answers ---------------------------------------------------------------------------------------


def _lines(outcomes: Sequence[Outcome]) -> bytes:
    lines = (to_line(outcome).rstrip(b"\n") for outcome in outcomes)
    return b'{"outcomes":[' + b",".join(lines) + b"]}"


def _verdict(outcomes: Sequence[Outcome]) -> Verdict:
    (verdict,) = outcomes
    assert isinstance(verdict, Verdict), "the answer of a failure is an error"
    return verdict


def _means(outcome: Outcome, n: int) -> Sequence[float | None]:
    """The mean scores of n responses; null where there is no verdict."""
    found = outcome.mean_scores if isinstance(outcome, Verdict) else None
    return [None] * n if found is None else found


def _comparison(verdict: Verdict, n: int) -> bytes:
    """Rewards, and each judgement's scores of every pair of neighbours, the last and the first."""
    valid = [(i, s.scores) for i, s in enumerate(verdict.samples) if s.scores is not None]
    pairs = [(j, (j + 1) % n) for j in range(n if n > 2 else n - 1)]
    results = [
        {
            "response_i": first, "response_j": second, "judge_idx": i,
            "score_1": scores[first], "score_2": scores[second], "ranking": None,
        }
        for first, second in pairs
        for i, scores in valid
    ]  # fmt: skip
    each = [score for _, scores in valid for score in scores]
    return to_json(
        {
            "rewards": _means(verdict, n),
            "comparison_results": results,
            "metrics": {
                "mean_individual_score": statistics.fmean(each) if each else None,
                "std_individual_score": statistics.pstdev(each) if each else None,
                "tiebreak_usage_rate": 0.0,  # no tie is broken here: rewards are means
            },
        }
    )


def _logprobs(sample: Sample, judge: Judge) -> dict[str, Any]:
    size = judge.tokenizer.size
    tokens = []
    for token, logprob in zip(sample.token_ids, sample.logprobs, strict=True):
        known = token < size
        tokens.append(
            {
                "token": judge.tokenizer.show([token]) if known else "",
                "logprob": logprob,
                "bytes": list(judge.tokenizer.token_bytes[token]) if known else [],
                "top_logprobs": [],
            }
        )
    return {"content": tokens}


def _usage(*verdicts: Verdict) -> dict[str, int]:
    prompt = sum(verdict.tree_tokens for verdict in verdicts)
    written = sum(verdict.decode_tokens for verdict in verdicts)
    return {
        "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written
    }  # fmt: skip


def _logistic(score: float) -> float:
    return 1 / (1 + math.exp(-score)) if score >= 0 else 1 - 1 / (1 + math.exp(score))
