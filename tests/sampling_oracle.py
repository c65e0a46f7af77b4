"""The exact distribution of a sampled token, in plain Python."""

import math

from kernels.sample_token import SamplingOptions


def python_distribution(logits: list[float], options: SamplingOptions) -> tuple[list[float], float]:
    """Probabilities after all filters, token by token, and the smallest margin of a decision."""
    highest = max(logits)
    weights = [math.exp((logit - highest) / options.temperature) for logit in logits]
    ranking = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    ranking = ranking[: options.top_k or None]
    margin = 1.0
    if options.top_p < 1:
        total, kept, mass = math.fsum(weights[i] for i in ranking), [], 0.0
        for i in ranking:
            margin = min(margin, abs(mass / total - options.top_p))
            if mass >= options.top_p * total:
                break
            kept.append(i)
            mass += weights[i]
        ranking = kept
    if options.min_p:
        margin = min([margin, *(abs(weights[i] - options.min_p) for i in ranking[1:])])
        ranking = [i for i in ranking if weights[i] >= options.min_p]
    total = math.fsum(weights[i] for i in ranking)
    probabilities = [0.0] * len(logits)
    for i in ranking:
        probabilities[i] = weights[i] / total
    return probabilities, margin
