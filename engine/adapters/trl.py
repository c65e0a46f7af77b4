"""TRL: a reward function for GRPOTrainer, RLOOTrainer and OnlineDPOTrainer.

    from engine.adapters.trl import QuorumReward
    reward = QuorumReward(Judge.load(DIR), num_generations=8, k=8)     # or "http://host:8000"
    GRPOTrainer(model, reward_funcs=reward, ...)

TRL hands over all completions of a process's step at once; those of one prompt stand together, and
are judged together, as one row. A completion without a verdict gets None: TRL leaves it out of its
group's mean and gives it no advantage. So that no group is split, the completions of a process
(`per_device_train_batch_size` times `steps_per_generation`) have to be a multiple of
`num_generations`; of a group that is split, each part is judged by itself.
"""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.adapters.scorer import (
    Question,
    Scored,
    Shape,
    check_shape,
    groups_of,
    key_of,
    rewards_of,
    scorer_of,
)

if TYPE_CHECKING:
    from engine.session import RowJudge

Completion = str | Sequence[Mapping[str, str]]
Rewards = list[float | None]


class QuorumReward:
    """Rewards of completions by a judge's verdicts; TRL logs them under its `__name__`."""

    def __init__(
        self,
        judge: "RowJudge | str",
        *,
        name: str = "quorum",
        num_generations: int | None = None,
        reward: Shape = "mean",
        reference: str | None = None,
        principles: str | None = None,
        api_key: str | None = None,
        deadline_seconds: float | None = None,
        **options: Any,
    ) -> None:
        """judge: one in this process, or the address of one that is served. num_generations: the
        trainer's; without it, or where the completions are no runs of so many of one prompt, equal
        prompts are one group. reward: mean scores, or of a group ranks (0 to 1) or standardised
        scores. reference, principles: columns of the dataset that hold them. deadline_seconds: for
        each group. options: those of `Judge.rows`. Raises ValueError for values out of range."""
        check_shape(reward)
        if num_generations is not None and num_generations < 1:
            raise ValueError(f"num_generations = {num_generations} is less than 1")
        self.__name__ = name
        self.scorer = scorer_of(judge, options, deadline_seconds=deadline_seconds, api_key=api_key)
        self.num_generations = num_generations
        self.reward: Shape = reward
        self.columns = {"reference": reference, "principles": principles}

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any
    ) -> Rewards:
        """The reward of each completion, None where there is no verdict."""
        groups, questions = self._questions(prompts, completions, columns)
        return self._rewards(groups, self.scorer.score(questions), len(prompts), columns)

    def as_async(self) -> Callable[..., Coroutine[Any, Any, Rewards]]:
        """The same as a coroutine function, which TRL runs beside other rewards."""

        async def reward_func(
            prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any
        ) -> Rewards:
            groups, questions = self._questions(prompts, completions, columns)
            scored = await self.scorer.score_async(questions)
            return self._rewards(groups, scored, len(prompts), columns)

        reward_func.__name__ = self.__name__
        return reward_func

    def _questions(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        columns: Mapping[str, Any],
    ) -> tuple[list[list[int]], list[Question]]:
        given: dict[str, Sequence[str | None]] = {}
        for name, column in self.columns.items():
            if column is not None and column not in columns:
                raise ValueError(f"{name} = {column!r} is no column of the dataset")
            given[name] = [None] * len(prompts) if column is None else columns[column]
        texts = [_text(completion) for completion in completions]
        keys = [key_of(each) for each in zip(prompts, *given.values(), strict=True)]
        groups = groups_of(keys, self.num_generations)
        questions = [
            Question(
                prompts[group[0]],
                [texts[place] for place in group],
                given["reference"][group[0]],
                given["principles"][group[0]],
            )
            for group in groups
        ]
        return groups, questions

    def _rewards(
        self,
        groups: Sequence[Sequence[int]],
        scored: Sequence[Scored],
        count: int,
        columns: Mapping[str, Any],
    ) -> Rewards:
        rewards: Rewards = [None] * count
        shares: Rewards = [None] * count
        for group, each in zip(groups, scored, strict=True):
            found = rewards_of(each.scores, self.reward)
            for index, place in enumerate(group):
                shares[place] = each.valid_share
                rewards[place] = None if found is None else found[index]
        if "log_extra" in columns:
            columns["log_extra"](f"{self.__name__}/valid_share", shares)
        if "log_metric" in columns:
            log = columns["log_metric"]
            drawn = sum(each.drawn for each in scored)
            valid = sum(each.valid for each in scored)
            # Logged in every call, as TRL needs it of all its processes.
            log(f"{self.__name__}/valid_share", valid / drawn if drawn else float("nan"))
            log(f"{self.__name__}/no_verdict", rewards.count(None) / count if count else 0.0)
        return rewards


def _text(completion: Completion) -> str:
    """Raises ValueError for a completion that is neither text nor a single message."""
    if isinstance(completion, str):
        return completion
    if len(completion) != 1:
        raise ValueError(
            f"a completion of {len(completion)} messages; one of the assistant is judged"
        )
    return completion[0]["content"]
