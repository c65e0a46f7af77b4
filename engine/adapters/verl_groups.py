"""verl: a reward manager that judges the responses of a prompt together.

    reward.reward_manager.source=importlib
    reward.reward_manager.name=QuorumRewardManager
    reward.reward_manager.module.path=pkg://engine.adapters.verl_groups
    reward.num_workers=1
    +reward.reward_kwargs.quorum.url=http://host:8000
    +reward.reward_kwargs.quorum.no_verdict=5.5

verl gives each response to a reward worker that it draws, so one worker has to have them all; it
only waits for the judge. The `rollout.n` responses of a `uid` are one row. Groups that are not
whole are judged as they are once no response at all has come for `group_seconds`; so are those of a
validation with fewer responses to a prompt, which costs as long. Responses without a verdict all
get `no_verdict`, and so no advantage from it.
"""

from typing import Any

from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from engine.adapters.collector import GroupCollector
from engine.adapters.scorer import HttpScorer, Question, Shape, check_shape, number, rewards_of


class QuorumRewardManager(RewardManagerBase):
    """Judges groups; settings are under `reward.reward_kwargs.quorum`: url, no_verdict, options,
    reward (mean, rank or standardised), use_ground_truth, api_key, deadline_seconds and
    group_seconds (120)."""

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        """Raises ValueError for several workers, an unknown reward, or no url."""
        super().__init__(config, tokenizer, compute_score)
        settings = dict(config.reward.get("reward_kwargs", {}).get("quorum", {}))
        if config.reward.num_workers != 1:
            raise ValueError(
                f"reward.num_workers = {config.reward.num_workers}: a group is whole with 1 only"
            )
        if "url" not in settings:
            raise ValueError("reward.reward_kwargs.quorum has no url")
        self.reward: Shape = settings.get("reward", "mean")
        check_shape(self.reward)
        self.no_verdict: float | None = settings.get("no_verdict")
        self.use_ground_truth = bool(settings.get("use_ground_truth", False))
        scorer = HttpScorer(
            settings["url"],
            dict(settings.get("options", {})),
            settings.get("deadline_seconds"),
            settings.get("api_key"),
        )
        size = config.actor_rollout_ref.rollout.n
        self.collector = GroupCollector(scorer, size, settings.get("group_seconds", 120.0))

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The reward of one response, once its group has been judged."""
        item = data[-1:][0]  # of a trajectory of several sequences the last one counts
        responses = item.batch["responses"]
        length = int(item.batch["attention_mask"][-responses.shape[-1] :].sum())
        text = await self.loop.run_in_executor(
            None, lambda: self.tokenizer.decode(responses[:length], skip_special_tokens=True)
        )
        fields = item.non_tensor_batch
        truth = fields["reward_model"]["ground_truth"] if self.use_ground_truth else None
        reference = None if truth is None else str(truth)
        question = Question(list(fields["raw_prompt"]), [text], reference)
        scored, place = await self.collector.score(fields["uid"], question)
        found = rewards_of(scored.scores, self.reward)
        reward = None if found is None else found[place]
        share = scored.valid_share
        return {
            "reward_score": number(reward, self.no_verdict, scored.error),
            "reward_extra_info": {
                "valid_share": float("nan") if share is None else share,
                "no_verdict": float(reward is None),
            },
        }
