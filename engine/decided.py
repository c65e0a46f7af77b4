"""When a row's vote is decided before all its samples are drawn: adaptive k.

Samples are drawn in rounds, each of whole cycles through the row's orders, so that no order has
more say than another. After a round the leader's chance of losing the vote of all k is estimated;
when it is small enough, the row needs no more samples.

n responses, v samples drawn, r still to come. x_i is what sample i adds to the leader's lead over
another response: the difference of their points (`kernels/vote.py`), which by default are their
scores; 0 where the sample is invalid, which has no vote.
The leader loses to that response when sum x_i over all v + r samples falls below 0. The x_i are
taken as draws of one normal distribution whose mean and variance are unknown, with a flat prior on
the mean and, so that a few equal votes do not look like certainty, one on the variance that counts
as PRIOR_SAMPLES further draws with a standard deviation of PRIOR_SD of the range of points:

    s^2 = (sum (x_i - mean)^2 + PRIOR_SAMPLES prior_sd^2) / dof,    dof = v - 1 + PRIOR_SAMPLES
    the lead after all samples ~ (v + r) mean + s sqrt(r + r^2 / v) t,    t Student's with dof

r is the variance of what is to come, r^2 / v that of its mean, known from v samples only. A lead of
exactly 0, a tie, is half a loss: that is what a density over integers means at 0. Chances of losing
to several responses are added up. A single response (n = 1) has no rival but the threshold of its
settings, and x_i is its score's distance from it.

All of this depends on the row's own samples only. Not done here: drawing, and the vote itself.
"""

import math
from collections.abc import Sequence

from engine.settings import JudgeSettings
from kernels.vote import Rule, points_of

ROUND = 3  # samples at least: the more often one asks, the more often one is wrong
PRIOR_SAMPLES = 2
PRIOR_SD = 0.2


def samples_to_draw(
    scores: Sequence[Sequence[float] | None],
    k: int,
    cycle: int,
    until_decided: float,
    settings: JudgeSettings,
    rule: Rule = "sum",
) -> int:
    """The size of a row's next round; 0 when it is decided, or has all its k samples.

    scores: of each sample drawn, one per response, in the responses' order; None where invalid.
    cycle: samples after which the orders begin again. until_decided: how sure to be, below 1. rule:
    what a sample counts for each response.
    """
    drawn = len(scores)
    if drawn == k:
        return 0
    votes = [points_of(each, rule) for each in scores if each is not None]
    if chance_of_upset(votes, drawn - len(votes), k - drawn, settings, rule) < 1 - until_decided:
        return 0
    return min(math.ceil(ROUND / cycle) * cycle, k - drawn)


def chance_of_upset(
    votes: Sequence[Sequence[float]],
    invalid: int,
    remaining: int,
    settings: JudgeSettings,
    rule: Rule = "sum",
) -> float:
    """The chance that the vote of all samples falls otherwise than that of the samples so far.

    votes: the points of the valid samples, one per response, in the responses' order. invalid: how
    many samples drawn have no vote. remaining: samples still to come, at least 1. Of tied leaders
    the first is taken: any has a chance of about a half or more. Without votes it is 1.
    """
    assert remaining > 0, "nothing is to come"
    if not votes:
        return 1.0
    totals = [sum(column) for column in zip(*votes, strict=True)]
    prior_sd = PRIOR_SD * _range(len(totals), settings, rule)
    if len(totals) == 1:
        leads = [[vote[0] - settings.threshold for vote in votes]]
        if sum(leads[0]) < 0:
            leads = [[-lead for lead in leads[0]]]
    else:
        best = totals.index(max(totals))
        others = [other for other in range(len(totals)) if other != best]
        leads = [[float(vote[best] - vote[other]) for vote in votes] for other in others]
    nothing = [0.0] * invalid
    return min(1.0, sum(_loss([*lead, *nothing], remaining, prior_sd) for lead in leads))


def _range(n: int, settings: JudgeSettings, rule: Rule) -> float:
    """The most that a vote can set two of n responses apart."""
    if rule == "borda" and n > 1:
        return n - 1
    if rule == "standardised" and n > 1:
        return math.sqrt(2 * n)
    return settings.score_max - settings.score_min


def _loss(added: Sequence[float], remaining: int, prior_sd: float) -> float:
    """The chance that sum `added`, at least 0, is below 0 after `remaining` more draws."""
    drawn = len(added)
    mean = sum(added) / drawn
    dof = drawn - 1 + PRIOR_SAMPLES
    squares = sum((each - mean) ** 2 for each in added) + PRIOR_SAMPLES * prior_sd**2
    scale = math.sqrt(squares / dof * (remaining + remaining**2 / drawn))
    return student_tail((drawn + remaining) * mean / scale, dof)


def student_tail(t: float, dof: int) -> float:
    """P(T > t) of Student's distribution, t >= 0: the finite series for whole degrees of freedom
    (Abramowitz and Stegun, 26.7.3 and 26.7.4). Its error is that of 1 - P: about 1e-16."""
    assert t >= 0 and dof > 0
    angle = math.atan2(t, math.sqrt(dof))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = dof % 2
    total, term = 0.0, cosine if odd else 1.0
    for power in range(1 + odd, dof, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    within = (angle + sine * total) * 2 / math.pi if odd else sine * total
    return max(0.0, (1 - within) / 2)
