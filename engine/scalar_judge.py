"""A scalar reward model as it is commonly used: a conversation and one response -> one score.

It reads the conversation, then the response as the assistant's turn, both through the model's chat
template, with the end that the template puts there. That is what `apply_chat_template` gives the
`...ForSequenceClassification` models of transformers, Skywork-Reward and its like, and the score is
read where they read it: at the last token that is not the pad token. Only the texts of the row are
tokenized by themselves, without control tokens (`engine/prompt.py`).

All responses of a row form a tree, so that the conversation is computed once. A score means nothing
by itself: after training by Bradley-Terry (`train/scalar_rm.py`) a difference of two scores is the
log-odds that the one response is better than the other.

A row's reference and principles are not read, and nothing is sampled.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.forest import TokenIds
from engine.prompt import PromptBuilder, read_chat_template
from engine.request import Row
from engine.sequence_scorer import SequenceScorer
from engine.settings import JudgeSettings, read_judge_settings
from engine.templates import DATE
from engine.verdict import RowFailure
from models import load_scalar
from models.scalar_head import ScalarModel
from models.tokenizer import Tokenizer

# A judge template: the row's own turns, and the one response as the last.
TURNS = (
    "{% for message in messages %}{{ turn(message.role) }}{{ message.content }}{% endfor %}"
    "{{ turn('assistant') }}{{ responses[0] }}"
)


class ScalarJudge:
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
    ) -> None:
        """Template, its variables and date are as for `PromptBuilder`; of the settings only
        join_blanks matters."""
        self.model = model
        self.tokenizer = tokenizer
        self.prompts = PromptBuilder(
            tokenizer, TURNS, settings or JudgeSettings(), chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs, date=date, is_answered=True,
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
    ) -> "ScalarJudge":
        """Load a directory in Hugging Face layout that holds a sequence classifier of one label.

        chat_template: a file in place of the directory's own. Raises ValueError naming the file for
        anything that cannot be read or is not supported.
        """
        model, tokenizer = load_scalar(directory, dtype, device)
        return cls(
            model.eval(),
            tokenizer,
            chat_template=read_chat_template(directory, chat_template),
            chat_template_kwargs=chat_template_kwargs,
            date=date,
            settings=read_judge_settings(directory),
        )

    def sequences(self, row: Row) -> list[list[TokenIds]]:
        """What is read of a row, as segments: a sequence for each response, up to the token that
        its score is read at. Raises ValueError where one is longer than the model's context, and
        where the templates refuse the row."""
        config = self.model.model.config
        known: dict[Any, Any] = {}
        sequences = []
        for number, response in enumerate(row.responses, 1):
            shown = replace(row, responses=(response,), reference=None, principles=None)
            segments = [each.token_ids for each in self.prompts.segments(shown, [0], known=known)]
            while segments and segments[-1][-1] == config.pad_token_id:
                *before, last = segments
                segments = [*before, last[:-1]] if len(last) > 1 else before
            tokens = sum(map(len, segments))
            if not 0 < tokens <= config.max_position_embeddings:
                raise ValueError(
                    f"the conversation with response {number} has {tokens} tokens, the context is "
                    f"{config.max_position_embeddings}"
                )
            sequences.append(segments)
        return sequences

    def rows(
        self, rows: Iterable[Row], *, deterministic: bool = False, cache_bytes: int | None = None
    ) -> Iterator[list[float] | RowFailure]:
        """The scores of each row's responses, in the row's own order, one row after another. A row
        that cannot be read, or has a score that is not a finite number, comes out as a RowFailure
        in its place. Options are those of `SequenceScorer`."""
        scorer = SequenceScorer(self.model, deterministic=deterministic, cache_bytes=cache_bytes)
        for row in rows:
            try:
                scores = scorer.score(self.sequences(row))
                if not all(map(math.isfinite, scores)):
                    raise ValueError(f"scores {scores} are not all finite numbers")
            except ValueError as error:
                yield RowFailure(row.id, row.line, None, str(error))
            else:
                yield scores
