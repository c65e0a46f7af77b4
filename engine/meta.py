"""The meta reward model: one scalar for each judgement of a row, which says how far to trust it.

It reads what the judge read and wrote: the row's prompt in the order of the sample, through its own
tokenizer and templates, then the sample's text, which is untrusted, then its end token, where the
scalar is read. (Where the end token is also the pad token, transformers never reads there, and nor
does a model that was trained with it: then the end token is left out.)

A row's samples form a forest of their own: prompts share their segments as the judge's do, and each
text is a last segment, so that a row costs P + sum of R tokens, not k (P + R). It runs in pieces of
PREFILL_TOKENS. A score depends on the row, the order and the text alone: on CPU in float32, and
in a deterministic run on a GPU, bit for bit.

It does not sample, nor choose who votes (`kernels/vote.py`).
"""

import math
import time
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.forest import Forest, Node, TokenIds
from engine.forward import CachedForward, last_rows, take_pieces
from engine.generate import PREFILL_TOKENS, Usage
from engine.key import model_fingerprint
from engine.kv_cache import ALIGN, KVCache, cell_bytes, round_up, scratch_cells
from engine.memory import cache_budget, working_bytes
from engine.prompt import PromptBuilder, read_judge_template
from engine.request import Row
from engine.settings import JudgeSettings, read_judge_settings
from kernels.segment_attention import Backend
from models import load_scalar
from models.scalar_head import ScalarModel
from models.tokenizer import Tokenizer

CACHE_SHARE = 4  # one part in so many: the judge's keys and values, of many samples, need more


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
    ) -> "MetaModel":
        """Load a directory in Hugging Face layout that holds a sequence classifier of one label.

        Its judge_template.jinja and judge.json count, or the defaults. Raises ValueError naming the
        file for anything that cannot be read or is not supported.
        """
        model, tokenizer = load_scalar(directory, dtype, device)
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


class MetaScorer:
    """Scores the samples of row after row; a head that rows have in common is computed once."""

    def __init__(
        self,
        meta: MetaModel,
        *,
        deterministic: bool = False,
        prefill_backend: Backend | None = None,
        cache_bytes: int | None = None,
        usage: Usage | None = None,
    ) -> None:
        """deterministic: on a GPU a score has the same bits whatever else is scored with it.
        prefill_backend: whose attention runs, None for `forest_attention`; raises ValueError where
        it cannot. cache_bytes bounds keys and values; by default a quarter of what memory allows
        does."""
        self.meta = meta
        self.usage = usage if usage is not None else Usage()
        decoder = meta.model.model
        config, weight = decoder.config, decoder.head_weight
        self.context = config.max_position_embeddings
        self.working_bytes = working_bytes(config, weight.dtype, ALIGN, PREFILL_TOKENS)
        if cache_bytes is None:
            budget = cache_budget(config, weight.dtype, weight.device, ALIGN, PREFILL_TOKENS)
            cache_bytes = budget // CACHE_SHARE
        cells = cache_bytes // cell_bytes(config, weight.dtype) // ALIGN * ALIGN - scratch_cells(0)
        if cells < ALIGN:
            raise ValueError(f"{cache_bytes} bytes of cache are too few for the meta model")
        cells = min(cells, 2 * round_up(self.context) + PREFILL_TOKENS)
        self.cache = KVCache(config, 0, 0, cells, weight.dtype, weight.device)
        self.forest = Forest(self.cache)
        self._forward = CachedForward(decoder, self.cache, deterministic, prefill_backend)
        self._queue: deque[tuple[Node, int]] = deque()  # what is to be computed, from which token

    def scores(self, row: Row, samples: Sequence[tuple[Sequence[int], str]]) -> list[float]:
        """The score of each of a row's samples, which are an order and a text.

        A sample that is longer than the model's context has the score NaN, with a warning, so that
        one rambling judgement does not cost the row the others; so has one whose score is not a
        finite number. Raises ValueError where no sample fits, or the templates refuse the row.
        """
        if not samples:
            return []
        start = time.perf_counter()
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
        found = iter(self._score(fitting))
        scores = [next(found) if fit else math.nan for fit in fits]
        self.usage.meta_seconds += time.perf_counter() - start
        return scores

    @torch.inference_mode()
    def _score(self, sequences: Sequence[Sequence[TokenIds]]) -> list[float]:
        """Scores at the ends of token sequences. All have their cells at once if there is room;
        else what has been computed goes, all but the last, which shares the most with the next."""
        ends, _ = self.forest.grow(sequences)
        scores = dict.fromkeys(ends, math.nan)
        held: list[Node] = []
        for end in sorted(scores, key=lambda node: [each.number for each in node.path()]):
            while (fresh := self.forest.allocate(end)) is None:
                if not held:
                    raise ValueError(
                        f"a judgement with its prompt needs {end.stop} tokens of cache, there are "
                        f"{self.cache.size - self.cache.base}"
                    )
                self._compute(scores)
                kept = held[-1:] if len(held) > 1 else []
                for done in held[: len(held) - len(kept)]:
                    self.forest.release(done)
                held = kept
            held.append(end)
            self._queue.extend((node, 0) for node in fresh)
            if end not in fresh:  # a head of rows before: its last token is run again
                self._queue.append((end, len(end.token_ids) - 1))
        self._compute(scores)
        for done in held:
            self.forest.release(done)
        return [scores[end] for end in ends]

    def _compute(self, scores: dict[Node, float]) -> None:
        """Run the queue, and fill in the scores of the ends that it reaches."""
        while self._queue:
            pieces = take_pieces(self._queue, PREFILL_TOKENS)
            last = last_rows(pieces, scores)
            hidden = self._forward.prefill(pieces)
            self.usage.meta_tokens += sum(stop - first for _, first, stop in pieces)
            if last:
                rows = torch.tensor([*last.values(), *[0] * (-len(last) % ALIGN)])
                logits = self.meta.model.logits(hidden[rows.to(hidden.device)]).tolist()
                for end, logit in zip(last, logits, strict=False):
                    scores[end] = logit if math.isfinite(logit) else math.nan
