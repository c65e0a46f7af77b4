"""A decoder that is divided among processes: each has a share of every layer (tensor parallelism).

    q, k, v, gate, up        by rows: a process has some heads, and some channels of each block
    o, down                  by columns: their outputs are parts of a sum, taken over all processes
    head                     by rows of the vocabulary: logits are gathered
    embedding, norms, router whole, everywhere

Experts are divided as dense blocks are, each of them. Two sums a layer and one gathering a forward
is all that is sent. Every process gets the same logits, to the bit.

The split is by hand. In a fused weight a process has rows of q, of k and of v, which no `Shard` of
a DTensor describes; and what multiplies with weights here (packed C++, Triton) takes plain tensors.

It starts no processes, does not train, and holds no adapters. The C++ of a whole forward knows
nothing of other processes: operations run one by one. Tested over gloo, on CPUs; never on GPUs.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from models.config import ModelConfig
from models.experts_config import Experts
from models.latent_attention import LatentAttention
from models.layers import Linear, Product, linear
from models.transformer import MLP, DecoderLayer, ExpertsMLP, Transformer


class _SummedLinear(Linear):
    """A linear layer that has some of its columns here, and the others elsewhere."""

    def __init__(self, columns: int, rows: int, group: ProcessGroup) -> None:
        super().__init__(columns, rows, bias=False)
        self.group = group

    def forward(self, x: Tensor, product: Product = linear) -> Tensor:
        out = super().forward(x, product)
        dist.all_reduce(out, group=self.group)
        return out


class _SummedExperts(ExpertsMLP):
    """Experts, and a shared block, of which some channels are here, and the others elsewhere."""

    def __init__(self, config: ModelConfig, experts: Experts, group: ProcessGroup) -> None:
        super().__init__(config, experts)
        self.group = group

    def forward(self, x: Tensor, product: Product) -> Tensor:
        out = super().forward(x, product)
        dist.all_reduce(out, group=self.group)
        return out


class SplitTransformer(Transformer):
    """One process's share of a decoder. `config` is that of the share, `head_weight` some rows of
    the head. All processes have to call it with the same tokens."""

    def __init__(self, config: ModelConfig, group: ProcessGroup) -> None:
        """config: of the share. The parameters are without values."""
        with torch.device("meta"):
            super().__init__(config)
            for layer in self.layers:
                assert isinstance(layer, DecoderLayer)
                out = layer.self_attn.o_proj
                layer.self_attn.o_proj = _SummedLinear(out.in_features, out.out_features, group)
                if isinstance(layer.mlp, MLP):
                    down = layer.mlp.down_proj
                    layer.mlp.down_proj = _SummedLinear(down.in_features, down.out_features, group)
                else:
                    experts = config.experts[layer.self_attn.layer]
                    assert experts is not None
                    layer.mlp = _SummedExperts(config, experts, group)
            rows = -(-config.vocab_size // group.size())
            self.lm_head = Linear(config.hidden_size, rows, bias=False)
        self.group = group

    def head_logits(self, hidden: Tensor, product: Product = linear) -> Tensor:
        """`Transformer.head_logits`: of the whole vocabulary."""
        own = super().head_logits(hidden, product).contiguous()
        all_of = [torch.empty_like(own) for _ in range(self.group.size())]
        dist.all_gather(all_of, own, group=self.group)
        return torch.cat(all_of, -1)[:, : self.config.vocab_size].contiguous()


def split(model: Transformer, group: ProcessGroup | None = None) -> SplitTransformer:
    """This process's share of a model, which all processes of the group have loaded; by default the
    group is that of all. The embedding and what else is whole is not copied. Raises ValueError
    where heads or channels cannot be divided, and for a model with adapters."""
    group = group or dist.group.WORLD
    if group is None:
        raise ValueError("a model is divided among processes: torch.distributed is not initialized")
    if any(type(each) is not Linear for each in model.modules() if isinstance(each, Linear)):
        raise ValueError("a model with adapters, or a share of one, cannot be divided")
    share = SplitTransformer(_share_config(model.config, group.size()), group)
    with torch.no_grad():
        state = {
            name: _share(model, name, tensor, group) for name, tensor in model.state_dict().items()
        }
        state["lm_head.weight"] = _rows_of_head(model.head_weight.detach(), group)
    share.load_state_dict(state, assign=True)
    return share.train(model.training).requires_grad_(False)


def _share_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """What the config says of one share."""
    wide = {"attention heads": config.num_heads}
    if any(own is None for own in config.experts):
        wide["intermediate_size"] = config.intermediate_size
    for own in filter(None, config.experts):
        wide["the intermediate_size of experts"] = own.intermediate_size
        wide["that of their shared block"] = own.shared_intermediate_size
    for name, size in wide.items():
        if size % ranks:
            raise ValueError(f"{name}, {size}, cannot be divided among {ranks} processes")
    kv_heads = config.num_kv_heads
    if kv_heads % ranks and ranks % kv_heads:
        raise ValueError(f"{kv_heads} key/value heads cannot be divided among {ranks} processes")
    experts = [
        own and replace(
            own,
            intermediate_size=own.intermediate_size // ranks,
            shared_intermediate_size=own.shared_intermediate_size // ranks,
        )
        for own in config.experts
    ]  # fmt: skip
    return replace(
        config,
        num_heads=config.num_heads // ranks,
        num_kv_heads=max(kv_heads // ranks, 1),
        intermediate_size=config.intermediate_size // ranks,
        experts=tuple(experts),
        tied=False,
    )


def _share(model: Transformer, name: str, tensor: Tensor, group: ProcessGroup) -> Tensor:
    """This process's share of a parameter."""
    ranks, (*_, owner, kind) = group.size(), ("", *name.split("."))
    config = model.config
    is_expert = owner == "experts"
    module = kind if is_expert else owner
    if module == "qkv_proj":
        layer = model.layers[int(name.split(".")[1])]
        assert isinstance(layer, DecoderLayer)
        attention = layer.self_attn
        kv = min(config.num_kv_heads, ranks)  # of fewer heads than processes each has several
        pieces = ranks, kv, kv
        if isinstance(attention, LatentAttention):  # latents are whole everywhere
            pieces = 1 if attention.latent.q_rank else ranks, 1, 1
        return _cut(tensor, attention.sizes, pieces, 0, group)
    if module == "gate_up_proj":
        dim = 1 if is_expert else 0
        return _cut(tensor, [tensor.shape[dim] // 2] * 2, [ranks] * 2, dim, group)
    if module in ("q_b_proj", "kv_b_proj"):
        return _cut(tensor, [len(tensor)], [ranks], 0, group)
    if module in ("o_proj", "down_proj"):
        return _cut(tensor, [tensor.shape[-1]], [ranks], -1, group)
    return tensor


def _cut(
    tensor: Tensor, sizes: Sequence[int], pieces: Sequence[int], dim: int, group: ProcessGroup
) -> Tensor:
    """Of each of the parts that lie side by side in a dimension, this process's piece."""
    rank, ranks = group.rank(), group.size()
    parts = zip(tensor.split(list(sizes), dim), pieces, strict=True)
    own = [part.chunk(count, dim)[rank * count // ranks] for part, count in parts]
    return torch.cat(own, dim).contiguous()


def _rows_of_head(weight: Tensor, group: ProcessGroup) -> Tensor:
    """This process's rows; after the last ones zeros, so that all have as many."""
    rows = -(-len(weight) // group.size())
    own = weight[group.rank() * rows : (group.rank() + 1) * rows]
    return torch.cat([own, own.new_zeros(rows - len(own), weight.shape[1])])
