"""What `bench.decode` and its peers sample, and what a round of it took."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Workload:
    """k samples of `new_tokens` after `prefix` tokens, shared over a tree of `levels`."""

    prefix: int
    k: int
    new_tokens: int
    levels: int = 1
    sharing: bool = True

    def __post_init__(self) -> None:
        for name in ("prefix", "k", "new_tokens", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} is less than 1")
        if self.levels > self.prefix:
            raise ValueError(f"levels = {self.levels} is more than prefix = {self.prefix}")

    def prompts(self, vocab_size: int, seed: int) -> list[list[tuple[int, ...]]]:
        """Each sample's prompt as segments; equal segments are equal tuples."""
        if not self.sharing:
            table = self._tokens(vocab_size, seed, self.k)
            return [[tuple(row)] for row in table]
        samples: list[list[tuple[int, ...]]] = [[] for _ in range(self.k)]
        # The node of each sample at every level, from the last one up: a node has one parent.
        at, below = list(range(self.k)), self.k
        above: list[list[int]] = []
        for level in reversed(range(self.levels)):
            nodes = self.num_nodes(level)
            at, below = [node * nodes // below for node in at], nodes
            above.insert(0, at)
        for level in range(self.levels):
            first = self.prefix * level // self.levels
            last = self.prefix * (level + 1) // self.levels
            nodes = self.num_nodes(level)
            table = self._tokens(vocab_size, seed * self.levels + level, nodes)
            segments = [tuple(row[first:last]) for row in table]
            for sample, node in zip(samples, above[level], strict=True):
                sample.append(segments[node])
        return samples

    def num_nodes(self, level: int) -> int:
        """Segments side by side at a level."""
        return self.k if not self.sharing else round(self.k ** (level / self.levels))

    def prefix_lengths(self) -> list[tuple[int, int, int]]:
        """(segments, first position, tokens of each) of every level."""
        if not self.sharing:
            return [(self.k, 0, self.prefix)]
        edges = [self.prefix * i // self.levels for i in range(self.levels + 1)]
        return [(self.num_nodes(i), edges[i], edges[i + 1] - edges[i]) for i in range(self.levels)]

    @property
    def distinct_tokens(self) -> int:
        """Prompt tokens that have to be computed."""
        return sum(nodes * tokens for nodes, _, tokens in self.prefix_lengths())

    def _tokens(self, vocab_size: int, seed: int, rows: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        table = torch.randint(vocab_size, (rows, self.prefix), generator=generator)
        return table.tolist()


@dataclass(frozen=True)
class Round:
    """What one round took, in seconds; decode_tokens are those after each sample's first."""

    total: float
    prefill: float | None  # None: not told apart
    decode: float | None
    decode_tokens: int
