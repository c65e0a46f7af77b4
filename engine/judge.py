"""`Judge`: rows in, verdicts out, in input order. The Python API; the command line goes through it.

    from engine import Judge
    judge = Judge.load("models/pocket")
    verdict = judge("What is 2 + 2?", ["4", "5"], k=8, seed=0)

A row becomes k prompts (one per order of its responses), `generate` samples them, and the valid
samples vote: all alike, or as far as a meta model trusts them. Which order a sample sees, and
how a tie falls, is drawn from streams of its own.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from engine.chat import chat_segments, is_chat, reply_of
from engine.decided import samples_to_draw
from engine.expected import UNIT
from engine.generate import (
    PREFILL_TOKENS,
    Generation,
    Generator,
    Group,
    GroupResult,
    Usage,
    too_long,
)
from engine.key import line_key, model_fingerprint, run_options, weights_fingerprint
from engine.labels import agrees, is_correct
from engine.memory import cache_bound, cache_budget
from engine.meta import MetaModel, MetaScorer
from engine.online import TOO_LATE, Worker
from engine.options import MAX_SHOWN, JudgeOptions
from engine.orders import draw_orders, parts_of, seen_by
from engine.prompt import PromptBuilder, read_chat_template, read_judge_template
from engine.request import BadRow, Message, Row, make_row
from engine.scalar_judge import CONVERSATION
from engine.score_reader import ScoreReader
from engine.sequence_scorer import CACHE_SHARE, SequenceScorer
from engine.session import Flight, Hint, RowJudge, Session, sampling_of
from engine.settings import JudgeSettings, read_judge_settings
from engine.templates import DATE, Template
from engine.thinking import open_thinking
from engine.verdict import RowFailure, Verdict
from kernels.sample_token import stream_key, uniforms
from kernels.segment_attention import Backend
from kernels.vote import VoteResult, vote
from models import load, load_share, load_weights, read_config
from models.tensor_parallel import SplitTransformer
from models.tokenizer import Tokenizer
from models.transformer import Transformer

DEFAULT_BATCH = 256


class Judge(RowJudge):
    """A generative reward model with its tokenizer, templates and score settings."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        judge_template: str,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: str = DATE,
        settings: JudgeSettings | None = None,
        fingerprint: str = "",
        max_batch: int | None = None,
        cache_bytes: int | None = None,
        meta: MetaModel | None = None,
    ) -> None:
        """Templates, their variables and date are as for `PromptBuilder`. `fingerprint` identifies
        the model in keys. max_batch: most samples decoded together (default 256). cache_bytes
        bounds the cache; by default free memory does. meta: says which samples vote, or how much;
        ValueError where it takes scores to be in another range."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings or JudgeSettings()
        self.prompts = self._build_prompts(
            judge_template, chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs, date=date,
        )  # fmt: skip
        self.fingerprint = fingerprint
        self.max_batch = DEFAULT_BATCH if max_batch is None else max_batch
        if self.max_batch < 1:
            raise ValueError(f"max_batch = {max_batch} is less than 1")
        self.cache_bytes = cache_bytes
        self.meta = meta
        if meta is not None and _range(meta.settings) != _range(self.settings):
            raise ValueError(
                f"the meta model's scores are from {_range(meta.settings)}, the judge's from "
                f"{_range(self.settings)}: see judge.json of each"
            )
        self.usage = Usage()
        self._reader = ScoreReader(tokenizer, self.settings, model)

    def _build_prompts(self, template: str, **options: Any) -> PromptBuilder:
        """What writes prompts; options: those of `PromptBuilder`."""
        return PromptBuilder(self.tokenizer, template, self.settings, **options)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        template: str | Path | None = None,
        chat_template: str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: str = DATE,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        numerics: str = "portable",
        max_batch: int | None = None,
        cache_bytes: int | None = None,
        memory_fraction: float | None = None,
        meta: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        group: ProcessGroup | None = None,
    ) -> "Judge":
        """Load a model directory in Hugging Face layout.

        template: a judge template file in place of the directory's own judge_template.jinja or the
        default. chat_template: a file in place of the directory's own chat template;
        chat_template_kwargs: variables for it, such as {"enable_thinking": False}; date
        (YYYY-MM-DD): what templates take for today. dtype "auto" is the stored one; device "auto"
        is a GPU where there is one; numerics "fast" may use CPU instructions whose bits differ from
        processor to processor; max_batch and cache_bytes as for the constructor,
        memory_fraction in place of the latter: of the memory that is free once the weights are
        loaded. meta: the directory of a meta reward model, a sequence classifier of one label, with
        a template of its own. settings: fields of `JudgeSettings` in place of what the directory's
        judge.json says. group: processes of torch.distributed among which the model, not a meta
        model, is divided; all of them judge the same rows, with the same options and cache_bytes,
        and get the same outcomes. Raises ValueError naming the file for anything that cannot be
        read or is not supported.
        """
        directory = Path(directory)
        read_config(directory)  # whatever is wrong there is said first, then of the templates
        own = read_judge_template(directory, template)
        chat = read_chat_template(directory, chat_template)
        for each in (Template("judge", own, date), Template("chat", chat, date)):
            each.check()
        place: dict[str, Any] = {"dtype": dtype, "device": device, "numerics": numerics}
        model: Transformer
        if group is None:
            model, tokenizer = load(directory, **place)
        else:
            if cache_bytes is None:
                raise ValueError("a model that is divided needs cache_bytes, the same everywhere")
            if numerics != "portable":
                raise ValueError(f"numerics {numerics!r} are not for a model that is divided")
            model, tokenizer = load_share(directory, group, dtype, device)
        return cls(
            model.eval(),
            tokenizer,
            judge_template=own,
            chat_template=chat,
            chat_template_kwargs=chat_template_kwargs,
            date=date,
            settings=read_judge_settings(directory, settings),
            fingerprint=model_fingerprint(directory),
            max_batch=max_batch,
            cache_bytes=cache_bound(cache_bytes, memory_fraction, model.head_weight.device),
            meta=None if meta is None else MetaModel.load(meta, **place),
        )

    def __call__(
        self,
        prompt: str | Sequence[Message | dict[str, str]],
        responses: Sequence[str],
        *,
        id: str | None = None,
        label: int | Sequence[float] | None = None,
        reference: str | None = None,
        principles: str | None = None,
        **options: Any,
    ) -> Verdict:
        """Judge one row; options as for `rows`. ValueError for a row that cannot be judged."""
        row = make_row(
            prompt, responses, id=id, label=label, reference=reference, principles=principles
        )
        (outcome,) = self.rows([row], **options)
        if isinstance(outcome, RowFailure):
            raise ValueError(outcome.error)
        return outcome

    def render(
        self,
        prompt: str | Sequence[Message | dict[str, str]],
        responses: Sequence[str],
        order: Sequence[int] | None = None,
        reference: str | None = None,
        principles: str | None = None,
        hint: str | None = None,
        seed: int = 0,
    ) -> list[int]:
        """The token ids of one sample's prompt; `order` defaults to the given one. The seed decides
        the nonce, where the judge's rows have one."""
        row = make_row(prompt, responses, reference=reference, principles=principles)
        return self.prompts.render(row, _shown(row, order), hint, self.prompts.nonce(row, seed))

    def show(
        self,
        prompt: str | Sequence[Message | dict[str, str]],
        responses: Sequence[str],
        **arguments: Any,
    ) -> str:
        """`render`, with its arguments, as text with control tokens written out."""
        return self.tokenizer.show(self.render(prompt, responses, **arguments))

    def opens_thinking(self, row: Row, seed: int = 0) -> bool:
        """Whether the row's prompt ends in an open `<think>`, as some chat templates write it."""
        text = self.prompts.continuation(row, nonce=self.prompts.nonce(row, seed))
        return open_thinking(text) is not None

    def key(self, entry: Row | BadRow, *, hint: Hint | None = None, **options: Any) -> str:
        """The key of an entry's line under the options of `rows`: a hash of all that decides it."""
        chosen = self._options(options)
        if hint is None:  # then no order has a part in it
            return self._key(entry, chosen)
        return self._flight(entry, chosen, hint).key

    def _options(self, given: Mapping[str, Any]) -> JudgeOptions:
        """The options, checked, with k_meta as it holds where there is a meta model."""
        options = JudgeOptions(**given)
        needs_box = options.stop == "box" or options.force_scores or options.score == "expected"
        if self.settings.format != "boxed" and needs_box:
            raise ValueError(
                f"format {self.settings.format!r} has no box to stop at, to force, or to expect "
                "scores in"
            )
        if self.meta is None:
            for name in ("k_meta", "meta_vote"):
                if getattr(options, name) is not None:
                    raise ValueError(f"{name} = {getattr(options, name)} needs a meta model")
            return options
        if options.until_decided is not None:
            raise ValueError(
                "until_decided has no meaning with a meta model: which samples vote is not known "
                "before all k are there"
            )
        if options.meta_vote == "weight":
            return options
        return replace(options, meta_vote="filter", k_meta=options.k_meta or (options.k + 1) // 2)

    def _online(self) -> Worker:
        if isinstance(self.model, SplitTransformer):
            raise ValueError("a model that is divided judges by rows alone, not what is submitted")
        return super()._online()

    def _key(
        self, row: Row | BadRow, options: JudgeOptions, hints: Sequence[str | None] = ()
    ) -> str:
        everything = asdict(options) | {
            **{f"judge_{name}": value for name, value in self.settings.of_judges().items()},
            "stop": options.stop or self.settings.stop,
            **run_options(self.prompts, self.model.head_weight),
        }
        if isinstance(self.model, SplitTransformer):
            everything["processes"] = self.model.group.size()
        if options.score == "drawn":  # as it always was: those lines keep their keys
            del everything["score"]
        if self.meta is not None:
            everything |= {
                "meta_fingerprint": self.meta.fingerprint,
                "meta_template": self.meta.prompts.judge_template,
                "meta_dtype": str(self.meta.model.score.weight.dtype),
                "meta_scale": self.meta.settings.meta_scale,
            }
        if any(hint is not None for hint in hints):
            everything["hints"] = json.dumps(hints)
        return line_key(row, everything, self.fingerprint)

    def rows(
        self, entries: Iterable[Row | BadRow | None], *, hint: Hint | None = None, **options: Any
    ) -> Iterator[Verdict | RowFailure]:
        """Judge rows, taken as there is room for them; one outcome for each, in input order. That
        of a line that is no row is its failure. None has no outcome: it says that no entry is there
        at present, so that those under way go on.

        Options are the fields of `JudgeOptions`. k samples per row at the given temperature (0:
        greedy), top-k, top-p and min-p. orders: "rotate" shows sample j rotation (r + j mod m)
        mod n, r drawn per row, m = max_orders (default min(n, k)); "random" is a free shuffle,
        "fixed" the given order. stop: "box" ends a sample with its first box, which decides, "eos"
        when it ends itself, where the last one does; None is what the judge's settings say.
        force_scores: a sample without valid scores is made to write them (`engine/forced.py`).
        deterministic: on a GPU a sample has the same bits whatever else is judged
        with it; on CPU, where float32 results are reproducible as they are, it changes nothing.
        attention: whose attention computes prompts, of the judge and of a meta model; "auto" is
        `forest_attention`, the others are the backends of `kernels/segment_attention.py`.
        until_decided, a probability: a row draws its samples in rounds and stops when it is this
        sure that the vote of all k would fall as it falls now (engine/decided.py); those that it
        draws are the same. score: "drawn", or "expected", the mean of the distribution that each
        score was drawn from (`engine/expected.py`). vote: what a judgement counts for each response
        (`kernels/vote.py`).
        meta_vote, with a meta model: "filter" lets the k_meta valid samples vote that have the
        highest meta scores (the default, and by default k / 2 of them, rounded up); "weight" lets
        all vote, each by the odds that it is right: exp(meta score x the model's meta_scale). hint
        gives the text that the template's `hint` shows a sample, or None for no hint; a meta model
        sees none. A row that cannot be judged comes out as a RowFailure in its place. Raises
        ValueError for options out of range, for an attention that cannot run here, for
        until_decided with a meta model, and for a box where the judge's format has none.
        """
        return super().rows(entries, hint=hint, **options)

    def update_weights(self, source: str | Path | Transformer, fingerprint: str = "") -> None:
        """Go on with other weights of the same model, in the same memory, once the submitted rows
        are done: those of a directory in Hugging Face layout, or of a model that is trained beside
        this one. fingerprint: of a model, for keys; by default a hash of its weights. Raises
        ValueError for another model."""
        mine = self.model
        if isinstance(source, Transformer):
            theirs = source
        else:
            theirs = load_weights(source, mine.config, mine.head_weight.dtype, "cpu")
            fingerprint = model_fingerprint(source)
        state = theirs.state_dict()
        shapes = {name: tensor.shape for name, tensor in state.items()}
        if shapes != {name: tensor.shape for name, tensor in mine.state_dict().items()}:
            raise ValueError("the weights are of another model")

        def update() -> None:
            mine.load_state_dict(state)
            self.fingerprint = fingerprint or weights_fingerprint(state)

        self.between_rows(update)

    def _new_session(self, options: JudgeOptions) -> "JudgeSession":
        return JudgeSession(self, options)

    def _scorer(self, options: JudgeOptions, backend: Backend | None) -> SequenceScorer | None:
        """What scores samples, where they are scored."""
        if self.meta is None:
            return None
        return MetaScorer(self.meta, usage=self.usage, **self._scorer_options(options, backend))

    def _scorer_options(self, options: JudgeOptions, backend: Backend | None) -> dict[str, Any]:
        bound = self.cache_bytes
        return {
            "deterministic": options.deterministic,
            "prefill_backend": backend,
            "cache_bytes": None if bound is None else bound // CACHE_SHARE,
        }

    def _cache_beside(self, scorer: SequenceScorer) -> int:
        """The bytes of cache that a scorer leaves to the judge."""
        bound = self.cache_bytes
        if bound is not None:
            return bound - bound // CACHE_SHARE
        config, weight = self.model.config, self.model.head_weight
        free = cache_budget(config, weight.dtype, weight.device, self.max_batch, PREFILL_TOKENS)
        return max(free - scorer.working_bytes, 0)

    def _flight(
        self, entry: Row | BadRow, options: JudgeOptions, hint: Hint | None
    ) -> "JudgeFlight":
        if isinstance(entry, BadRow):
            return JudgeFlight(entry, self._key(entry, options), options)
        if is_chat(entry):
            none: list[tuple[int, ...]] = [()] * options.k
            key = self._key(entry, options)
            return JudgeFlight(
                entry, key, options, orders=none, hints=[None] * options.k, shown=none
            )
        orders = draw_orders(entry, options)
        hints = [None if hint is None else hint(entry, order) for order in orders]
        shown = [part for order in orders for part in parts_of(order, options.max_shown)]
        key = self._key(entry, options, hints)
        return JudgeFlight(entry, key, options, orders=orders, hints=hints, shown=shown)

    def group(self, flight: "JudgeFlight") -> Group:
        """What is to be sampled of an entry: nothing of one that has failed."""
        row, options, prompts = flight.entry, flight.options, []
        if isinstance(row, BadRow):
            flight.outcome = flight.failure(row.error)
            return Group([], (0, 0), [], flight)
        nonce, opening = None, b""
        try:
            if flight.num_parts > 1 and self.meta is not None:
                raise ValueError(
                    f"{len(row.responses)} responses; a meta model scores judgements of at most "
                    f"{options.max_shown}"
                )
            nonce = self.prompts.nonce(row, options.seed)
            if is_chat(row):
                prompts = self._chat_prompts(row, options.k)
            else:
                prompts = self._prompts(row, flight, nonce)
                opening = self.prompts.continuation(row, flight.hints[0], nonce).encode()
        except ValueError as error:
            flight.outcome = flight.failure(str(error))
        key = stream_key(options.seed, row.id, "token")
        counts = [*map(len, flight.shown)]
        return Group(
            prompts, key, counts, flight, self._rounds(flight), opening, nonce, flight.is_over
        )

    def _prompts(
        self, row: Row, flight: "JudgeFlight", nonce: str | None
    ) -> list[list[tuple[int, ...]]]:
        """The prompt of each judgement as segments; those that see the same thing share one."""
        hints = [hint for hint in flight.hints for _ in range(flight.num_parts)]
        shown = list(zip(flight.shown, hints, strict=True))
        prompts: dict[tuple[tuple[int, ...], str | None], list[tuple[int, ...]]] = {}
        known: dict[Any, Any] = {}
        context = self.model.config.max_position_embeddings
        for order, hint in shown:
            if (order, hint) not in prompts:
                seen = seen_by(row, order)
                segments = self.prompts.segments(*seen, hint, known, nonce)
                tokens = sum(len(segment.token_ids) for segment in segments)
                if not tokens:
                    raise ValueError("the templates make an empty prompt of this row")
                if tokens >= context:  # in every order: the others are not made
                    raise ValueError(too_long(tokens, context))
                prompts[order, hint] = [segment.token_ids for segment in segments]
        return [prompts[each] for each in shown]

    @cached_property
    def _chats(self) -> PromptBuilder:
        """What writes the prompts of chats."""
        ours = self.prompts
        return PromptBuilder(
            self.tokenizer, CONVERSATION, self.settings, chat_template=ours.chat_template,
            chat_template_kwargs=ours.chat_template_kwargs, date=ours.date,
        )  # fmt: skip

    def _chat_prompts(self, chat: Row, k: int) -> list[list[tuple[int, ...]]]:
        prompt = chat_segments(self._chats, chat)
        tokens, context = sum(map(len, prompt)), self.model.config.max_position_embeddings
        if tokens >= context:
            raise ValueError(too_long(tokens, context))
        return [prompt] * k

    def _rounds(self, flight: "JudgeFlight") -> Callable[[Sequence[Generation]], int] | None:
        """How many samples a row draws next, given those that it has; None: all of them."""
        options = flight.options
        sure = options.until_decided
        if sure is None:
            return None
        cycle = len(set(flight.orders)) if options.orders == "rotate" else 1

        def further(drawn: Sequence[Generation]) -> int:
            scores = self._reader.scores(flight.orders, flight.shown, drawn)
            count = samples_to_draw(scores, options.k, cycle, sure, self.settings, options.vote)
            return count * flight.num_parts

        return further

    def verdict(
        self, flight: "JudgeFlight", result: GroupResult, scorer: SequenceScorer | None
    ) -> Verdict | RowFailure:
        """What comes of an entry whose samples are drawn."""
        row, options = flight.entry, flight.options
        assert isinstance(row, Row)
        if result.error is not None:
            return flight.failure(result.error)
        if result.drawn is not None:
            flight, result = flight.cut(result)
            if not flight.orders:
                return flight.failure(TOO_LATE)
        if is_chat(row):
            return reply_of(row, flight.key, options.k, result, self.tokenizer)
        samples = self._reader.samples(flight.orders, flight.shown, result.generations)
        if isinstance(scorer, MetaScorer):
            valid = [sample for sample in samples if sample.scores is not None]
            try:
                scored = scorer.scores(row, [(sample.order, sample.text) for sample in valid])
            except ValueError as error:
                return flight.failure(f"meta model: {error}")
            for sample, score in zip(valid, scored, strict=True):
                sample.meta = score
        meta = None
        if self.meta is not None:
            scale = self.meta.settings.meta_scale if options.meta_vote == "weight" else 1.0
            scores = [math.nan if s.meta is None else s.meta * scale for s in samples]
            meta = torch.tensor([scores], dtype=torch.float32)
        n = len(row.responses)
        expects = options.score == "expected"
        counted = [
            [round(score * UNIT) for score in s.expected or ()] if expects else s.scores
            for s in samples
        ]
        tie_key = torch.tensor([stream_key(options.seed, row.id, "tie")])
        zero = torch.zeros(1, dtype=torch.int64)
        judged = (
            torch.tensor([[each or [0] * n for each in counted]]),
            torch.tensor([[range(n)] * len(samples)]),
            torch.tensor([[s.scores is not None for s in samples]]),
            torch.tensor([n]),
            uniforms(tie_key, zero, zero),
        )
        # Other rules' points are of no unit, but a single response keeps its score.
        unit = UNIT if expects and (options.vote == "sum" or n == 1) else 1

        def decided(votes: VoteResult) -> tuple[int | None, list[float] | None, bool | None]:
            """The best response, the means, whether that is right."""
            voted = bool(votes.votes[0])
            best = int(votes.best[0]) if voted else None
            means = (votes.mean[0] / unit).tolist() if voted else None
            return best, means, is_correct(best, means, row.label, self.settings.threshold)

        votes = vote(*judged, meta, options.k_meta, options.vote)
        voted = int(votes.votes[0])
        best, means, correct = decided(votes)
        unguided_best = unguided_correct = None
        if meta is not None:
            unguided_best, _, unguided_correct = decided(vote(*judged, rule=options.vote))
        totals = (votes.total[0].double() / unit if expects else votes.total[0]).tolist()
        return Verdict(
            id=row.id,
            key=flight.key,
            best=best,
            scores=totals if voted else None,
            mean_scores=means,
            tie=bool(votes.tie[0]),
            k=options.k,
            valid=sum(sample.scores is not None for sample in samples),
            votes=voted,
            samples=samples,
            prompt_tokens=sum(
                sum(map(len, prompt)) for prompt in result.group.prompts[: len(result.generations)]
            ),
            tree_tokens=result.tree_tokens,
            decode_tokens=sum(sample.tokens for sample in samples),
            k_used=None if options.until_decided is None else len(samples),
            score=options.score,
            vote=options.vote,
            meta_vote=options.meta_vote,
            label=row.label,
            correct=correct,
            unguided_best=unguided_best,
            unguided_correct=unguided_correct,
            agrees=agrees(best, row.label),
            row_meta=row.meta,
            partial=result.drawn is not None,
        )


@dataclass
class JudgeFlight(Flight):
    """And orders and hints of its samples, and the responses that each judgement is shown,
    num_parts of them for a sample."""

    orders: list[tuple[int, ...]] = field(default_factory=list)
    hints: list[str | None] = field(default_factory=list)
    shown: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def num_parts(self) -> int:
        return len(self.shown) // len(self.orders)

    def cut(self, result: GroupResult) -> tuple["JudgeFlight", GroupResult]:
        """Flight and result with those samples alone all of whose judgements were drawn."""
        assert result.drawn is not None
        parts, drawn = self.num_parts, dict(zip(result.drawn, result.generations, strict=True))
        whole = [
            sample
            for sample in range(len(self.orders))
            if all(sample * parts + part in drawn for part in range(parts))
        ]
        judgements = [sample * parts + part for sample in whole for part in range(parts)]
        prompts = [result.group.prompts[j] for j in judgements]
        flight = replace(
            self,
            orders=[self.orders[sample] for sample in whole],
            shown=[self.shown[j] for j in judgements],
        )
        generations = [drawn[j] for j in judgements]
        return flight, replace(
            result, group=replace(result.group, prompts=prompts), generations=generations
        )


class JudgeSession(Session):
    """A generator, and a scorer of samples where there is one."""

    def __init__(self, judge: Judge, options: JudgeOptions) -> None:
        self.judge = judge
        backend = None if options.attention == "auto" else options.attention
        self.scorer, cache_bytes = judge._scorer(options, backend), judge.cache_bytes
        if self.scorer is not None:
            cache_bytes = judge._cache_beside(self.scorer)
        stop = options.stop or judge.settings.stop
        rules = judge.settings.rules(stop, judge.prompts.uses_nonce)
        reader = judge._reader
        self.generator = Generator(
            judge.model,
            reader.automaton(rules),
            options=sampling_of(options),
            max_new_tokens=options.max_new_tokens,
            max_batch=judge.max_batch,
            max_scores=MAX_SHOWN,
            stop=stop,
            form=reader.form(rules) if options.force_scores else None,
            edges=reader.edges(rules) if options.score == "expected" else None,
            deterministic=options.deterministic,
            prefill_backend=backend,
            cache_bytes=cache_bytes,
            usage=judge.usage,
        )
        models = [judge.model, *([] if self.scorer is None else [self.scorer.model])]
        super().__init__(options, [p for model in models for p in model.parameters()])

    def run(self, flights: Iterable[Flight | None]) -> Iterator[Flight]:
        def groups() -> Iterator[Group | None]:
            for flight in flights:
                assert flight is None or isinstance(flight, JudgeFlight)
                yield None if flight is None else self.judge.group(flight)

        for result in self.generator.run(groups()):
            flight: JudgeFlight = result.group.tag
            if flight.outcome is None:
                flight.outcome = self.judge.verdict(flight, result, self.scorer)
            yield flight

    def forget(self) -> None:
        self.generator.forget()
        if self.scorer is not None:
            self.scorer.forest.forget()


def _shown(row: Row, order: Sequence[int] | None) -> list[int]:
    """The order in which a row's responses are shown; ValueError if it is no permutation."""
    shown = list(range(len(row.responses))) if order is None else list(order)
    if sorted(shown) != list(range(len(row.responses))):
        raise ValueError(f"order {shown} is not a permutation of the responses")
    return shown


def _range(settings: JudgeSettings) -> tuple[int, int]:
    return settings.score_min, settings.score_max
