"""OpenRLHF: this file is what `--reward.remote_url` names.

    export QUORUM_URL=http://host:8000 QUORUM_NO_VERDICT=5.5       # or QUORUM_MODEL=DIR
    ... --reward.remote_url .../engine/adapters/openrlhf.py --data.label_key judged

OpenRLHF calls `reward_func` in threads, with one response each: it is judged by itself. The prompt
that it hands over is rendered, with control tokens in it, which is nothing to show to a judge. So
the label of a row says what was asked: the prompt itself, or a JSON object with `prompt` (text or
messages), and `reference` and `principles` if there are any. `make_reward_func` takes another way
to find it, for a file of your own. A response without a verdict is an error unless
QUORUM_NO_VERDICT says what its reward is.
"""

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.adapters.scorer import Question, Scorer, groups_of, key_of, number
from engine.adapters.scorer import scorer_of_environment as _scorer

# What ends a turn in the families that are supported, and is no part of a response.
ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<eos>",
        "</s>", "<\uff5cend\u2581of\u2581sentence\uff5c>")  # fmt: skip


def asked_in_label(prompt: str, label: str) -> Mapping[str, Any]:
    """The prompt, reference and principles that a label holds. Raises ValueError where it is
    empty."""
    if not label:
        raise ValueError("the label is empty; it has to hold the prompt that the judge is shown")
    if label.lstrip().startswith("{"):
        fields = json.loads(label)
        if "prompt" not in fields:
            raise ValueError(f"the label {label[:100]!r} has no prompt")
        return {name: fields.get(name) for name in ("prompt", "reference", "principles")}
    return {"prompt": label}


def response_of(query: str, prompt: str, ends: Sequence[str] = ENDS) -> str:
    """What follows the prompt in a query, without the control tokens that end it. Raises ValueError
    where the query does not begin with the prompt."""
    if not query.startswith(prompt):
        raise ValueError(f"the query {query[:100]!r} does not begin with its prompt")
    response = query[len(prompt) :]
    while end := next((end for end in ends if response.endswith(end)), None):
        response = response.removesuffix(end)
    return response


def make_reward_func(
    scorer: Scorer,
    *,
    asked: Callable[[str, str], Mapping[str, Any]] = asked_in_label,
    score_range: tuple[float, float] = (1, 10),
    no_verdict: float | None = None,
) -> Callable[..., dict[str, Any]]:
    """A `reward_func` for OpenRLHF, to be called from any thread.

    asked: from a rendered prompt and a label to prompt, reference and principles. score_range: the
    lowest and the highest score of the judge, which are 0 and 1 as OpenRLHF's `scores`.
    no_verdict: the reward of a response without a verdict, which is a NoVerdict error otherwise.
    """
    low, high = score_range
    if not low < high:
        raise ValueError(f"score_range = {score_range} has no width")

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str], **_: Any
    ) -> dict[str, Any]:
        import torch

        texts = list(map(response_of, queries, prompts))
        given = list(map(asked, prompts, labels))
        groups = groups_of([key_of(each) for each in given])
        questions = [
            Question(responses=[texts[place] for place in group], **given[group[0]])
            for group in groups
        ]
        rewards, shares, lost = torch.full((3, len(texts)), float("nan"))
        for group, scored in zip(groups, scorer.score(questions), strict=True):
            for index, place in enumerate(group):
                mean = None if scored.scores is None else scored.scores[index]
                rewards[place] = number(mean, no_verdict, scored.error)
                share = scored.valid_share
                shares[place] = float("nan") if share is None else share
                lost[place] = mean is None
        return {
            "rewards": rewards,
            "scores": (rewards - low) / (high - low),
            "extra_logs": {"quorum_valid_share": shares, "quorum_no_verdict": lost},
        }

    return reward_func


_lock = threading.Lock()
_made: list[Callable[..., dict[str, Any]]] = []


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str], **_: Any
) -> dict[str, Any]:
    """The reward of each response, by the judge that the environment names."""
    with _lock:  # the first call may load a model
        if not _made:
            given = os.environ.get("QUORUM_NO_VERDICT")
            no_verdict = None if given is None else float(given)
            _made.append(make_reward_func(_scorer(), no_verdict=no_verdict))
    return _made[0](queries, prompts, labels)
