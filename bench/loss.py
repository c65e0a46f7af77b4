"""Memory and time of the policy loss and its gradients, fused and unfused, on one head.

    python -m bench.loss [--tokens 1024 4096] [--hidden 512] [--vocab 151936] [--softcap C]
                         [--dtype float32] [--small ROWS] [--repeats 3]

`unfused` makes all logits and lets autograd do the rest; `fused` is `linear_policy_loss`; `fused in
place` adds the weight's gradient to a float32 buffer that is already there, `fused small` does
that with --small rows of logits at a time; `liger` is Liger-Kernel's loss, on a GPU where it is
installed.
Each runs in a process of its own, all in turn, round by round; the first round is not counted.
Loss and gradients have to agree. What is given as memory is the peak above what was there before:
gradients included, but for the weight's where it is added in place. Floor: three matrix products at
the measured rate. Ends in one JSON line.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bench.ceilings import measure_ceilings
from bench.loss_peers import OPTIONS, Batch, Head, liger, unfused
from bench.ops.linear_logprob import SMALL
from bench.provenance import print_json
from bench.timing import DEVICE, ON_GPU
from bench.turns import Run, describe, take_turns
from engine import command
from kernels.logprob.linear_policy_loss import linear_policy_loss

PEERS = ("fused", "fused in place", "fused small", "unfused", *(["liger"] if ON_GPU else []))


def make(name: str, head: Head, small: int) -> Run:
    """A forward and backward; gives the loss and the norm of the hidden states' gradient."""
    batch = Batch.of(head)
    in_place = name in ("fused in place", "fused small")
    weight_grad = torch.zeros_like(batch.weight, dtype=torch.float32) if in_place else None

    def run() -> dict[str, float]:
        if name == "unfused":
            loss = unfused(batch, head.softcap)
        elif name == "liger":
            loss = liger(batch, head.softcap)
        else:
            loss = linear_policy_loss(
                batch.hidden, batch.weight, batch.target, batch.advantage, batch.token_weight,
                OPTIONS, old_logp=batch.old_logp, ref_logp=batch.ref_logp, softcap=head.softcap,
                chunk_size=small if name == "fused small" else None, weight_grad=weight_grad,
            ).loss  # fmt: skip
        loss.backward()
        assert batch.hidden.grad is not None
        told = {"loss": loss.item(), "gradient": batch.hidden.grad.float().norm().item()}
        batch.hidden.grad = batch.weight.grad = None
        return told

    return run


def measure(head: Head, small: int, repeats: int) -> dict[str, dict[str, Any]]:
    """What each peer takes."""
    makers = {name: partial(make, name, head, small) for name in PEERS}
    return take_turns(makers, repeats, f"{head.tokens} tokens")


def disagreements(results: dict[str, dict[str, Any]], dtype: torch.dtype) -> list[str]:
    """Ours whose loss or gradient is not that of whole logits."""
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    exact = results["unfused"]
    if "error" in exact:
        return []
    return [
        f"{name}: {key} {result[key]:.6g}, not {exact[key]:.6g}"
        for name, result in results.items()
        for key in ("loss", "gradient")
        if name.startswith("fused") and "error" not in result
        and abs(result[key] - exact[key]) > tolerance * abs(exact[key])
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.loss", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], metavar="N")
    parser.add_argument("--hidden", type=int, default=512, metavar="H")
    parser.add_argument("--vocab", type=int, default=151_936, metavar="V")
    parser.add_argument("--softcap", type=float, metavar="C")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--small", type=int, default=SMALL, metavar="ROWS")
    parser.add_argument("--repeats", type=int, default=3, metavar="R")
    args = parser.parse_args(arguments)
    dtype = getattr(torch, args.dtype)
    ceilings = measure_ceilings()
    print(ceilings.describe())
    lines = []
    wrong: list[str] = []
    for tokens in args.tokens:
        head = Head(tokens, args.hidden, args.vocab, args.softcap, dtype)
        results = measure(head, args.small, args.repeats)
        wrong += disagreements(results, dtype)
        product = 2 * tokens * args.hidden * args.vocab
        floor = 3 * product / ceilings.matmul_tflop_per_s * 1e-12
        print(f"\n{tokens} tokens, head {args.hidden} x {args.vocab}: floor {floor:.3f} s")
        print(describe(results))
        lines.append({"tokens": tokens, "floor_seconds": floor, "peers": results})
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    summary = {"device": str(DEVICE), "threads": torch.get_num_threads(), "small": args.small}
    shape = {"hidden": args.hidden, "vocab": args.vocab, "dtype": args.dtype}
    print_json(summary | shape | {"softcap": args.softcap, "points": lines})
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
