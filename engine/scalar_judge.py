"""A scalar reward model as it is commonly used: a conversation and one response -> one score.

It reads the conversation, then the response as the assistant's turn, both through the model's chat
template, with the end that the template puts there. That is what `apply_chat_template` gives the
`...ForSequenceClassification` models of transformers, Skywork-Reward and its like, and the score is
read where they read it: at the last token that is not the pad token. Only the texts of the row are
tokenized by themselves, without control tokens (`engine/prompt.py`).

All responses of a row form a tree, so that the conversation is computed once. A score means nothing
by itself: after training by Bradley-Terry (`train/scalar_rm.py`) a difference of two scores is the
log-odds that the one response is better than the other. So a row of one response has a score, and
is neither right nor wrong.

A model whose judge.json says `"compares": true` reads two responses in one turn, and its scalar is
the log-odds that the first is better. All ordered pairs of a row are read, and its scores are those
whose differences are nearest to what both orders say. A single response has none.

`ScalarJudge` is to `engine.sample` what `Judge` is: a row's verdict is that of one sample, without
a text. A row's reference and principles are not read, and nothing is drawn but ties.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import torch

from engine.forest import TokenIds
from engine.generate import Usage
from engine.head_scores import options_of, verdict_of
from engine.key import line_key, model_fingerprint, run_options
from engine.memory import cache_bound
from engine.options import JudgeOptions
from engine.prompt import PromptBuilder, Segment, read_chat_template
from engine.request import BadRow, Message, Row
from engine.sequence_scorer import SequenceScorer
from engine.session import Flight, Hint, RowJudge, Session
from engine.settings import JudgeSettings, read_judge_settings
from engine.templates import DATE
from engine.verdict import RowFailure, Sample, Verdict
from models import load_scalar
from models.scalar_head import ScalarModel
from models.tokenizer import Tokenizer

# A judge template: the row's own turns,
CONVERSATION = (
    "{% for message in messages %}{{ turn(message.role) }}{{ message.content }}{% endfor %}"
)
# and the one response as the last.
TURNS = CONVERSATION + "{{ turn('assistant') }}{{ responses[0] }}"
# Another: what a model that compares reads.
PAIR = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\n{% endfor %}"
    "[Response A]\n{{ responses[0] }}\n\n[Response B]\n{{ responses[1] }}\n\n"
    "Is response A better than response B?"
)
OPTIONS = ("seed", "deterministic", "attention")  # of `JudgeOptions`, those that have a meaning


class ScalarPrompts(PromptBuilder):
    """What a scalar model reads: a conversation and one response, or two where it compares."""

    def __init__(self, tokenizer: Tokenizer, settings: JudgeSettings, **options: Any) -> None:
        """options: those of `PromptBuilder`."""
        template = PAIR if settings.compares else TURNS
        super().__init__(tokenizer, template, settings, is_answered=True, **options)

    def segments(
        self,
        row: Row,
        order: Sequence[int],
        hint: str | None = None,
        known: dict[Any, Any] | None = None,
        nonce: str | None = None,
    ) -> list[Segment]:
        """As of `PromptBuilder`, of the responses in `order`; reference and principles are not
        shown."""
        shown = with_responses(row, order, self.trims and not self.settings.compares)
        return super().segments(shown, range(len(order)), known=known)


class ScalarJudge(RowJudge):
    """A scalar reward model of responses, with its tokenizer and chat template."""

    def __init__(
        self,
        model: ScalarModel,
        tokenizer: Tokenizer,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: str = DATE,
        settings: JudgeSettings | None = None,
        fingerprint: str = "",
        cache_bytes: int | None = None,
    ) -> None:
        """Template, its variables and date are as for `PromptBuilder`; of the settings only
        join_blanks and compares matter. `fingerprint` identifies the model in keys; cache_bytes is
        as for `SequenceScorer`."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.cache_bytes = cache_bytes
        self.usage = Usage()
        settings = settings or JudgeSettings()
        self.compares = settings.compares
        self.prompts = ScalarPrompts(
            tokenizer, settings, chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs, date=date,
        )  # fmt: skip

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        chat_template: str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: str = DATE,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        numerics: str = "portable",
        cache_bytes: int | None = None,
        memory_fraction: float | None = None,
    ) -> "ScalarJudge":
        """Load a directory in Hugging Face layout that holds a sequence classifier of one label.

        chat_template: a file in place of the directory's own; cache_bytes as for `SequenceScorer`,
        memory_fraction as for `Judge.load`.
        Raises ValueError naming the file for anything that cannot be read or is not supported.
        """
        model, tokenizer = load_scalar(directory, dtype, device, numerics)
        return cls(
            model.eval(),
            tokenizer,
            chat_template=read_chat_template(directory, chat_template),
            chat_template_kwargs=chat_template_kwargs,
            date=date,
            settings=read_judge_settings(directory),
            fingerprint=model_fingerprint(directory),
            cache_bytes=cache_bound(cache_bytes, memory_fraction, model.score.weight.device),
        )

    def sequences(self, row: Row) -> list[list[TokenIds]]:
        """What is read of a row, as segments: a sequence for each of `reads_of`, up to the token
        that its scalar is read at. Raises ValueError where one is longer than the model's context,
        where the templates refuse the row, and where there is nothing to compare."""
        config = self.model.model.config
        known: dict[Any, Any] = {}
        sequences = []
        for read in self.reads_of(row):
            segments = [each.token_ids for each in self.prompts.segments(row, read, known=known)]
            while segments and segments[-1][-1] == config.pad_token_id:
                *before, last = segments
                segments = [*before, last[:-1]] if len(last) > 1 else before
            tokens = sum(map(len, segments))
            if not 0 < tokens <= config.max_position_embeddings:
                raise ValueError(
                    f"the conversation with response {' and '.join(str(i + 1) for i in read)} has "
                    f"{tokens} tokens, the context is {config.max_position_embeddings}"
                )
            sequences.append(segments)
        return sequences

    def reads_of(self, row: Row) -> list[tuple[int, ...]]:
        """The responses that each sequence of a row shows: one, or all ordered pairs. Raises
        ValueError where there is nothing to compare."""
        places = range(len(row.responses))
        if not self.compares:
            return [(place,) for place in places]
        if len(places) < 2:
            raise ValueError("one response, and the model compares two")
        return list(permutations(places, 2))

    def scores_of(self, row: Row, scalars: Sequence[float]) -> list[float]:
        """A row's scores, of the scalars of its sequences. Of comparisons by least squares: a
        response's score is what it has over each response, itself too, on average."""
        if not self.compares:
            return list(scalars)
        of_pair = dict(zip(self.reads_of(row), scalars, strict=True))
        places = range(len(row.responses))
        return [
            math.fsum(of_pair[i, j] - of_pair[j, i] for j in places if j != i) / (2 * len(places))
            for i in places
        ]

    def opens_thinking(self, row: Row, seed: int = 0) -> bool:
        """No prompt ends in an open `<think>`: nothing is written."""
        return False

    def key(self, entry: Row | BadRow, **options: Any) -> str:
        """The key of an entry's line under the options of `rows`: a hash of all that decides it."""
        return self._key(entry, options_of(options, OPTIONS))

    def _key(self, entry: Row | BadRow, options: JudgeOptions) -> str:
        everything = {name: getattr(options, name) for name in OPTIONS} | {
            "join_blanks": self.prompts.settings.join_blanks,
            **run_options(self.prompts, self.model.score.weight),
        }
        return line_key(entry, everything, self.fingerprint)

    def rows(
        self, entries: Iterable[Row | BadRow | None], *, hint: Hint | None = None, **options: Any
    ) -> Iterator[Verdict | RowFailure]:
        """Judge rows: one outcome for each entry but None, in input order.

        Of the options of `Judge.rows`, OPTIONS have a meaning, and others have to be as they are by
        default; a hint has none. A verdict has one sample, which holds the scores in the row's own
        order, `score` is "head", and `correct` is None where there is one response. A row that
        cannot be read, or has a score that is not a finite number, comes out as a RowFailure in its
        place. Raises ValueError for options out of range.
        """
        return super().rows(entries, hint=hint, **options)

    def _options(self, given: Mapping[str, Any]) -> JudgeOptions:
        return options_of(given, OPTIONS)

    def _flight(self, entry: Row | BadRow, options: JudgeOptions, hint: Hint | None) -> Flight:
        return Flight(entry, self._key(entry, options), options)

    def _new_session(self, options: JudgeOptions) -> "ScalarSession":
        return ScalarSession(self, options)

    def outcome(self, flight: Flight, scorer: SequenceScorer) -> Verdict | RowFailure:
        """What comes of an entry."""
        entry = flight.entry
        if isinstance(entry, BadRow):
            return flight.failure(entry.error)
        start, before = time.perf_counter(), scorer.tokens
        try:
            sequences = self.sequences(entry)
            scores = self.scores_of(entry, scorer.score(sequences))
            if not all(map(math.isfinite, scores)):
                raise ValueError(f"scores {scores} are not all finite numbers")
        except ValueError as error:
            return flight.failure(str(error))
        finally:
            self.usage.prefill_tokens += scorer.tokens - before
            self.usage.prefill_seconds += time.perf_counter() - start
        sample = Sample((), "", tuple(scores), None, None, 0, "eos", [], [], [])
        tokens = sum(len(segment) for sequence in sequences for segment in sequence)
        seed, tree_tokens = flight.options.seed, distinct_tokens(sequences)
        return verdict_of(entry, flight.key, [sample], seed, tokens, tree_tokens)


