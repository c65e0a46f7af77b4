"""Drawing tokens in plain Python: Philox's words, and the exact distribution of a token."""

import math

from kernels.sample_token import SamplingOptions


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Philox4x32-10: four words of 32 bits."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for number in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        r0, r1 = (k0 + number * 0x9E3779B9) % 2**32, (k1 + number * 0xBB67AE85) % 2**32
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ r0, b % 2**32, (a >> 32) ^ c3 ^ r1, a % 2**32
    return c0, c1, c2, c3


def uniform(key: tuple[int, int], index: int, position: int) -> float:
    """The uniform of a sample's index and a position, exact: it has 24 significant bits."""
    counter = index % 2**32, index >> 32, position % 2**32, position >> 32
    return ((philox(key, counter)[0] >> 9) + 0.5) / 2**23


def distribution(logits: list[float], options: SamplingOptions) -> tuple[list[float], float]:
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
