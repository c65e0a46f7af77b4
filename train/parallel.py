"""Several processes as one trainer: under torchrun each takes its share, and results are gathered.

Every rank holds the same rows, judgements and metrics; what it computes by itself is its share of
sampling and of micro-batches. The parameters that train are sharded layer by layer (FSDP2), so that
gradients are summed and optimizer states divided. A single process needs none of this, and every
function here is then the identity.

It does not choose what is computed, and starts no processes.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from models.scalar_head import ScalarModel, decoder_of
from models.transformer import Transformer

T = TypeVar("T")


@contextmanager
def ranks() -> Iterator[None]:
    """Inside, this process is one of those that torchrun has started, if it has: over NCCL with a
    GPU for each, else over gloo. Enter it before anything is put on a device."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()  # not where this rank has failed: the others may be waiting


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process writes files and shows progress."""
    return rank() == 0


def barrier() -> None:
    """Wait for all."""
    if dist.is_initialized():
        dist.barrier()


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's run of items; the runs of all ranks, one after another, are the items."""
    first, last = (len(items) * (rank() + i) // world_size() for i in (0, 1))
    return items[first:last]


def gather(items: Sequence[T]) -> list[T]:
    """The items of all ranks, in the order of ranks."""
    if world_size() == 1:
        return list(items)
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, list(items))
    return [item for own in found for item in own]


def from_first(value: T) -> T:
    """The first rank's value."""
    return gather([value])[0]


def shard(model: Transformer | ScalarModel, whole: Collection[nn.Parameter] = ()) -> None:
    """Divide the parameters among the ranks, in place, but for those that are to stay `whole`: a
    layer's are whole while it runs, the rest from the forward to the end of the backward. Gradients
    come out as the mean over the ranks, taken in float32."""
    if world_size() == 1:
        return
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in (*decoder_of(model).layers, model):
        fully_shard(module, mp_policy=policy, ignored_params=set(whole))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be divided among the ranks; each of them has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Let go of what a forward without a backward has left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def micro_batches(items: Sequence[T], size: int) -> list[tuple[Sequence[T], bool]]:
    """This rank's share of items in runs of at most `size`, as many on every rank.

    The flag says whether a run counts; one that only keeps step with the other ranks, and has to be
    given a weight of 0, is the first item again.
    """
    own = share(items)
    most = -(-len(items) // world_size())
    runs = [own[first : first + size] for first in range(0, most, size)]
    return [(run, True) if run else (items[:1], False) for run in runs]
