"""The steps of `bench.gpu` on a GPU that is not there, with small work: `python -m tests.gpu_run
DIR`. Writes DIR/figures.jsonl as a real run does, and prints one JSON line of what was launched and
where the host has waited."""

import json
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests import fake_cuda

fake_cuda.install()

import torch  # noqa: E402

from bench import ceilings  # noqa: E402
from bench.case import NotLikeReference, OpCase  # noqa: E402
from bench.decode_load import Workload  # noqa: E402
from bench.forests import Heads, Tree  # noqa: E402
from bench.gpu_steps import STEPS, Run, Work, perform  # noqa: E402
from bench.loss_peers import Head  # noqa: E402
from bench.ops import OPERATIONS, accept_token  # noqa: E402
from bench.ops import forest_attention as attention  # noqa: E402
from bench.ops.linear_logprob import log_probs, loss  # noqa: E402
from bench.shapes import SHAPES, Shape  # noqa: E402
from bench.timing import DEVICE  # noqa: E402
from engine.decode import Decoder, StatusPoll  # noqa: E402
from kernels.launch import launch  # noqa: E402

SHAPE = replace(
    SHAPES["qwen3-8b"], vocab_size=300, hidden_size=64, intermediate_size=96, num_layers=2,
    num_heads=4, num_kv_heads=2, head_dim=16,
)  # fmt: skip
CAPPED = replace(
    SHAPES["gemma2-27b"], vocab_size=300, hidden_size=64, intermediate_size=96, num_layers=2,
    num_heads=4, num_kv_heads=2, head_dim=16, window=20,
)  # fmt: skip
LATENT = replace(SHAPES["v2-lite-small"], vocab_size=300, num_layers=2, dtype=torch.bfloat16)
HEADS = Heads.of(SHAPE)


class _Poll(StatusPoll):
    """No kernel counts tokens: what the host has counted is what there is."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder.live)
        self.leaves = [(leaf.count, leaf.count == leaf.limit) for leaf in decoder.leaves]

    def read(self) -> tuple[list[int], list[bool]]:
        super().read()
        counts, finished = zip(*self.leaves, strict=True)
        return list(counts), list(finished)


def any_result(case: OpCase) -> OpCase:
    """A case whose check runs as it is, and finds no fault: no kernel has run."""

    def check(arguments: Any, out: Any, factor: float) -> None:
        with suppress(NotLikeReference):
            case.check(arguments, out, factor)

    return replace(case, check=check)


def of_each_operation(shape: Shape) -> list[OpCase]:
    """A case of each, with a prompt shorter than that of `variants`."""
    others = {name: each for name, each in OPERATIONS.items() if name != "forest_attention"}
    tree = Tree((1, 4), (300, 20))
    return [
        attention.decode(tree, Heads.of(shape, shape.window)),
        *(next(iter(each.variants(shape, 16))) for each in others.values()),
    ]


def small_work() -> Work:
    """Of every kind that there is in the real work, something small."""
    figures = {
        "attention": [
            attention.decode(tree, HEADS)
            for tree in (
                Tree((1, 4), (300, 20)),
                Tree((1, 2, 4), (40, 30, 9)),
                Tree((1, 8), (64, 0)),
            )
        ],
        "losses": [case(shape, 32) for case in (log_probs, loss) for shape in (SHAPE, CAPPED)],
        "others": [
            attention.prefill(Tree((1,), (70,)), HEADS),
            attention.decode(Tree((1, 4), (70, 20)), Heads.of(LATENT)),
            attention.backward(Tree((1,), (70,)), HEADS),
            attention.packed(Tree((1, 3), (50, 20)), HEADS),
            accept_token.step(SHAPE, 8),
        ],
        "grid": of_each_operation(CAPPED),
    }
    return Work(
        smoke=[any_result(case) for case in of_each_operation(SHAPE)],
        model=SHAPE,
        figures={step: [any_result(case) for case in cases] for step, cases in figures.items()},
        decodes={
            "decode": (SHAPE, [Workload(40, 4, 18), Workload(300, 18, 9)]),
            "unshared": (SHAPE, [Workload(100, 12, 9, sharing=False)]),
            "gemma": (CAPPED, [Workload(40, 4, 9, levels=2)]),
            "deepseek": (LATENT, [Workload(40, 4, 9)]),
        },
        memory={"small": Head(32, 16, 64, None, torch.bfloat16)},
        tests=["--co", "-q", "tests/test_launch.py"],
    )


def refusals() -> list[str]:
    """What the device that is not there refuses, as a real one would."""
    there, here = torch.ones(2, device=DEVICE), torch.ones(2)
    found = []
    for wrong in (lambda: there + here, lambda: launch(main, (1,), there, here)):
        try:
            wrong()
        except AssertionError as error:
            found.append(str(error))
    return found


def main(out: Path) -> None:
    """All steps but those whose work is done in other processes."""
    ceilings._BYTES, ceilings._SIZE, ceilings._REPEATS = 1 << 10, 16, 2
    Decoder.poll = lambda self: _Poll(self)  # type: ignore[method-assign]
    work = small_work()
    with fake_cuda.used():
        refused = refusals()
        for step in STEPS:
            if step not in ("compile", "memory", "tests"):
                perform(Run(step, out / "figures.jsonl", time.monotonic() + 60, work))
    said = {"launched": fake_cuda.launched, "reads": fake_cuda.reads, "refused": refused}
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
