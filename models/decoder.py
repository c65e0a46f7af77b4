"""A whole forward of the decoder as one C++ call, for sampling on CPU.

`Transformer` is the definition; this runs the same operations in the same order, over the same
packed weights (`kernels/packed_linear.py`), with forest attention over a cache inside. What it
saves is the time between operations: several hundred calls from Python and torch for every step.
The C++ is in `models/decoder.h`.

It keeps addresses of weights and caches, so both have to stay where they are; weights that change
in place are packed anew. No gradients.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import cpp
from kernels.forest_attention.cpp_impl import compile_plan, partials_of, suffixes_of
from kernels.forest_attention.plan import CompiledKey, ForestPlan
from kernels.packed_linear import pack, packed, packed_linear, uses_dot_products
from kernels.route import routing_structure
from kernels.target import power_of_two
from models.latent_attention import LATENT_EPS, LatentAttention
from models.layers import Linear, RMSNorm
from models.rope import Rope
from models.tensor_parallel import SplitTransformer
from models.transformer import MLP, DecoderLayer, ExpertsMLP, Transformer


def runs_cpp(model: Transformer) -> bool:
    """Whether this model's forward can be had as C++: float32 or bfloat16 on CPU, no gradient, and
    the model whole."""
    if isinstance(model, SplitTransformer):
        return False
    parameters = list(model.parameters())
    return not any(p.is_inference() for p in parameters) and cpp.runs_cpp(
        *(p.detach() for p in parameters)
    )


class CppDecoder:
    """The forward of one model over one cache."""

    def __init__(
        self, model: Transformer, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor]
    ) -> None:
        """k_caches (Hkv, N, D) and v_caches (Hkv, N, Dv), contiguous, one of each a layer; with
        latent attention v_caches are the first channels of k_caches."""
        for k, v in zip(k_caches, v_caches, strict=True):
            assert k.is_contiguous() and k.dtype == v.dtype == model.head_weight.dtype
            aliased = model.config.latent is not None
            assert v.data_ptr() == k.data_ptr() if aliased else v.is_contiguous()
        self.model, self.k_caches, self.v_caches = model, list(k_caches), list(v_caches)
        self.dtype = model.head_weight.dtype
        self.dots = uses_dot_products(model.head_weight)
        self._parameters = list(model.parameters())
        self._versions: list[tuple[int, int]] = []
        self._kept: list[object] = []  # what the layers point to
        self._angles: dict[Rope, tuple[Tensor, Tensor]] = {}  # tables by position

    def forward(
        self, token_ids: Tensor, positions: Tensor, slots: Tensor, plan: ForestPlan
    ) -> Tensor:
        """Write the keys and values of T tokens into their slots, and return their hidden states
        after the final norm, (T, hidden_size).

        token_ids, positions, slots: (T,) int64, contiguous; ids and slots are in range and slots
        distinct (ValueError for slots that are not).
        """
        config = self.model.config
        self._refresh()
        if not cpp.distinct_slots(slots, self.k_caches[0].shape[1]):
            raise ValueError(f"slots must be distinct and within the cache, got {slots.tolist()}")
        assert token_ids.is_contiguous() and positions.is_contiguous()
        self._reach(plan)
        suffixes = suffixes_of(plan)
        heads, v_dim = config.num_heads, config.cached_value_dim
        o = lse = None
        for layer, spec in zip(self._layers, config.attention, strict=True):
            chunks = compile_plan(plan, spec.window, heads, v_dim)
            layer.chunks, layer.num_chunks = chunks.table.data_ptr(), len(chunks.table)
            plan.executed += chunks.num_tiles
            if o is None or chunks.num_partials > len(o):
                o, lse = partials_of(plan, chunks.num_partials, heads, v_dim)
        out = torch.empty(len(token_ids), config.hidden_size, dtype=self.dtype)
        cpp.call(
            "decode", self.dtype, ctypes.byref(self._decoder), token_ids, len(token_ids),
            positions, slots, None if suffixes is None else ctypes.byref(suffixes), o,
            lse, out, dots=self.dots,
        )  # fmt: skip
        return out

    def head_logits(self, hidden: Tensor) -> Tensor:
        """`Transformer.head_logits`."""
        return packed_linear(hidden, self.model.head_weight)

    def _reach(self, plan: ForestPlan) -> None:
        """Give the layers tables of cosines and sines, (positions, rope_dim / 2), that reach as far
        as a plan's tokens."""

        def furthest() -> int:
            grows = plan.suffix.capacity if plan.advancing and plan.suffix is not None else 0
            return int(plan.initial_positions.max(initial=0)) + grows

        last = plan.compiled(CompiledKey("cpp", "last position"), furthest)
        if last >= min((len(cos) for cos, _ in self._angles.values()), default=0):
            self._angles = self.model.angles(torch.arange(power_of_two(last + 1, 1024)))
        for layer, rope in zip(self._layers, self.model.config.rope, strict=True):
            layer.cos, layer.sin = (table.data_ptr() for table in self._angles[rope])

    def _refresh(self) -> None:
        """Take the addresses of all weights, packed where they are matrices, if any has changed."""
        versions = [(p.data_ptr(), p._version) for p in self._parameters]
        if versions == self._versions:
            return
        self._versions, self._kept = versions, []
        config = self.model.config
        layers = [self._layer(i) for i in range(config.num_layers)]
        self._layers = (cpp.structure("Layer") * len(layers))(*layers)
        scale, latent = config.embedding_scale, config.latent
        self._decoder = cpp.structure("Decoder")(
            embedding=self.model.embed_tokens.weight.data_ptr(),
            norm=self.model.norm.weight.data_ptr(),
            layers=ctypes.addressof(self._layers),
            num_layers=config.num_layers,
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.cached_heads,
            dim=config.cached_key_dim,
            v_dim=config.cached_value_dim,
            cache_size=self.k_caches[0].shape[1],
            plus_one=int(config.norm_plus_one),
            gelu=int(config.activation == "gelu_tanh"),
            eps=config.rms_norm_eps,
            latent_eps=LATENT_EPS,
            embedding_scale=0.0 if scale is None else torch.tensor(scale).to(self.dtype).item(),
        )
        if latent is not None:
            self._decoder.nope_dim, self._decoder.rope_dim = latent.nope_dim, latent.rope_dim
            self._decoder.q_rank, self._decoder.out_dim = latent.q_rank or 0, config.v_head_dim

    def _layer(self, index: int) -> ctypes.Structure:
        layer: Any = self.model.layers[index]
        assert isinstance(layer, DecoderLayer)
        experts = layer.mlp if isinstance(layer.mlp, ExpertsMLP) else None
        block = layer.mlp if isinstance(layer.mlp, MLP) else layer.mlp.shared_experts
        attention, spec = layer.self_attn, self.model.config.attention[index]
        weights: dict[str, Tensor | None] = {
            "input_norm": layer.input_layernorm.weight,
            "qkv": self._packed(attention.qkv_proj),
            "qkv_bias": attention.qkv_proj.bias,
            "o": self._packed(attention.o_proj),
            "post_attention_norm": layer.post_attention_layernorm.weight,
        }
        if block is not None:
            weights["gate_up"] = self._packed(block.gate_up_proj, paired=True)
            weights["down"] = self._packed(block.down_proj)
        for name, owner, attribute in (
            ("q_norm", attention, "q_norm"),
            ("k_norm", attention, "k_norm"),
            ("pre_feedforward_norm", layer, "pre_feedforward_layernorm"),
            ("post_feedforward_norm", layer, "post_feedforward_layernorm"),
            ("q_a_norm", attention, "q_a_layernorm"),
            ("latent_norm", attention, "kv_a_layernorm"),
        ):
            norm = getattr(owner, attribute, None)
            weights[name] = norm.weight if isinstance(norm, RMSNorm) else None
        if isinstance(attention, LatentAttention):
            if attention.latent.q_rank is not None:
                weights["q_b"] = self._packed(attention.q_b_proj)
            absorbed = zip(("to_latent", "of_latent"), attention.absorbed(), strict=True)
            for name, by_head in absorbed:
                laid = torch.cat(
                    [pack(each.detach().contiguous(), dots=self.dots) for each in by_head]
                )
                self._kept.append(laid)
                weights[name] = laid
        return cpp.structure("Layer")(
            **{name: None if w is None else w.data_ptr() for name, w in weights.items()},
            k_cache=self.k_caches[index].data_ptr(),
            v_cache=self.v_caches[index].data_ptr(),
            intermediate=0 if block is None else block.down_proj.in_features,
            experts=None if experts is None else self._experts(experts),
            window=spec.window or 0,
            scale=spec.scale,
            softcap=spec.softcap or 0.0,
        )

    def _experts(self, block: ExpertsMLP) -> int:
        """The address of a layer's experts."""
        own, routing = block.experts, routing_structure(block.routing)
        weights = (
            self._packed(block.gate),
            packed(own.gate_up_proj, paired=True),
            packed(own.down_proj),
        )
        count, _, width = own.down_proj.shape
        addresses = [weight.data_ptr() for weight in weights]
        experts = cpp.structure("Experts")(*addresses, count, width, ctypes.addressof(routing))
        self._kept += *weights, routing, experts
        return ctypes.addressof(experts)

    def _packed(self, layer: Linear, paired: bool = False) -> Tensor:
        """A layer's weight; a merged one, which is there for its packing alone, lives as long as
        this decoder."""
        weight = layer.merged()
        kept = weight is layer.weight
        laid = packed(weight, paired) if kept else pack(weight, paired, self.dots)
        self._kept.append(laid)
        return laid
