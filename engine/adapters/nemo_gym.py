"""NeMo-Gym: the answer to `POST /compare`, for a resources server in the place of `genrm_compare`.

    scorer = HttpScorer("http://host:8000", {"k": 8})
    async def compare(self, body):
        return GenRMCompareResponse(**await answer(scorer, body.model_dump()))

All responses are compared at once, not in pairs, so `comparison_results` is null. The judge reads
the texts of a response's messages, not its reasoning; an empty one is judged as empty text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.adapters.scorer import Question, Scorer, Shape, number, rewards_of


async def answer(
    scorer: Scorer,
    body: Mapping[str, Any],
    *,
    reward: Shape = "mean",
    no_verdict: float | None = None,
) -> dict[str, Any]:
    """Rewards of `response_objs`, in their order, and metrics.

    no_verdict: the reward of all of them where there is no verdict, which is a NoVerdict error
    otherwise."""
    responses = [text_of(each) for each in body["response_objs"]]
    question = Question(body["conversation_history"], responses, principles=body.get("principle"))
    (scored,) = await scorer.score_async([question])
    found = rewards_of(scored.scores, reward)
    rewards: Sequence[float | None] = [None] * len(responses) if found is None else found
    metrics = {"no_verdict": float(scored.scores is None)}
    if scored.valid_share is not None:
        metrics["valid_share"] = scored.valid_share
    return {
        "rewards": [number(each, no_verdict, scored.error) for each in rewards],
        "comparison_results": None,
        "metrics": metrics,
    }


def text_of(response: Mapping[str, Any]) -> str:
    """The text of a response's messages, without its reasoning."""
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
        if part["type"] == "output_text"
    )
