"""Generated tokens -> the samples of a row, with their scores.

Scores in boxes are read on the device while tokens are drawn (`kernels/extract_scores.py`); this
module makes the automaton for one tokenizer and model. Scores in another format are read here, from
the whole text (`engine/formats.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from engine.expected import UNIT, number_edges
from engine.forced import ScoreForm
from engine.formats import read_verdict
from engine.generate import Generation
from engine.orders import in_row_order
from engine.settings import JudgeSettings
from engine.verdict import Sample
from kernels.expected_score import NumberEdges
from kernels.extract_scores import ScoreAutomaton
from kernels.score_grammar import Reason, ScoreRules
from models.tokenizer import Tokenizer
from models.transformer import Transformer

_TAGS = ("<think>", "</think>")


class ScoreReader:
    """What reads one judge's scores."""

    def __init__(self, tokenizer: Tokenizer, settings: JudgeSettings, model: Transformer) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self._vocab_size, self._device = model.config.vocab_size, model.head_weight.device
        self._automata: dict[ScoreRules, ScoreAutomaton] = {}
        self._forms: dict[ScoreRules, ScoreForm] = {}
        self._edges: dict[ScoreRules, NumberEdges] = {}

    def automaton(self, rules: ScoreRules) -> ScoreAutomaton:
        """The automaton of these rules, made when it is first needed."""
        if rules not in self._automata:
            beyond = self._vocab_size - self.tokenizer.size  # ids that the tokenizer does not have
            token_bytes = [*self.tokenizer.token_bytes, *[b""] * beyond]
            special = set(self.tokenizer.special_ids)
            for tag in _TAGS:  # text, also where they are special tokens
                ids = self.tokenizer.encode_template(tag)
                if len(ids) == 1 and ids[0] in special:
                    special.remove(ids[0])
                    token_bytes[ids[0]] = tag.encode()
            self._automata[rules] = ScoreAutomaton(token_bytes, special, rules, self._device)
        return self._automata[rules]

    def form(self, rules: ScoreRules) -> ScoreForm:
        """The form of scores by these rules; ValueError for more scores than it is made for."""
        if rules not in self._forms:
            self._forms[rules] = ScoreForm(self.tokenizer, rules)
        return self._forms[rules]

    def edges(self, rules: ScoreRules) -> NumberEdges:
        """What expected scores are read along; ValueError for more scores than that is for."""
        if rules not in self._edges:
            self._edges[rules] = number_edges(self.tokenizer, rules, self._device)
        return self._edges[rules]

    def samples(
        self,
        orders: Sequence[tuple[int, ...]],
        shown: Sequence[tuple[int, ...]],
        judgements: Sequence[Generation],
    ) -> list[Sample]:
        """The samples of a row that has been judged so far. orders: of each sample; shown: the
        responses that each judgement was shown, as many parts of an order for every sample."""
        return [self._sample(*each) for each in self._whole(orders, shown, judgements)]

    def scores(
        self,
        orders: Sequence[tuple[int, ...]],
        shown: Sequence[tuple[int, ...]],
        judgements: Sequence[Generation],
    ) -> list[tuple[float, ...] | None]:
        """The scores of `samples` that count, by response, None where they are invalid: the
        expected ones where they are read."""
        whole = self._whole(orders, shown, judgements)
        return [in_row_order(_expected(parts) or _joined(parts), order) for order, parts in whole]

    def _whole(
        self,
        orders: Sequence[tuple[int, ...]],
        shown: Sequence[tuple[int, ...]],
        judgements: Sequence[Generation],
    ) -> Iterator[tuple[tuple[int, ...], list[Generation]]]:
        """The order of each sample all of whose judgements are there, and these, read."""
        parts = len(shown) // len(orders)
        read = [
            self._read(judgement, len(part))
            for judgement, part in zip(judgements, shown, strict=False)
        ]
        for i, order in enumerate(orders[: len(read) // parts]):
            yield order, read[i * parts : (i + 1) * parts]

    def _read(self, judgement: Generation, n: int) -> Generation:
        settings = self.settings
        if settings.format == "boxed":
            return judgement
        text, finished = self._text(judgement), judgement.finish == "eos"
        reason, scores = read_verdict(
            settings.format, text, n, settings.score_min, settings.score_max, finished
        )
        return replace(judgement, reason=reason, scores=scores or None)

    def _sample(self, order: tuple[int, ...], judgements: Sequence[Generation]) -> Sample:
        """A sample of one judgement, or of one for each part of the responses."""
        reasons = [each.reason for each in judgements if each.reason != Reason.VALID]
        finishes = {each.finish for each in judgements}
        return Sample(
            order=order,
            text="\n\n".join(self._text(each) for each in judgements),
            scores=in_row_order(_joined(judgements), order),
            expected=in_row_order(_expected(judgements), order),
            invalid=reasons[0].label if reasons else None,
            meta=None,
            tokens=sum(len(each.token_ids) for each in judgements),
            finish="length" if "length" in finishes else judgements[-1].finish,
            forced=any(each.forced for each in judgements),
            token_ids=[token for each in judgements for token in each.token_ids],
            logprobs=[value for each in judgements for value in each.logprobs],
            sampling_logprobs=[value for each in judgements for value in each.sampling_logprobs],
        )

    def _text(self, judgement: Generation) -> str:
        size = self.tokenizer.size
        return self.tokenizer.decode([t for t in judgement.token_ids if t < size])


def _joined(judgements: Sequence[Generation]) -> list[int] | None:
    """The scores of a sample's judgements, one after the other; None where one has none."""
    scores: list[int] = []
    for each in judgements:
        if each.scores is None:
            return None
        scores += each.scores
    return scores


def _expected(judgements: Sequence[Generation]) -> list[float] | None:
    """Their expected scores, likewise; None where one has none."""
    scores: list[float] = []
    for each in judgements:
        if each.expected_scores is None:
            return None
        scores += (score / UNIT for score in each.expected_scores)
    return scores
