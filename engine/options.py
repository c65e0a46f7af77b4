"""How rows are judged: the options that decide what a verdict says.

`JudgeOptions` are for the Python API, the command line and the key of a line, `PromptOptions` for
all command lines. Needs no torch, so that a command line can print its help without it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.templates import DATE, parse_variables

MAX_SHOWN = 20  # responses that one judgement is shown
MAX_K = 1 << 14  # every sample of a row has a prompt before any is drawn


def meaningless(name: str, value: object) -> ValueError:
    """The refusal of an option by a model that has no use for it."""
    return ValueError(f"{name} = {value} has no meaning for a model whose head gives the scores")


@dataclass(frozen=True)
class JudgeOptions:
    """The options of `Judge.rows`; raises ValueError for values out of range.

    What `kernels.sample_token` checks (temperature, top_p, top_k, min_p, seed) is checked there.
    """

    k: int = 8
    """Judgements per row."""
    temperature: float = 0.5
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 is all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest."""
    max_new_tokens: int = 1024
    """Longest judgement, in tokens."""
    orders: Literal["rotate", "random", "fixed"] = "rotate"
    """In which orders samples see the responses: rotations, free shuffles, or the given one."""
    max_orders: int | None = None
    """Most rotations of a row; none is min(n, k)."""
    max_shown: int = MAX_SHOWN
    """Most responses that a judgement is shown; a row of more is judged in parts of a like size,
    and scores from all of them are compared. 1 rates every response by itself."""
    seed: int = 0
    """Seed of all draws."""
    deterministic: bool = False
    """Bit-equal results in any company on a GPU too (slower; on CPU float32 always is)."""
    attention: Literal["auto", "triton", "torch", "flash-attn", "xformers"] = "auto"
    """What computes the attention of prompts: the engine's own kernels (auto), or a backend."""
    stop: Literal["box", "eos"] | None = None
    """End a sample with its first box, which then decides (box), or when it ends itself, where the
    last box does (eos); none is what the model directory's judge.json says, or eos."""
    force_scores: bool = False
    """Make a sample that has ended without valid scores write them, by the model's own choice."""
    score: Literal["drawn", "expected"] = "drawn"
    """What a judgement's scores are: those that it drew, or the means of the distributions that it
    drew them from (expected)."""
    vote: Literal["sum", "standardised", "borda"] = "sum"
    """What a judgement counts for each response: its score, its score in standard deviations from
    the judgement's mean, or how many responses it scores lower."""
    meta_vote: Literal["filter", "weight"] | None = None
    """With a meta model: only the k_meta votes that it scores highest (filter, the default), or all
    of them, those that it scores higher with more weight (weight)."""
    k_meta: int | None = None
    """How many votes a meta model lets through, those it scores highest (half of k)."""
    until_decided: float | None = None
    """Draw samples in rounds, until the vote of all k is known with this probability."""

    def __post_init__(self) -> None:
        for name in ("k", "max_new_tokens", "max_orders", "k_meta", "max_shown"):
            value = getattr(self, name)
            if name in ("max_orders", "k_meta") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r} is not an integer of at least 1")
        if self.k > MAX_K:
            raise ValueError(f"k = {self.k} is more than {MAX_K}")
        if self.max_shown > MAX_SHOWN:
            raise ValueError(f"max_shown = {self.max_shown} is more than {MAX_SHOWN}")
        if self.k_meta is not None and self.k_meta > self.k:
            raise ValueError(f"k_meta = {self.k_meta} is more than k = {self.k}")
        if self.orders not in ("rotate", "random", "fixed"):
            raise ValueError(f"orders = {self.orders!r} is not rotate, random or fixed")
        if self.max_orders is not None and self.orders != "rotate":
            raise ValueError(f"max_orders has no meaning with orders = {self.orders!r}")
        if self.attention not in ("auto", "triton", "torch", "flash-attn", "xformers"):
            raise ValueError(
                f"attention = {self.attention!r} is not auto, triton, torch, flash-attn or xformers"
            )
        if self.deterministic and self.attention != "auto":
            raise ValueError(f"deterministic needs attention = 'auto', not {self.attention!r}")
        if self.score not in ("drawn", "expected"):
            raise ValueError(f"score = {self.score!r} is not drawn or expected")
        if self.vote not in ("sum", "standardised", "borda"):
            raise ValueError(f"vote = {self.vote!r} is not sum, standardised or borda")
        if self.meta_vote not in ("filter", "weight", None):
            raise ValueError(f"meta_vote = {self.meta_vote!r} is not filter or weight")
        if self.meta_vote == "weight" and self.k_meta is not None:
            raise ValueError(f"k_meta = {self.k_meta} has no meaning where all votes are weighed")
        if self.stop not in ("box", "eos", None):
            raise ValueError(f"stop = {self.stop!r} is not box or eos")
        sure = self.until_decided
        if sure is not None and not (isinstance(sure, float) and 0 < sure < 1):
            raise ValueError(f"until_decided = {sure!r} is not a number between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Prompts, and the scores that are read, where they are not to be as the model's directory has
    them."""

    template: Path | None = None
    """Judge template in place of the model's own: a file, or one of ours: default, grm, pairwise
    (for that format), or direct, which asks for scores at once."""
    chat_template: Path | None = None
    """Chat template in place of the model's own."""
    chat_template_kwargs: str | None = None
    """Variables for the chat template, a JSON object such as {"enable_thinking": false}."""
    date: str = DATE
    """What templates take for today, as YYYY-MM-DD."""
    anchor: str | None = None
    """What begins the line of scores, in place of what judge.json says; "" for none: then the last
    box of the text decides."""
    score_min: int | None = None
    """Lowest score, in place of what judge.json says."""
    score_max: int | None = None
    """Highest score, in place of what judge.json says."""
    threshold: float | None = None
    """What a single response's mean score must pass to be right."""
    format: Literal["boxed", "pairwise", "answer-tags", "json", "rating"] | None = None
    """How the judge writes its scores: in a box, or as RM-R1 and Skywork-Critic (pairwise),
    JudgeLRM (answer-tags), RewardAnything (json) or Prometheus (rating) do."""

    @property
    def variables(self) -> dict[str, Any] | None:
        """Those for the chat template. Raises ValueError where they are no JSON object."""
        given = self.chat_template_kwargs
        return None if given is None else parse_variables(given)

    @property
    def settings(self) -> dict[str, Any]:
        """What is said in place of judge.json."""
        names = ("score_min", "score_max", "threshold", "anchor", "format")
        given = {name: getattr(self, name) for name in names}
        changes = {name: value for name, value in given.items() if value is not None}
        if self.format not in (None, "boxed"):
            changes["stop"] = "eos"  # there is no box to stop at
        return changes | {"anchor": None} if self.anchor == "" else changes

    def for_load(self, **settings: Any) -> dict[str, Any]:
        """The arguments of `Judge.load` that they are, with other settings beside those here."""
        return {
            "template": self.template,
            "chat_template": self.chat_template,
            "chat_template_kwargs": self.variables,
            "date": self.date,
            "settings": self.settings | settings,
        }
