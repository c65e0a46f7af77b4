"""The meta reward model: one scalar for each judgement of a row, which says how far to trust it.

It reads what the judge read and wrote: the row's prompt in the order of the sample, through its own
tokenizer and templates, then the sample's text, which is untrusted, then its end token, where the
scalar is read. (Where the end token is also the pad token, transformers never reads there, and nor
does a model that was trained with it: then the end token is left out.)

A row's samples form a forest of their own (`engine/sequence_scorer.py`): prompts share their
segments as the judge's do, and each text is a last segment, so that a row costs P + sum of R
tokens, not k (P + R). A score depends on the row, the order and the text alone.

It does not sample, nor choose who votes (`kernels/vote.py`).
"""

import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.forest import TokenIds
from engine.generate import Usage
from engine.key import model_fingerprint
from engine.prompt import PromptBuilder, read_judge_template
from engine.request import Row
from engine.sequence_scorer import SequenceScorer
from engine.settings import JudgeSettings, read_judge_settings
from models import load_scalar
from models.scalar_head import ScalarModel
from models.tokenizer import Tokenizer


class MetaModel:
    """A scalar reward model of judgements, with its tokenizer, templates and score range."""

    def __init__(
        self,
        model: ScalarModel,
        tokenizer: Tokenizer,
        *,
        judge_template: str,
        chat_template: str | None = None,
        settings: JudgeSettings | None = None,
        fingerprint: str = "",
    ) -> None:
        """As for `Judge`; of the settings only the score range matters, which templates show."""
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings or JudgeSettings()
        self.prompts = PromptBuilder(
            tokenizer, judge_template, self.settings, chat_template=chat_template
        )
        self.fingerprint = fingerprint
        config = model.model.config
        end = tokenizer.end_id(config.eos_token_ids)
        self._end = () if end == config.pad_token_id else (end,)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        numerics: str = "portable",
    ) -> "MetaModel":
        """Load a directory in Hugging Face layout that holds a sequence classifier of one label.

        Its judge_template.jinja and judge.json count, or the defaults. Raises ValueError naming the
        file for anything that cannot be read or is not supported.
        """
        model, tokenizer = load_scalar(directory, dtype, device, numerics)
        return cls(
            model.eval(),
            tokenizer,
            judge_template=read_judge_template(directory),
            settings=read_judge_settings(directory),
            fingerprint=model_fingerprint(directory),
        )

    def prompt(self, row: Row, order: Sequence[int]) -> list[TokenIds]:
        """The segments of what a sample in this order was asked."""
        return [segment.token_ids for segment in self.prompts.segments(row, order)]

    def judgement(self, text: str) -> TokenIds:
        """The tokens of a sample's text, none of them a control token, and the end token."""
        return (*self.tokenizer.encode_text(text), *self._end)


class MetaScorer(SequenceScorer):
    """Scores the samples of row after row; a head that rows have in common is computed once."""

    def __init__(self, meta: MetaModel, *, usage: Usage | None = None, **options: Any) -> None:
        """usage: where tokens and seconds are counted; options: those of `SequenceScorer`."""
        super().__init__(meta.model, **options)
        self.meta = meta
        self.usage = usage if usage is not None else Usage()

    def scores(self, row: Row, samples: Sequence[tuple[Sequence[int], str]]) -> list[float]:
        """The score of each of a row's samples, which are an order and a text.

        A sample that is longer than the model's context has the score NaN, with a warning, so that
        one rambling judgement does not cost the row the others; so has one whose score is not a
        finite number. Raises ValueError where no sample fits, or the templates refuse the row.
        """
        if not samples:
            return []
        start, tokens = time.perf_counter(), self.tokens
        prompts: dict[tuple[int, ...], list[TokenIds]] = {}
        sequences: list[list[TokenIds]] = []
        for order, text in samples:
            shown = tuple(order)
            if shown not in prompts:
                prompts[shown] = self.meta.prompt(row, shown)
            judgement = self.meta.judgement(text)
            sequences.append([*prompts[shown], *([judgement] if judgement else [])])
        lengths = [sum(map(len, sequence)) for sequence in sequences]
        if not 0 < min(lengths) <= self.context:
            raise ValueError(
                f"the shortest judgement with its prompt has {min(lengths)} tokens, the context is "
                f"{self.context}"
            )
        if max(lengths) > self.context:
            warnings.warn(
                f"judgements that do not fit the meta model's context of {self.context} tokens "
                "have no vote",
                RuntimeWarning,
                stacklevel=2,
            )
        fits = [length <= self.context for length in lengths]
        fitting = [sequence for sequence, fit in zip(sequences, fits, strict=True) if fit]
        found = iter(self.score(fitting))
        scores = [next(found) if fit else math.nan for fit in fits]
        self.usage.meta_tokens += self.tokens - tokens
        self.usage.meta_seconds += time.perf_counter() - start
        return scores
