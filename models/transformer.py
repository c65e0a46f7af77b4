"""One decoder for every supported family, driven by `ModelConfig`.

    h = embed(token) * scale
    per layer:  n = norm(h)
                h = h + [norm] W_o attend(rope([norm] W_q n), rope([norm] W_k n), W_v n)
                n = norm(h)
                h = h + [norm] W_down (act(W_gate n) * W_up n)
    logits = softcap(W_head norm(h))

A layer may have experts in place of its dense block (`kernels/route.py`, `kernels/moe.py`), and a
shared block beside them, which all tokens go through.

T tokens of any number of sequences lie flat, side by side; positions say where each stands. The
attention itself is passed in: prefill, decode and training share this forward and differ in
`attend` alone. A run may pass in its own matrix product, in place of `linear`, for all but a router
and its experts, and with a cache a `write` that takes keys and values there. q, k, v and gate, up
are stored as fused weights, the only layout there is.

On CPU the matrix products are torch's, whose bits depend on T and on the number of threads. Only
the C++ forward (`models/decoder.py`) gives a row the same bits in any batch; on a GPU
`kernels.matmul` as the product does so.

It does not hold a cache, scale scores, mask, or know what a prompt is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.gated_act import gated_act
from kernels.moe import moe
from kernels.norm_rope_write import HeadNorms
from kernels.packed_linear import allow_dot_products
from kernels.rope import rope, rope_cos_sin
from kernels.route import route
from models.config import ModelConfig
from models.experts_config import Experts
from models.latent_attention import LatentAttention
from models.layers import Attend, Linear, Product, RMSNorm, Write, linear
from models.rope import Rope

_MAX_SCORES = 1 << 24  # elements of one block of scores in `causal_attend`: 64 MiB of float32


class Attention(nn.Module):
    """Projections, per-head norms and rope around the attention of the caller."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.sizes = (
            heads * config.head_dim,
            kv_heads * config.head_dim,
            kv_heads * config.v_head_dim,
        )
        self.qkv_proj = Linear(config.hidden_size, sum(self.sizes), bias=config.attention_bias)
        self.o_proj = Linear(heads * config.v_head_dim, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, config.norm_plus_one)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, config.norm_plus_one)

    @property
    def norms(self) -> HeadNorms | None:
        """The norms of queries and keys, of a model that has them."""
        config = self.config
        if not config.qk_norm:
            return None
        weights = self.q_norm.weight, self.k_norm.weight
        return HeadNorms(*weights, config.rms_norm_eps, config.norm_plus_one)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Attend,
        product: Product,
        write: Write | None,
    ) -> Tensor:
        config = self.config
        q, k, v = self.qkv_proj(x, product).split(self.sizes, -1)
        q = q.unflatten(-1, (config.num_heads, config.head_dim))
        k = k.unflatten(-1, (config.num_kv_heads, config.head_dim))
        v = v.unflatten(-1, (config.num_kv_heads, config.v_head_dim))
        if write is not None:
            q = write(self.layer, q, k, v, self.norms, cos, sin)
        else:
            if config.qk_norm:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = rope(q, cos, sin), rope(k, cos, sin)
        out = attend(self.layer, q, k, v)
        return self.o_proj(out.flatten(1), product)


