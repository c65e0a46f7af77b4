r"""Scores that a sample is made to write: the anchor line, then n scores in a box.

A sample that ended without valid scores goes on with text that is not drawn (`ScoreForm.opening`)
and completes the box under a mask: of the tokens that lead to a score in range, or end one, it
draws by the model's own logits. Where only one token can follow, nothing is drawn. Numbers and what
stands between them are tokenized apart, so the form is a tree of tokens for one number, walked n
times. The engine runs the model; see `engine/generate.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.thinking import open_thinking
from kernels.score_grammar import BEGINS, CONTINUES, NEGATIVE, ScoreRules
from models.tokenizer import Tokenizer

MOST_SCORES = 1000  # different ones


@dataclass
class _Node:
    """A place in the tokens of a number: what they spell, and `score` where that is one."""

    text: str = ""
    children: "dict[int, _Node]" = field(default_factory=dict)
    score: int | None = None


class ScoreForm:
    """The form of one judge's scores, in its tokens."""

    def __init__(self, tokenizer: Tokenizer, rules: ScoreRules) -> None:
        """ValueError for more scores than a form is made for."""
        scores = range(rules.score_min, rules.score_max + 1)
        if len(scores) > MOST_SCORES:
            raise ValueError(
                f"scores from {rules.score_min} to {rules.score_max} cannot be forced: "
                f"{len(scores)} of them, at most {MOST_SCORES}"
            )
        self._tokenizer, self._rules = tokenizer, rules
        self.between = tuple(tokenizer.encode_text(", "))
        self.close = tuple(tokenizer.encode_text("}"))
        self.root = _Node()
        longest = 0
        for score in scores:
            node, tokens = self.root, tokenizer.encode_text(str(score))
            longest = max(longest, len(tokens))
            for token in tokens:
                text = node.text + tokenizer.token_bytes[token].decode("ascii", "replace").strip()
                node = node.children.setdefault(token, _Node(text))
            node.score = score
        self._longest = longest + max(len(self.between), len(self.close))
        self._longest_opening = len(self.opening([], b"<think>", "0" * 9 if rules.nonce else None))

    def opening(
        self, token_ids: Sequence[int], begun: bytes = b"", nonce: str | None = None
    ) -> tuple[int, ...]:
        """The tokens that stand between a sample's text and its first score; they end thinking that
        the text has begun, or its prompt (begun: as `Group.opening`)."""
        size = self._tokenizer.size
        text = self._tokenizer.decode([t for t in token_ids if t < size])
        thinks = open_thinking(begun.decode(errors="replace") + text) is not None
        end = "\n</think>" if thinks else ""
        line = "" if self._rules.anchor is None else f"{self._rules.anchor_line(nonce)} "
        return tuple(self._tokenizer.encode_template(f"{end}\n\n{line}\\boxed{{"))

    def most_tokens(self, n: int) -> int:
        """The most tokens that a form of n scores has, opening included."""
        return self._longest_opening + n * self._longest


class ForcedScores:
    """A form that is being filled in: `scores` so far, of n."""

    def __init__(self, form: ScoreForm, n: int) -> None:
        self._form, self._n = form, n
        self._node = form.root
        self.scores: list[int] = []

    @property
    def is_full(self) -> bool:
        """Whether all n scores are there."""
        return len(self.scores) == self._n

    @property
    def place(self) -> tuple[int, int]:
        """Where in a number it is (`kernels/score_grammar.py`), and the number so far."""
        text = self._node.text
        if text in ("", "-"):
            return (NEGATIVE if text else BEGINS), 0
        return CONTINUES, int(text)

    def choices(self) -> list[int]:
        """The tokens that may follow, at least one; in ascending order."""
        ends = [] if self._node.score is None else [self._separator[0]]
        return sorted([*self._node.children, *ends])

    def take(self, token: int) -> list[int]:
        """Fill in one of the choices. Returns it, with all that must follow it."""
        if token in self._node.children:
            self._node = self._node.children[token]
            taken = [token]
            if not self._node.children:
                taken += self._end_number()
        else:
            taken = self._end_number()
        while not self.is_full and len(choices := self.choices()) == 1:
            taken += self.take(choices[0])
        return taken

    @property
    def _separator(self) -> Sequence[int]:
        is_last = len(self.scores) == self._n - 1
        return self._form.close if is_last else self._form.between

    def _end_number(self) -> list[int]:
        assert self._node.score is not None, "a number ends before it is one"
        separator = [*self._separator]
        self.scores.append(self._node.score)
        self._node = self._form.root
        return separator
