"""Meta scores of three samples, how many may vote, and who does."""

import math

META_CASES = [
    ([math.nan, 0.0, 1.0], 1, [False, False, True]),
    ([math.nan, math.nan, math.nan], 2, [False, False, False]),
    ([0.5, 0.5, 0.5], 2, [True, True, False]),
    ([0.1, 0.2, 0.3], 9, [True, True, True]),
    ([-math.inf, math.nan, -math.inf], 3, [True, False, True]),
    ([math.nan, -math.inf, math.inf], 2, [False, True, True]),
    ([-0.0, 0.0, -1.0], 1, [True, False, False]),
]