class MLP(nn.Module):
    """The gated feed-forward block, `width` wide."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate_up_proj = Linear(config.hidden_size, 2 * width, bias=False)
        self.down_proj = Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, product: Product) -> Tensor:
        return self.down_proj(gated_act(self.gate_up_proj(x, product), self.activation), product)


class RoutedExperts(nn.Module):
    """The weights of all experts of a layer: gate and up (E, 2I, H), down (E, H, I)."""

    def __init__(self, hidden_size: int, experts: Experts) -> None:
        super().__init__()
        count, width = experts.count, experts.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(count, hidden_size, width))


class ExpertsMLP(nn.Module):
    """Experts, the router that chooses among them, and the shared block, of a model with one."""

    def __init__(self, config: ModelConfig, experts: Experts) -> None:
        super().__init__()
        self.activation = config.activation
        self.routing = experts.routing
        self.gate = Linear(config.hidden_size, experts.count, bias=False)
        self.experts = RoutedExperts(config.hidden_size, experts)
        shared = experts.shared_intermediate_size
        self.shared_experts = MLP(config, shared) if shared else None

    def forward(self, x: Tensor, product: Product) -> Tensor:
        own = self.experts
        keep = product is linear
        experts, weights = route(x, self.gate.weight, self.routing, keep)
        out = moe(x, own.gate_up_proj, own.down_proj, experts, weights, self.activation, keep)
        return out if self.shared_experts is None else out + self.shared_experts(x, product)


class DecoderLayer(nn.Module):
    """Attention and MLP with their norms, named as Hugging Face names them."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_plus_one)

        self.sandwich = config.sandwich_norms
        kind = Attention if config.latent is None else LatentAttention
        self.self_attn = kind(config, layer)
        experts = config.experts[layer]
        self.mlp: MLP | ExpertsMLP = (
            MLP(config, config.intermediate_size)
            if experts is None
            else ExpertsMLP(config, experts)
        )
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        if self.sandwich:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()

    def forward(
        self,
        update: Tensor | None,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Attend,
        product: Product,
        write: Write | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns this layer's last update, not yet added, and the residual stream before it."""
        if update is None:
            normed = self.input_layernorm(hidden)
        else:
            normed, hidden = self.input_layernorm.add(update, hidden)
        update = self.self_attn(normed, cos, sin, attend, product, write)
        if self.sandwich:
            update = self.post_attention_layernorm(update)
            normed, hidden = self.pre_feedforward_layernorm.add(update, hidden)
            return self.post_feedforward_layernorm(self.mlp(normed, product)), hidden
        normed, hidden = self.post_attention_layernorm.add(update, hidden)
        return self.mlp(normed, product), hidden


class Transformer(nn.Module):
    """The decoder. Parameters are uninitialised until loaded or `init_weights` is called.

    recompute: with gradients, keep of each layer its input alone, and run it again for the backward
    (activation checkpointing): a third more time for less memory, and the same bits.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Drawing no numbers: on the meta device that would import torch's compiler.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_plus_one)
        if not config.tied:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.recompute = False
        self._inv_freq: dict[tuple[Rope, torch.device], Tensor] = {}

    @property
    def head_weight(self) -> Tensor:
        """The (vocab, hidden) matrix of the head: the embedding where tied."""
        return self.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def use_fast_numerics(self) -> None:
        """Let its matrix products run on instructions whose bits differ between processors: see
        `kernels.packed_linear.allow_dot_products`."""
        allow_dot_products(weight for weight in self.parameters() if weight.ndim > 1)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None, std: float = 0.02) -> None:
        """Fill every parameter for training from nothing: matrices normal, norms 1, biases 0."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, std, generator=generator)
            elif name.endswith("bias") or self.config.norm_plus_one:
                parameter.zero_()
            else:
                parameter.fill_(1.0)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        product: Product = linear,
        write: Write | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, (T, hidden_size).

        token_ids, positions: (T,) int64 on the model's device. attend: see `Attend`; it is called
        once per layer, in order. product: what all linear layers multiply with; where it is not
        `linear`, no packed copy of an expert stays. write: where there is a cache, see `Write`.
        Neither ids nor positions are range-checked here (that would wait for the device).
        """
        config = self.config
        angles = self.angles(positions)
        hidden = self.embed_tokens(token_ids)
        if config.embedding_scale is not None:
            # Rounded to the model's dtype first: in bfloat16 sqrt(3584) is 60, and was in training.
            hidden = hidden * torch.tensor(config.embedding_scale).to(hidden.dtype).item()
        update: Tensor | None = None
        for layer, own in zip(self.layers, config.rope, strict=True):
            inputs = (update, hidden, *angles[own], attend, product, write)
            if self.recompute and torch.is_grad_enabled():
                update, hidden = checkpoint(
                    layer, *inputs, use_reentrant=False, preserve_rng_state=False
                )
            else:
                update, hidden = layer(*inputs)
        assert update is not None, "a decoder has at least one layer"
        return self.norm.add(update, hidden)[0]

    def head_logits(self, hidden: Tensor, product: Product = linear) -> Tensor:
        """Logits of hidden states (R, hidden_size) before the soft-cap: (R, vocab), in the dtype of
        the model."""
        return product(hidden, self.head_weight, None)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states (R, hidden_size): (R, vocab) float32 (float64 from float64)."""
        logits = self.head_logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cap = self.config.final_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """Logits of one plain sequence under causal attention, (T, vocab) float32, no gradient.

        token_ids: T ids in [0, vocab), T from 1 to max_position_embeddings; else ValueError.
        """
        device = self.embed_tokens.weight.device
        ids = torch.as_tensor(token_ids, device=device)
        if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
            raise ValueError(f"logits: token_ids must be (T,) integers, got {tuple(ids.shape)}")
        if len(ids) > self.config.max_position_embeddings:
            raise ValueError(
                f"logits: {len(ids)} tokens exceed max_position_embeddings "
                f"{self.config.max_position_embeddings}"
            )
        outside = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if len(outside):
            raise ValueError(
                f"logits: token id {int(outside[0])} is outside the vocabulary "
                f"{self.config.vocab_size}"
            )
        positions = torch.arange(len(ids), device=device)
        return self.head(self(ids.long(), positions, causal_attend(self.config)))

    def angles(self, positions: Tensor) -> dict[Rope, tuple[Tensor, Tensor]]:
        """Cosines and sines of positions (T,), (T, rope_dim / 2) each, for every rope there is."""
        found = {}
        for own in dict.fromkeys(self.config.rope):
            place = own, positions.device
            if place not in self._inv_freq:
                inv_freq = own.inv_freq(self.config.rope_dim)
                self._inv_freq[place] = inv_freq.to(positions.device)
            cos, sin = rope_cos_sin(positions, self._inv_freq[place])
            if self.config.latent is not None and own.attention_factor != 1:
                cos, sin = cos * own.attention_factor, sin * own.attention_factor
            found[own] = cos, sin
        return found


def causal_attend(config: ModelConfig, max_scores: int = _MAX_SCORES) -> Attend:
    """Plain causal attention over one sequence, in blocks of queries.

    Scores, soft-cap, softmax and the sum over values run in float32 (float64 for float64 input), in
    blocks of at most `max_scores` elements (one query row at least), so memory stays bounded; with
    gradients every block is kept. Returns an `Attend`.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = config.attention[layer]
        tokens, heads, dim = q.shape
        kv_heads = k.shape[1]
        wide = torch.promote_types(q.dtype, torch.float32)
        queries = q.to(wide).unflatten(1, (kv_heads, heads // kv_heads)).permute(1, 2, 0, 3)
        keys, values = k.to(wide).permute(1, 2, 0), v.to(wide).transpose(0, 1)
        block = max(1, max_scores // (heads * tokens))
        outs = []
        for start in range(0, tokens, block):
            stop = min(start + block, tokens)
            first = 0 if options.window is None else max(0, start - options.window + 1)
            query = queries[:, :, start:stop].reshape(kv_heads, -1, dim)
            scores = (query @ keys[:, :, first:stop]) * options.scale
            if options.softcap is not None:
                scores = torch.tanh(scores / options.softcap) * options.softcap
            q_pos = torch.arange(start, stop, device=q.device)[:, None]
            k_pos = torch.arange(first, stop, device=q.device)
            hidden = k_pos > q_pos
            if options.window is not None:
                hidden |= q_pos - k_pos >= options.window
            scores = scores.unflatten(1, (-1, stop - start)).masked_fill(hidden, float("-inf"))
            weights = scores.softmax(-1).flatten(1, 2)
            out = (weights @ values[:, first:stop]).unflatten(1, (-1, stop - start))
            outs.append(out.permute(2, 0, 1, 3).flatten(1, 2))
        return torch.cat(outs).to(q.dtype)

    return attend
