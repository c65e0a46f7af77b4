"""What judging and training with a model take of memory, and whether that fits a device.

    python -m bench.memory (--model DIR | --shape gemma2-27b) [--meta-model DIR] [--device cuda|cpu]
                           [--train none lora full] [--dtype bfloat16] [--rank 16] [--loop grpo|sft]
                           [--k 32] [--rows 8] [--prompt-tokens 2500] [--new-tokens 512]
                           [--group 8] [--micro-rows 1] [--no-recompute] [--gpus 80 141]

Nothing is loaded: of DIR config.json is read, and the model is built on torch's meta device. What a
backward needs is counted there too, by running the forward and looking at what autograd saves. The
cache is the one that `rows` prompts of `prompt-tokens` distinct tokens and their samples of
`new-tokens` need at once; with less, samples wait, so a device's verdict says how many rows it
holds. A step of `train.grpo` samples, keeping no gradients, and then computes those of `micro-rows`
prompts with `group` judgements each; `train.sft` does not sample. GB are 10^9 bytes; what fits
leaves a twentieth for kernels and gaps, as the engine does. Tables go to standard error; ends in
one JSON line.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from bench.decode import config_of
from bench.provenance import print_json
from bench.shapes import SHAPES
from engine import command
from engine.generate import PREFILL_TOKENS
from engine.kv_cache import cell_bytes, round_up, scratch_cells
from engine.memory import working_bytes
from kernels.forest_attention.plan import MAX_SPLIT, splits_of
from kernels.logprob import torch_impl, triton_impl
from kernels.moe import run_counted
from kernels.target import TARGETS
from models import read_config, transformer
from models.config import DTYPES, ModelConfig
from models.layers import Linear
from models.lora import add_adapters
from models.transformer import RoutedExperts, Transformer

GB = 10**9
SHARE = 0.95  # of a device that may be used


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is judged and learnt from. dtype: of the weights. rank: of adapters, 0 for none."""

    dtype: torch.dtype = torch.bfloat16
    on_gpu: bool = True
    k: int = 32
    rows: int = 8
    prompt_tokens: int = 2500
    new_tokens: int = 512
    group: int = 8
    micro_rows: int = 1
    rank: int = 16
    recompute: bool = True
    samples: bool = True  # a step samples, and has a reference: train.grpo

    @property
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch: its prompts once, and judgements without their last tokens."""
        own = self.prompt_tokens + self.group * (self.new_tokens - 1)
        return round_up(self.micro_rows * own)

    @property
    def predicted(self) -> int:
        """Predicted tokens of a micro-batch."""
        return self.micro_rows * self.group * self.new_tokens


def meta_model(config: ModelConfig, load: Load, rank: int = 0) -> Transformer:
    """A model without memory, with adapters where they have a rank."""
    with torch.device("meta"):
        model = Transformer(config).to(load.dtype)
    if rank:
        add_adapters(model, rank, 16.0)
    return model


def weight_bytes(model: Transformer) -> int:
    """Of all parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


def packed_bytes(model: Transformer, load: Load) -> int:
    """Of the copies of all matrices that C++ multiplies with; there are none on a GPU."""
    if load.on_gpu:
        return 0
    of_head = model.head_weight.nbytes if model.config.tied else 0
    packed = [each for each in model.modules() if isinstance(each, Linear | RoutedExperts)]
    matrices = [p for each in packed for p in each.parameters() if p.ndim > 1]
    return of_head + sum(matrix.nbytes for matrix in matrices)


def cache_cells(load: Load, k: int) -> int:
    """Cells of the prompts and samples that are in flight at once (`engine/kv_cache.py`)."""
    block = round_up(min(MAX_SPLIT, load.new_tokens))
    samples = load.rows * k
    own = round_up(load.prompt_tokens) + k * splits_of(load.new_tokens) * block
    return scratch_cells(samples) + load.rows * own


def sampling_parts(config: ModelConfig, load: Load, k: int) -> dict[str, int]:
    """What sampling takes beside weights."""
    return {
        "cache": cache_cells(load, k) * cell_bytes(config, load.dtype),
        "forward": working_bytes(config, load.dtype, load.rows * k, PREFILL_TOKENS),
    }


def judging_parts(
    config: ModelConfig, load: Load, meta: ModelConfig | None
) -> dict[str, dict[str, int]]:
    """What is held, and what beside it while a judge samples. A meta model has all samples of one
    row in its cache, and its forward takes no more than the judge's."""
    model = meta_model(config, load)
    held = {"weights": weight_bytes(model), "packed": packed_bytes(model, load)}
    if meta is not None:
        scorer = meta_model(meta, load)
        tree = round_up(load.prompt_tokens) + load.k * round_up(load.new_tokens)
        held["meta weights"] = weight_bytes(scorer) + packed_bytes(scorer, load)
        held["meta cache"] = (scratch_cells(0) + tree) * cell_bytes(meta, load.dtype)
    return {"held": held, "sampling": sampling_parts(config, load, load.k)}