class ScalarSession(Session):
    """A scorer of sequences."""

    def __init__(self, judge: ScalarJudge, options: JudgeOptions) -> None:
        self.judge = judge
        self.scorer = SequenceScorer(
            judge.model,
            deterministic=options.deterministic,
            prefill_backend=None if options.attention == "auto" else options.attention,
            cache_bytes=judge.cache_bytes,
        )
        super().__init__(options, judge.model.parameters())

    def run(self, flights: Iterable[Flight | None]) -> Iterator[Flight]:
        for flight in flights:
            if flight is not None:
                flight.outcome = self.judge.outcome(flight, self.scorer)
                yield flight

    def forget(self) -> None:
        self.scorer.forest.forget()


def with_responses(row: Row, places: Sequence[int], trims: bool) -> Row:
    """What a scalar is of: a row's conversation, and some of its responses. trims: the texts are
    without outer blanks, as the chat template has them where each is a turn."""

    def shown(text: str) -> str:
        return text.strip() if trims else text

    return replace(
        row,
        messages=tuple(Message(each.role, shown(each.content)) for each in row.messages),
        responses=tuple(shown(row.responses[place]) for place in places),
        reference=None,
        principles=None,
    )


def distinct_tokens(sequences: Iterable[Sequence[TokenIds]]) -> int:
    """The tokens of the tree that sequences of segments form."""
    paths = {tuple(each[: i + 1]) for each in sequences for i in range(len(each))}
    return sum(len(path[-1]) for path in paths)
