"""Multi-head latent attention, of DeepSeek-V2 (arXiv 2405.04434): heads whose keys and values are
linear in one latent vector of their token.

    c = norm(W_kva n)[:R]        k_rope = rope(W_kva n)[R:]        shared by all heads
    q_h = (q_nope, rope(q_rope)) of W_q n, or of W_qb norm(W_qa n)
    k_h = (W_k,h c, k_rope)      v_h = W_v,h c                     W_k,h and W_v,h: rows of W_kvb

T tokens, H heads, R channels of a latent; `Latent` has the others. *Expanded*, as these formulas
stand, it is ordinary attention with a key and a value for each head: of plain sequences and of
training. *Absorbed*, with a cache, W_k,h goes over to the query and W_v,h to the output:

    s = (W_k,h^T q_nope) . c + q_rope . k_rope        o_h = W_v,h sum_j p_j c_j

so that the cache holds (c, k_rope) alone, one key for all heads, whose first R channels are its
value. Checkpoints turn neighbouring channels together; rows of weights are reordered on loading
(`models/weights.py`), so that rope turns halves here as everywhere.
"""

import torch
from torch import Tensor, nn

from kernels.rope import rope
from models.config import ModelConfig
from models.layers import Attend, Linear, Product, RMSNorm, Write, linear

LATENT_EPS = 1e-6  # of the norms in between, whatever config.json says of the others


class LatentAttention(nn.Module):
    """Projections, norms and rope around the attention of the caller."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        latent = config.latent
        assert latent is not None
        self.config, self.latent = config, latent
        self.layer = layer
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_heads * (latent.nope_dim + config.v_head_dim)
        self.sizes = (latent.q_rank or q_size, latent.kv_rank, latent.rope_dim)
        self.qkv_proj = Linear(config.hidden_size, sum(self.sizes), bias=False)
        if latent.q_rank is not None:
            self.q_a_layernorm = RMSNorm(latent.q_rank, LATENT_EPS, plus_one=False)
            self.q_b_proj = Linear(latent.q_rank, q_size, bias=False)
        self.kv_a_layernorm = RMSNorm(latent.kv_rank, LATENT_EPS, plus_one=False)
        self.kv_b_proj = Linear(latent.kv_rank, kv_size, bias=False)
        self.o_proj = Linear(config.num_heads * config.v_head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Attend,
        product: Product,
        write: Write | None,
    ) -> Tensor:
        config, latent = self.config, self.latent
        q, c, k_rope = self.qkv_proj(x, product).split(self.sizes, -1)
        if latent.q_rank is not None:
            q = self.q_b_proj(self.q_a_layernorm(q), product)
        q = q.unflatten(-1, (config.num_heads, config.head_dim))
        q_nope, q_rope = q.split((latent.nope_dim, latent.rope_dim), -1)
        c, k_rope = self.kv_a_layernorm(c), k_rope[:, None]
        if write is None:
            q = torch.cat([q_nope, rope(q_rope, cos, sin)], -1)
            kv = self.kv_b_proj(c, product).unflatten(-1, (config.num_heads, -1))
            k_nope, v = kv.split((latent.nope_dim, config.v_head_dim), -1)
            turned = rope(k_rope, cos, sin).expand(-1, config.num_heads, -1)
            out = attend(self.layer, q, torch.cat([k_nope, turned], -1), v)
        else:
            to_latent, of_latent = self.absorbed()
            q_rope = write(self.layer, q_rope, k_rope, c[:, None], None, cos, sin)
            q = torch.cat([by_head(q_nope, to_latent, product), q_rope], -1)
            # What it attends to is in the cache: (c, k_rope), and c again.
            out = by_head(attend(self.layer, q, k_rope, c[:, None]), of_latent, product)
        return self.o_proj(out.flatten(1), product)

    def absorbed(self) -> tuple[Tensor, Tensor]:
        """W_k,h^T, (H, R, nope_dim), and W_v,h, (H, v_head_dim, R): parts of kv_b_proj's weight."""
        weight = self.kv_b_proj.merged().unflatten(0, (self.config.num_heads, -1))
        w_k, w_v = weight.split((self.latent.nope_dim, self.config.v_head_dim), 1)
        return w_k.transpose(1, 2), w_v


def by_head(x: Tensor, weight: Tensor, product: Product) -> Tensor:
    """Each head's linear layer. x: (T, H, K), weight: (H, N, K). Returns (T, H, N). With a product
    of its own a run gets it for every head."""
    if product is linear:
        return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
    outs = [product(x[:, h], each.contiguous(), None) for h, each in enumerate(weight)]
    return torch.stack(outs, 1)
