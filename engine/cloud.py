"""Critique-out-Loud reward models (arXiv 2408.11791): critiques, and what a head gives each.

Each response is read by itself, as the assistant's turn of its conversation; then, in a turn of the
user, the model writes a critique of it. At the token that ends the critique, its reward head gives
a reward (`models/critique_model.py`). A sample of a row is a critique and a reward of each of its
responses; the means of k samples decide.

The turn of the critique begins as the published models were trained on (CRITIQUE), or as a template
has it. Rewards are read over the tokens that were drawn, with the turn's end token in the place of
any other, where the authors strip a critique and tokenize it anew. Their sampler had a repetition
penalty of 1.01; there is none here.

`CloudJudge` is to `engine.sample` what `Judge` is. One copy of the weights writes and is read.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.forest import TokenIds
from engine.generate import GroupResult
from engine.head_scores import options_of, verdict_of
from engine.judge import Judge, JudgeFlight
from engine.key import model_fingerprint
from engine.memory import cache_bound
from engine.online import TOO_LATE
from engine.options import JudgeOptions
from engine.prompt import PromptBuilder, Segment, read_chat_template
from engine.request import Row, make_row
from engine.scalar_judge import TURNS, with_responses
from engine.sequence_scorer import SequenceScorer
from engine.settings import JudgeSettings
from engine.templates import DATE
from engine.verdict import RowFailure, Verdict
from kernels.segment_attention import Backend
from models import CritiqueModel, base_of, load_critique
from models.files import read_text
from models.tokenizer import Tokenizer

# A judge template, which ends in the turn that the critique goes on with.
CRITIQUE = (
    TURNS + "{{ turn('user') }}The following is a break down on the correctness and usefulness of "
    "the assistant's response to my question: "
)
SETTINGS = JudgeSettings(anchor=None)  # no scores are read
# Of `JudgeOptions`, those that have a meaning.
OPTIONS = (
    "k", "temperature", "top_p", "top_k", "min_p", "max_new_tokens", "seed", "deterministic",
    "attention",
)  # fmt: skip


def read_critique_template(file: str | Path | None = None) -> str:
    """The text of a file with a template, or else CRITIQUE."""
    return CRITIQUE if file is None else read_text(Path(file), "a judge template")


class CritiquePrompts(PromptBuilder):
    """Prompts of one response each, which end within a turn."""

    def __init__(self, tokenizer: Tokenizer, template: str, **options: Any) -> None:
        """template: a judge template whose last turn the critique goes on with; options: those of
        `PromptBuilder`. Raises ValueError as that does, and for a chat template that ends its turns
        with no token of its own."""
        super().__init__(tokenizer, template, SETTINGS, is_answered=True, **options)
        self.end = self._ended(super().segments(make_row("q", ["a"]), [0]))[1]

    def segments(
        self,
        row: Row,
        order: Sequence[int],
        hint: str | None = None,
        known: dict[Any, Any] | None = None,
        nonce: str | None = None,
    ) -> list[Segment]:
        """As of `PromptBuilder`, of the first response; reference and principles are not shown."""
        shown = with_responses(row, order[:1], self.trims)
        return self._ended(super().segments(shown, [0], known=known))[0]

    def continuation(self, row: Row, hint: str | None = None, nonce: str | None = None) -> str:
        """What a critique goes on with is no part of it."""
        return ""

    def _ended(self, segments: list[Segment]) -> tuple[list[Segment], int]:
        """The segments without the end of the last turn, and the token that it begins with."""
        *before, tail = segments
        ends = [i for i, t in enumerate(tail.token_ids) if t in self.tokenizer.control_ids]
        if tail.kind != "tail" or not ends or not ends[-1]:
            raise ValueError("the chat template ends a turn with no token of its own")
        tokens = tail.token_ids[: ends[-1]]
        return [*before, Segment("tail", tokens)], tail.token_ids[ends[-1]]


class CloudJudge(Judge):
    """A critique model with its tokenizer and chat template."""

    end: int  # the token that ends a turn

    def __init__(
        self,
        critic: CritiqueModel,
        tokenizer: Tokenizer,
        *,
        template: str = CRITIQUE,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: str = DATE,
        fingerprint: str = "",
        max_batch: int | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        """template: as for `CritiquePrompts`, all else as for `Judge`."""
        super().__init__(
            critic.model, tokenizer, judge_template=template, chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs, date=date, settings=SETTINGS,
            fingerprint=fingerprint, max_batch=max_batch, cache_bytes=cache_bytes,
        )  # fmt: skip
        self.critic = critic
        config = critic.model.config
        critic.model.config = replace(config, eos_token_ids=config.eos_token_ids | {self.end})

    def _build_prompts(self, template: str, **options: Any) -> PromptBuilder:
        prompts = CritiquePrompts(self.tokenizer, template, **options)
        self.end = prompts.end
        return prompts

    @classmethod
    def load(  # type: ignore[override]
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
    ) -> "CloudJudge":
        """Load a directory in the layout of the published models; template: a file in place of
        CRITIQUE, all else as for `Judge.load`. Raises ValueError naming the file for anything that
        cannot be read or is not supported."""
        critic, tokenizer = load_critique(directory, dtype, device, numerics)
        base = (base_of(directory) / "config.json").read_bytes()
        ends = sorted(critic.model.config.eos_token_ids)
        of_base = hashlib.sha256(base + str(ends).encode()).hexdigest()
        return cls(
            critic.eval(),
            tokenizer,
            template=read_critique_template(template),
            chat_template=read_chat_template(directory, chat_template),
            chat_template_kwargs=chat_template_kwargs,
            date=date,
            fingerprint=f"{model_fingerprint(directory)} {of_base}",
            max_batch=max_batch,
            cache_bytes=cache_bound(cache_bytes, memory_fraction, critic.model.head_weight.device),
        )

    def _options(self, given: Mapping[str, Any]) -> JudgeOptions:
        return replace(options_of(given, OPTIONS), orders="fixed", max_shown=1)

    def _scorer(self, options: JudgeOptions, backend: Backend | None) -> SequenceScorer:
        return SequenceScorer(self.critic, **self._scorer_options(options, backend))

    def verdict(
        self, flight: JudgeFlight, result: GroupResult, scorer: SequenceScorer | None
    ) -> Verdict | RowFailure:
        row, options = flight.entry, flight.options
        assert isinstance(row, Row) and scorer is not None
        if result.error is not None:
            return flight.failure(result.error)
        if result.drawn is not None:
            flight, result = flight.cut(result)
            if not flight.orders:
                return flight.failure(TOO_LATE)
        prompts = result.group.prompts
        before = scorer.tokens
        try:
            rewards = scorer.score([
                self._critique(prompt, generation.token_ids, generation.finish == "eos")
                for prompt, generation in zip(prompts, result.generations, strict=True)
            ])  # fmt: skip
        except ValueError as error:
            return flight.failure(str(error))
        self.usage.prefill_tokens += scorer.tokens - before
        if not all(map(math.isfinite, rewards)):
            return flight.failure(f"rewards {rewards} are not all finite numbers")
        n = len(row.responses)
        samples = [
            replace(sample, order=(), scores=tuple(rewards[i * n : (i + 1) * n]), invalid=None)
            for i, sample in enumerate(
                self._reader.samples(flight.orders, flight.shown, result.generations)
            )
        ]
        tokens = sum(len(segment) for prompt in prompts for segment in prompt)
        found = verdict_of(row, flight.key, samples, options.seed, tokens, result.tree_tokens)
        return replace(found, partial=result.drawn is not None)

    def _critique(
        self, prompt: Sequence[TokenIds], tokens: Sequence[int], ended: bool
    ) -> list[TokenIds]:
        """What a critique's reward is read at the end of; one that the context cut ends there."""
        own = tokens[:-1] if ended else tokens
        room = self.model.config.max_position_embeddings - sum(map(len, prompt)) - 1
        return [*prompt, (*own[:room], self.end)]
