"""Token sequences -> the score of each, which a scalar model reads at its last token.

The sequences of one call form a forest: segments that begin several of them are computed once, and
a head that calls have in common once for all. The forest runs in pieces of PREFILL_TOKENS. A score
depends on its sequence alone: on CPU in float32, and in a deterministic run on a GPU, bit for bit.

It does not know what a sequence says: a judgement (`engine/meta.py`), a response
(`engine/scalar_judge.py`) or a critique (`engine/cloud.py`).
"""

import math
from collections import deque
from collections.abc import Sequence

import torch

from engine.forest import Forest, Node, TokenIds
from engine.forward import CachedForward, last_rows, take_pieces
from engine.generate import PREFILL_TOKENS
from engine.kv_cache import ALIGN, KVCache, cell_bytes, round_up, scratch_cells
from engine.memory import cache_budget, working_bytes
from kernels.segment_attention import Backend
from models.critique_model import CritiqueModel
from models.scalar_head import ScalarModel

CACHE_SHARE = 4  # one part in so many: the keys and values of a judge's samples need more


class SequenceScorer:
    """Scores the sequences of call after call. `tokens` counts those run so far."""

    def __init__(
        self,
        model: ScalarModel | CritiqueModel,
        *,
        deterministic: bool = False,
        prefill_backend: Backend | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        """deterministic: on a GPU a score has the same bits whatever else is scored with it.
        prefill_backend: whose attention runs, None for `forest_attention`; raises ValueError where
        it cannot. cache_bytes bounds keys and values; by default a quarter of what memory allows
        does. Raises ValueError where that is too little for any sequence."""
        self.model = model
        decoder = model.model
        config, weight = decoder.config, decoder.head_weight
        self.context = config.max_position_embeddings
        self.working_bytes = working_bytes(config, weight.dtype, ALIGN, PREFILL_TOKENS)
        if cache_bytes is None:
            budget = cache_budget(config, weight.dtype, weight.device, ALIGN, PREFILL_TOKENS)
            cache_bytes = budget // CACHE_SHARE
        cells = cache_bytes // cell_bytes(config, weight.dtype) // ALIGN * ALIGN - scratch_cells(0)
        if cells < ALIGN:
            raise ValueError(f"{cache_bytes} bytes of cache are too few for the scalar model")
        cells = min(cells, 2 * round_up(self.context) + PREFILL_TOKENS)
        self.cache = KVCache(config, 0, 0, cells, weight.dtype, weight.device)
        self.forest = Forest(self.cache)
        self.tokens = 0
        self._forward = CachedForward(decoder, self.cache, deterministic, prefill_backend)
        self._queue: deque[tuple[Node, int]] = deque()  # what is to be computed, from which token

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[TokenIds]]) -> list[float]:
        """The scores of sequences of at most `context` tokens, each as segments that have some; NaN
        for one that is not a finite number. Raises ValueError where the cache cannot hold one.

        All have their cells at once if there is room; else what has been computed goes, all but the
        last, which shares the most with the next."""
        ends, _ = self.forest.grow(sequences)
        scores = dict.fromkeys(ends, math.nan)
        held: list[Node] = []
        for end in sorted(scores, key=lambda node: [each.number for each in node.path()]):
            while (fresh := self.forest.allocate(end)) is None:
                if not held:
                    raise ValueError(
                        f"a sequence of {end.stop} tokens does not fit the cache, which holds "
                        f"{self.cache.size - self.cache.base}"
                    )
                self._compute(scores)
                kept = held[-1:] if len(held) > 1 else []
                for done in held[: len(held) - len(kept)]:
                    self.forest.release(done)
                held = kept
            held.append(end)
            self._queue.extend((node, 0) for node in fresh)
            if end not in fresh:  # it was computed for another: its last token is run again
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
            self.tokens += sum(stop - first for _, first, stop in pieces)
            if last:
                rows = torch.tensor([*last.values(), *[0] * (-len(last) % ALIGN)])
                logits = self.model.logits(hidden[rows.to(hidden.device)]).tolist()
                for end, logit in zip(last, logits, strict=False):
                    scores[end] = logit if math.isfinite(logit) else math.nan