class _Attention(torch.autograd.Function):
    """Saves what `forest_attention` does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = q.new_empty(*q.shape[:2], v.shape[-1])
        ctx.save_for_backward(q, k, v, o, q.new_empty(q.shape[:2], dtype=torch.float32))
        return o


class _Experts(torch.autograd.Function):
    """Saves what `moe` does on a GPU, and computes nothing."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor
    ) -> Tensor:
        halves = x.new_empty(experts.numel(), gate_up.shape[1])
        ctx.save_for_backward(x, gate_up, down, weights, halves, torch.empty_like(experts))
        return torch.empty_like(x)


def _even_moe(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor, activation: str,
    keep: bool,
) -> Tensor:  # fmt: skip
    """What `moe` does in torch, where all experts have as many pairs."""
    pairs, count = experts.numel(), len(gate_up)
    counts = [(i + 1) * pairs // count - i * pairs // count for i in range(count)]
    return run_counted(x, gate_up, down, experts, weights, activation, counts)


def saved_bytes(model: Transformer, tokens: int, on_gpu: bool) -> int:
    """What autograd saves of a forward of so many tokens, each storage once and no parameter's."""
    seen: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    ids = torch.zeros(tokens, dtype=torch.int64, device="meta")
    experts = (lambda *x: _Experts.apply(*x[:5])) if on_gpu else _even_moe
    with (
        patch.object(transformer, "moe", experts),  # which tokens go where is not known here
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model(ids, ids, lambda layer, q, k, v: _Attention.apply(q, k, v))
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    return sum(t.untyped_storage().nbytes() for place, t in seen.items() if place not in own)


def activation_parts(model: Transformer, load: Load) -> dict[str, int]:
    """What a micro-batch keeps from its forward to its backward, and what one layer's backward has
    beside that: its activations where they are recomputed, and their gradients, with copies in
    float32 on a CPU."""
    tokens, config = load.micro_tokens, model.config
    whole = saved_bytes(model, tokens, load.on_gpu)
    layer = whole // config.num_layers
    gradients = layer if load.on_gpu else 2 * layer
    if not load.recompute:
        return {"activations": whole, "backward": gradients}
    # A layer's input is the residual stream and the update that is not yet added to it.
    inputs = 2 * tokens * config.hidden_size * load.dtype.itemsize
    return {"activations": inputs * config.num_layers, "backward": layer + gradients}


def head_bytes(model: Transformer, load: Load) -> int:
    """What the log-probs of a micro-batch and their gradients take at most: a chunk of logits, the
    gradients of hidden states, and in float32 the gradient of the head where that learns."""
    config, weight = model.config, model.head_weight
    vocab, hidden = weight.shape
    if load.on_gpu:
        rows = min(triton_impl._CHUNK_SIZE, load.predicted)
        tile = triton_impl._launch(load.dtype, TARGETS["sm_90"])["BLOCK_N"]
        partials = 3 * triton_impl._PARTS * triton.cdiv(vocab, tile) * 4
        logits = rows * (vocab * load.dtype.itemsize + partials)
    else:
        rows = min(max(16, torch_impl._MAX_LOGITS // vocab), round_up(load.predicted))
        copies = 2 if config.final_softcap is None else 3
        wide = vocab * hidden * 4 if load.dtype.itemsize < 4 else 0
        logits = copies * rows * vocab * 4 + wide
    states = 2 * load.predicted * hidden * load.dtype.itemsize
    if not weight.requires_grad:
        return logits + states
    # Its gradient is added up, rounded, and widened again for the master.
    rounded = weight.nbytes if load.dtype.itemsize < 4 else 0
    return vocab * hidden * 4 + states + max(logits, rounded)


def training_parts(config: ModelConfig, load: Load, how: str) -> dict[str, dict[str, int]]:
    """What is held all the time, and what beside it while a step samples and while it updates."""
    rank = load.rank if how == "lora" else 0
    model = meta_model(config, load, rank)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = {
        "weights": weight_bytes(model),
        "masters": 4 * learning if load.dtype.itemsize < 4 else 0,
        "moments": 8 * learning,
    }
    plain = meta_model(config, load)
    if load.samples and not rank:  # with adapters the model itself is the reference
        held["reference"] = weight_bytes(plain)
    phases: dict[str, dict[str, int]] = {"held": held}
    packed = packed_bytes(plain, load)
    if load.samples and packed and not rank:  # else it goes with the sampling, but for the head
        held["packed"] = packed
    elif load.samples and packed:
        held["packed head"] = model.head_weight.nbytes
    if load.samples:
        phases["sampling"] = sampling_parts(config, load, load.group)
        if rank:
            phases["sampling"]["packed"] = max(packed - model.head_weight.nbytes, 0)
    activations = activation_parts(model, load)
    backward = activations.pop("backward")
    phases["update"] = {"gradients": 4 * learning, **activations}
    phases["update"]["head or backward"] = max(head_bytes(model, load), backward)
    return phases


def peak_of(phases: Mapping[str, Mapping[str, int]]) -> int:
    """What is held, and the larger of what is beside it."""
    others = [sum(parts.values()) for name, parts in phases.items() if name != "held"]
    return sum(phases["held"].values()) + max(others, default=0)


def rows_that_fit(
    phases: Mapping[str, Mapping[str, int]], config: ModelConfig, load: Load, k: int, gpu: float
) -> int:
    """How many of the rows a device of so many GB holds at a time; 0 where it does not hold one."""
    for rows in range(load.rows, 0, -1):
        sampling = dict(phases.get("sampling", {}))
        if sampling:
            sampling |= sampling_parts(config, replace(load, rows=rows), k)
        if peak_of({**phases, "sampling": sampling}) <= SHARE * gpu * GB:
            return rows
    return 0


def table(
    title: str, phases: Mapping[str, Mapping[str, int]], rows: int, held: Mapping[float, int]
) -> str:
    """For a person: every part in GB, and how many of the rows each device holds at a time."""
    lines = [title]
    for phase, parts in phases.items():
        lines += [f"  {phase:9}{name:18}{size / GB:9.2f}" for name, size in parts.items() if size]
    lines.append(f"  {'peak':27}{peak_of(phases) / GB:9.2f}")
    for gpu, most in held.items():
        some = "" if most == rows else f" with {most} of {rows} rows at a time"
        lines.append(f"  {'fits' + some if most else 'does not fit'}: {gpu:g} GB")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, metavar="DIR", help="with a config.json")
    model.add_argument("--shape", choices=sorted(SHAPES), help="in place of a model")
    parser.add_argument("--meta-model", type=Path, metavar="DIR", help="beside a judge")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--train", nargs="+", choices=("none", "lora", "full"), default=("none", "lora", "full")
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="of weights")
    parser.add_argument("--loop", choices=("grpo", "sft"), default="grpo")
    names = ("k", "rows", "prompt_tokens", "new_tokens", "group", "micro_rows", "rank")
    for name in names:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=getattr(Load, name), metavar="N")
    parser.add_argument("--no-recompute", action="store_true", help="keep all activations")
    parser.add_argument("--gpus", nargs="+", type=float, default=(80, 141), metavar="GB")
    args = parser.parse_args(arguments)
    sizes = {name: getattr(args, name) for name in names}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} = {size} is less than 1")
    load = Load(
        dtype=DTYPES[args.dtype], on_gpu=args.device == "cuda", recompute=not args.no_recompute,
        samples=args.loop == "grpo", **sizes,
    )  # fmt: skip
    context = load.prompt_tokens + load.new_tokens
    config = read_config(args.model) if args.model else config_of(SHAPES[args.shape], context)
    if context > config.max_position_embeddings:
        raise ValueError(
            f"{context} tokens exceed max_position_embeddings {config.max_position_embeddings}"
        )
    meta = None if args.meta_model is None else read_config(args.meta_model, scalar=True)
    found: dict[str, Any] = {}
    for how in args.train:
        if how == "none":
            phases, k = judging_parts(config, load, meta), load.k
            title = f"judging, {load.rows} rows of {k} samples"
        else:
            phases, k = training_parts(config, load, how), load.group
            title = f"{args.loop}, " + (f"LoRA of rank {load.rank}" if how == "lora" else "full")
        held = {gpu: rows_that_fit(phases, config, load, k, gpu) for gpu in args.gpus}
        title = f"{args.model or args.shape}: {title}, {args.dtype}, in GB"
        print(table(title, phases, load.rows, held), file=sys.stderr)
        rows = {f"{gpu:g}": most for gpu, most in held.items()}
        found[how] = {**phases, "peak": peak_of(phases), "rows_that_fit": rows}
    settings = {"model": str(args.model or args.shape), "device": args.device, "dtype": args.dtype}
    settings |= {"loop": args.loop, "recompute": load.recompute, **sizes}
    print_json(settings | {"bytes": found})


if __name__ == "__main__":
    sys.exit(command.run(main))
