"""The loop of every training: steps, evaluations, lines, checkpoints, and the model at the end."""

from abc import ABC, abstractmethod
from collections import Counter
from typing import Any, ClassVar, Generic

from train.learner import Learner, M
from train.run import Clock, Run, RunArgs
from train.sources import tell_left_out


class Trainer(ABC, Generic[M]):
    """A model under training, and what a step of it does. A subclass sets `learner`."""

    shown: ClassVar[tuple[str, ...]] = ("loss",)  # the metrics that a person is told
    score: ClassVar[str] = "dev_vote"  # the metric of an evaluation that tells the best model
    always_last: ClassVar[bool] = False  # evaluate after the last step, whatever the settings say
    learner: Learner[M]

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()  # lines of the data, by reason
        self.judge_settings: dict[str, Any] = {}  # for the judge.json of models that are written

    @abstractmethod
    def step(self, number: int) -> tuple[dict[str, float], dict[str, float]]:
        """One step: its metrics; and seconds of its phases, with what else varies from run to run.

        Raises FloatingPointError naming step and rows where loss or gradients are not finite, and
        ValueError where the step has nothing to learn from.
        """

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics of the model as it is, on the rows of evaluations."""


def loop(args: RunArgs, trainer: Trainer[M]) -> None:
    """Train to the last step, resuming where a checkpoint stands; writes the model to args.out.

    Raises ValueError for a directory or settings that are not this run's, Stopped after a signal,
    and as `Trainer.step` does.
    """
    evaluation, steps = args.evaluation, args.learning.steps
    tell_left_out(trainer.left_out)
    last: dict[str, float] = {}

    with Run(args, trainer.learner) as run:

        def record(step: int, metrics: dict[str, float], timings: dict[str, float]) -> None:
            nonlocal last
            score = None
            if evaluation.is_due(step, steps) or (trainer.always_last and step == steps):
                clock = Clock()
                last = trainer.evaluate()
                clock.lap("evaluate")
                metrics, timings = metrics | last, timings | clock.seconds
                score = last[trainer.score]
                run.judge_settings = trainer.judge_settings
            run.record(step, metrics, timings, shown=trainer.shown, score=score)

        run.judge_settings |= trainer.judge_settings
        for step in run.steps():
            if step == 0 and evaluation.eval_every:
                record(0, {}, {})
            metrics, timings = trainer.step(step)
            record(step + 1, metrics, timings)
        run.finish(**last, left_out=trainer.left_out.total())
