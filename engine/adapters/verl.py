"""verl: `compute_score`, one response at a time, by a judge that is served.

    reward.custom_reward_function.path=pkg://engine.adapters.verl
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.url=http://host:8000
    +reward.custom_reward_function.reward_kwargs.no_verdict=5.5

verl asks about each response by itself, as soon as it is generated, so each is judged as a row of
one. `engine/adapters/verl_groups.py` judges whole groups. verl does not hand over the prompt: the
data set must have it in `extra_info`, under `question` or whatever `prompt_key` says.
"""

from collections.abc import Mapping
from typing import Any

from engine.adapters.scorer import HttpScorer, Question, number


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any],
    *,
    url: str,
    no_verdict: float | None = None,
    options: Mapping[str, Any] | None = None,
    prompt_key: str = "question",
    use_ground_truth: bool = False,
    api_key: str | None = None,
    deadline_seconds: float | None = None,
    **_: Any,
) -> dict[str, float]:
    """The mean score of a response as `score`, the share of valid samples, and whether there was no
    verdict (1 or 0).

    no_verdict: the score of a response without a verdict; verl knows no missing score, and without
    this it is a NoVerdict error, which ends the training. options: those of `Judge.rows`.
    use_ground_truth: show the ground truth to the judge as the row's reference. Raises ValueError
    where extra_info has no prompt."""
    if prompt_key not in extra_info:
        known = ", ".join(map(str, extra_info))
        raise ValueError(f"prompt_key = {prompt_key!r} is not in extra_info, which has {known}")
    scorer = HttpScorer(url, dict(options or {}), deadline_seconds, api_key)
    reference = str(ground_truth) if use_ground_truth else None
    question = Question(extra_info[prompt_key], [solution_str], reference)
    (scored,) = await scorer.score_async([question])
    mean = None if scored.scores is None else scored.scores[0]
    share = scored.valid_share
    return {
        "score": number(mean, no_verdict, scored.error),
        "valid_share": float("nan") if share is None else share,
        "no_verdict": float(mean is None),
    }
