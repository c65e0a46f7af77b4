"""A step of GRPO on packed trees, beside the same step without sharing and with whole logits.

    python -m bench.train_step [--shape qwen3-107m] [--prefix 1024] [--completion 256] [--group 4]
                               [--rows 1] [--repeats 3] [--peers NAME ...]

`packed` computes each prompt once for its group, forward and backward, and makes no logits, as
`train.grpo` does; `recomputed` does so with activation checkpointing; `unshared` takes the
judgements one by one, each with its own prompt; `whole logits` is packed, with all logits at once
and autograd. Weights are random. What bounds the gain from sharing is the ratio of tokens,
G (P + R) / (P + G R). Ends in one JSON line.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from bench.decode import config_of, random_model
from bench.loss_peers import OPTIONS, Batch, unfused
from bench.provenance import print_json
from bench.shapes import SHAPES
from bench.timing import DEVICE
from bench.turns import Run, describe, take_turns
from engine import command
from kernels.logprob.linear_policy_loss import linear_policy_loss
from models.transformer import Transformer
from train.packing import PackedBatch, hidden_states, pack
from train.trajectories import Trajectory

PEERS = ("packed", "recomputed", "unshared", "whole logits")


def make(name: str, shape: str, prefix: int, completion: int, group: int, rows: int) -> Run:
    """Gradients of all parameters; gives the loss and the norm of the head's gradient."""
    model = random_model(config_of(SHAPES[shape], prefix + completion), torch.float32, DEVICE)
    model.recompute = name == "recomputed"
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        drawn = torch.randint(model.config.vocab_size, (length,), generator=generator)
        return tuple(drawn.tolist())

    trajectories = [
        Trajectory([prompt], ids(completion))
        for prompt in (ids(prefix) for _ in range(rows))
        for _ in range(group)
    ]
    parts = [[each] for each in trajectories] if name == "unshared" else [trajectories]
    batches = [pack(part, DEVICE) for part in parts]
    advantage = torch.randn(len(trajectories), generator=generator)
    signs = advantage.split([len(part) for part in parts])
    total = completion * len(trajectories)

    def run() -> dict[str, float]:
        loss = 0.0
        for batch, sign in zip(batches, signs, strict=True):
            lengths = torch.tensor(batch.lengths)
            own = sign.repeat_interleave(lengths).to(DEVICE)
            result = loss_of(model, batch, own, total, name == "whole logits")
            result.backward()
            loss += result.item()
        grad = model.head_weight.grad
        assert grad is not None
        told = {"loss": loss, "gradient": grad.norm().item()}
        model.zero_grad()
        return told

    return run


def loss_of(
    model: Transformer, batch: PackedBatch, advantage: Tensor, total: int, whole: bool
) -> Tensor:
    """The loss of a packed batch, on policy, with a reference that is a little off."""
    hidden, weight = hidden_states(model, batch), model.head_weight
    token_weight = torch.full_like(advantage, 1 / total)
    near = torch.full_like(advantage, -10.5)
    if whole:
        tensors = Batch(hidden, weight, batch.target, advantage, token_weight, near, near)
        return unfused(tensors, None)
    return linear_policy_loss(
        hidden, weight, batch.target, advantage, token_weight, OPTIONS, old_logp=near, ref_logp=near
    ).loss


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.train_step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-107m")
    for name, value in (("prefix", 1024), ("completion", 256), ("group", 4), ("rows", 1)):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="R")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    args = parser.parse_args(arguments)
    sizes = args.prefix, args.completion, args.group, args.rows
    makers = {name: partial(make, name, args.shape, *sizes) for name in args.peers}
    results = take_turns(makers, args.repeats, "step")
    bound = args.group * (args.prefix + args.completion)
    bound /= args.prefix + args.group * args.completion
    print(f"{args.shape}: {args.rows} x ({args.prefix} + {args.group} x {args.completion}) tokens; "
          f"sharing computes {bound:.2f} times fewer")  # fmt: skip
    print(describe(results))
    told = [r for r in results.values() if "error" not in r]
    for key in ("loss", "gradient"):
        if any(abs(r[key] - told[0][key]) > 1e-3 * abs(told[0][key]) + 1e-6 for r in told):
            print(f"not one {key}: {[r[key] for r in told]}", file=sys.stderr)
            return 1
    settings = {"shape": args.shape, "sizes": sizes, "device": str(DEVICE)}
    threads = {"threads": torch.get_num_threads()}
    print_json(settings | threads | {"token_ratio": bound, "peers": results})
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
