"""Kronos as it is served: fused weights, cached keys, and four pure functions for runtimes to execute.

`tokenize`, `prefill`, `step`, `detokenize` take and return tensors of static shape. All paths of a symbol share
the keys and values of its context (the prefix); each path owns those of its drawn tokens.
Axes: B symbols, S paths, T context, H horizon, L layers, N heads, W head width, D width.
"""

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kronos.network import DEPENDENCY_HEADS, Block, KronosPredictor, Rotary
from models.kronos.quantizer import pack_bits
from models.kronos.sampling import Filters, sample
from models.kronos.tokenizer import KronosTokenizer, code_of
from models.layers import branched_attention, merge_heads, split_heads, swiglu


class Prefix(NamedTuple):
    """What a symbol's paths share after `prefill`."""

    keys: Tensor  # [L, B, N, T, W]
    values: Tensor  # [L, B, N, T, W]
    dependency_keys: Tensor  # [B, 4, T, D/4]
    dependency_values: Tensor  # [B, 4, T, D/4]
    hidden: Tensor  # [B, D] of the last candle
    mask: Tensor  # [B, 1, 1, T] 0 or -inf


class Entries(NamedTuple):
    """Cache slots of paths: H of them where cached, one where a step returns them."""

    keys: Tensor  # [L, B, S, N, H, W]
    values: Tensor  # [L, B, S, N, H, W]
    dependency_keys: Tensor  # [B, S, 4, H, D/4]
    dependency_values: Tensor  # [B, S, 4, H, D/4]


class Controls(NamedTuple):
    """Sampling settings per symbol."""

    temperature: Tensor  # [B]
    filters: Filters | None


class FusedBlock(nn.Module):
    """A Block with one matrix for queries, keys, values and one for both halves of the feed-forward."""

    qkv: Tensor
    qkv_bias: Tensor
    gate_value: Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        attention, ffn = block.self_attn, block.ffn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.heads = attention.heads
        self.register_buffer("qkv", torch.cat([p.weight for p in projections]).detach())
        self.register_buffer("qkv_bias", torch.cat([p.bias for p in projections]).detach())
        self.register_buffer("gate_value", torch.cat([ffn.w1.weight, ffn.w3.weight]).detach())
        self.norm1, self.norm2, self.out, self.down = block.norm1, block.norm2, attention.out_proj, ffn.w2

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, of `x` `[..., T, D]`: `[..., N, T, W]` each."""
        q, k, v = F.linear(self.norm1(x), self.qkv, self.qkv_bias).chunk(3, dim=-1)
        return rotary(split_heads(q, self.heads)), rotary(split_heads(k, self.heads)), split_heads(v, self.heads)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the block after attention `[..., N, T, W]`."""
        x = x + self.out(merge_heads(attended))
        gate, value = F.linear(self.norm2(x), self.gate_value).chunk(2, dim=-1)
        out: Tensor = x + self.down(swiglu(gate, value))
        return out

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, keys and values of a whole context under a boolean `mask` `[B, 1, T, T]`."""
        q, k, v = self.project(x, rotary)
        return self.finish(x, F.scaled_dot_product_attention(q, k, v, attn_mask=mask)), k, v


class KronosDecoder(nn.Module):
    """Both networks of a Kronos version, ready to serve. `pad` `[B]` counts padding candles on the left."""

    coarse_table: Tensor
    fine_table: Tensor
    query_table: Tensor
    dependency: Tensor
    dependency_bias: Tensor

    def __init__(self, tokenizer: KronosTokenizer, predictor: KronosPredictor) -> None:
        super().__init__()
        config, embedding, dependency = predictor.config, predictor.embedding, predictor.dep_layer.cross_attn
        self.tokens = tokenizer.config
        self.width, self.heads = config.d_model, config.n_heads
        self.embed, self.quantise = tokenizer.embed, tokenizer.quant_embed
        self.expand, self.reconstruct = tokenizer.post_quant_embed, tokenizer.head
        self.encoder, self.decoder = _fused(tokenizer.encoder), _fused(tokenizer.decoder)
        self.blocks = _fused(predictor.transformer)
        self.norm, self.time_emb = predictor.norm, predictor.time_emb
        self.dependency_norm, self.dependency_out = predictor.dep_layer.norm, dependency.out_proj
        self.coarse_head, self.fine_head = predictor.head.proj_s1, predictor.head.proj_s2
        with torch.no_grad():
            left, right = embedding.fusion_proj.weight.double().chunk(2, dim=1)
            root = math.sqrt(config.d_model)
            coarse = embedding.emb_s1.weight.double() @ left.T * root
            fine = embedding.emb_s2.weight.double() @ right.T * root + embedding.fusion_proj.bias.double()
            queries = dependency.q_proj(embedding.emb_s1.weight)
        self.register_buffer("coarse_table", coarse.float())
        self.register_buffer("fine_table", fine.float())
        self.register_buffer("query_table", queries)  # the dependency layer asks with the coarse token alone
        self.register_buffer("dependency", torch.cat([dependency.k_proj.weight, dependency.v_proj.weight]).detach())
        self.register_buffer("dependency_bias", torch.cat([dependency.k_proj.bias, dependency.v_proj.bias]).detach())

    # -- the four functions ----------------------------------------------------------------------

    def tokenize(self, x: Tensor, pad: Tensor) -> tuple[Tensor, Tensor]:
        """Coarse and fine tokens `[B, T]` of normalised candles `[B, T, 6]`."""
        z, mask = self.embed(x), _causal_mask(x.shape[1], pad)
        rotary = Rotary(_positions(x.shape[1], pad), self.tokens.d_model // self.tokens.n_heads)
        for block in _each(self.encoder):
            z, _, _ = block(z, rotary, mask)
        coarse, fine = self.quantise(z).split((self.tokens.s1_bits, self.tokens.s2_bits), dim=-1)
        return pack_bits(coarse), pack_bits(fine)

    def prefill(self, coarse: Tensor, fine: Tensor, stamps: Tensor, pad: Tensor) -> Prefix:
        """Everything the paths of each symbol share, from its tokens `[B, T]` and features `[B, T, 5]`."""
        T = coarse.shape[1]
        x = F.embedding(coarse, self.coarse_table) + F.embedding(fine, self.fine_table) + self.time_emb(stamps)
        rotary, mask = Rotary(_positions(T, pad), self.width // self.heads), _causal_mask(T, pad)
        keys, values = [], []
        for block in _each(self.blocks):
            x, k, v = block(x, rotary, mask)
            keys.append(k)
            values.append(v)
        hidden = self.norm(x)
        shared_mask = torch.where(torch.arange(T, device=x.device) >= pad.unsqueeze(-1), 0.0, -torch.inf)
        return Prefix(
            torch.stack(keys), torch.stack(values), *self._dependency(hidden), hidden[:, -1], shared_mask[:, None, None]
        )

    def step(
        self,
        hidden: Tensor,
        prefix: Prefix,
        cache: Entries,
        index: Tensor,
        position: Tensor,
        stamps: Tensor,
        uniforms: Tensor,
        controls: Controls,
    ) -> tuple[Tensor, Tensor, Tensor, Entries]:
        """Draw one token pair per path and advance: coarse and fine `[B, S]`, new `hidden`, new cache entries.

        `hidden` `[B, S, D]` stands at the candle before; `cache` slots from `index` on are not yet written;
        `position` `[B]` and `stamps` `[B, 5]` are those of the drawn candle; `uniforms` `[B, S, 2]`.
        """
        empty = torch.where(torch.arange(cache.keys.shape[-2], device=hidden.device) < index, 0.0, -torch.inf)
        coarse = sample(self.coarse_head(hidden), uniforms[..., 0], *controls)
        asked = split_heads(F.embedding(coarse, self.query_table).unsqueeze(2), DEPENDENCY_HEADS)
        found = branched_attention(
            asked,
            (prefix.dependency_keys, prefix.dependency_values),
            (cache.dependency_keys, cache.dependency_values),
            (prefix.mask, empty),
        )
        conditioned = self.dependency_norm(hidden + self.dependency_out(merge_heads(found).squeeze(2)))
        fine = sample(self.fine_head(conditioned), uniforms[..., 1], *controls)

        stamp = self.time_emb(stamps).unsqueeze(1)
        x = (F.embedding(coarse, self.coarse_table) + F.embedding(fine, self.fine_table) + stamp).unsqueeze(2)
        rotary = _path_rotary(position.unsqueeze(-1), self.width // self.heads)
        masks = (prefix.mask, F.pad(empty, (0, 1)))
        keys, values = [], []
        for layer, block in enumerate(_each(self.blocks)):
            q, k, v = block.project(x, rotary)  # [B, S, N, 1, W]
            own = (torch.cat((cache.keys[layer], k), dim=-2), torch.cat((cache.values[layer], v), dim=-2))
            x = block.finish(x, branched_attention(q, (prefix.keys[layer], prefix.values[layer]), own, masks))
            keys.append(k)
            values.append(v)
        advanced = self.norm(x)
        entries = Entries(torch.stack(keys), torch.stack(values), *self._dependency(advanced))
        return coarse, fine, advanced.squeeze(2), entries

    def detokenize(
        self, context: tuple[Tensor, Tensor], drawn: tuple[Tensor, Tensor], pad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Normalised candles `[B, S, H, 6]` of drawn tokens `[B, S, H]`, and `[B, 6]` of the last context token.

        `context` tokens `[B, T]` are decoded once per symbol; only what is new is decoded per path.
        """
        T, H = context[0].shape[1], drawn[0].shape[2]
        width = self.tokens.d_model // self.tokens.n_heads
        shared, x = self.expand(code_of(*context, self.tokens)), self.expand(code_of(*drawn, self.tokens))
        positions = _positions(T, pad)
        rotary, mask = Rotary(positions, width), _causal_mask(T, pad)
        path_rotary = _path_rotary(T - pad.unsqueeze(-1) + torch.arange(H, device=pad.device), width)
        order = torch.arange(H, device=pad.device)
        masks = (
            torch.where(torch.arange(T, device=pad.device) >= pad.unsqueeze(-1), 0.0, -torch.inf)[:, None, None],
            torch.where(order <= order.unsqueeze(-1), 0.0, -torch.inf),
        )
        for block in _each(self.decoder):
            q, k, v = block.project(x, path_rotary)  # [B, S, N, H, W]
            shared, prefix_k, prefix_v = block(shared, rotary, mask)
            x = block.finish(x, branched_attention(q, (prefix_k, prefix_v), (k, v), masks))
        return self.reconstruct(x), self.reconstruct(shared)[:, -1]

    # -- private ---------------------------------------------------------------------------------

    def _dependency(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the dependency layer, `[..., 4, T, D/4]`."""
        k, v = F.linear(hidden, self.dependency, self.dependency_bias).chunk(2, dim=-1)
        return split_heads(k, DEPENDENCY_HEADS), split_heads(v, DEPENDENCY_HEADS)

    def empty_cache(self, rows: int, paths: int, horizon: int) -> Entries:
        """Zeroed cache slots; masked until written."""
        table = self.coarse_table
        own = (len(self.blocks), rows, paths, self.heads, horizon, self.width // self.heads)
        dependency = (rows, paths, DEPENDENCY_HEADS, horizon, self.width // DEPENDENCY_HEADS)
        return Entries(
            table.new_zeros(own), table.new_zeros(own), table.new_zeros(dependency), table.new_zeros(dependency)
        )


def _fused(blocks: nn.ModuleList) -> nn.ModuleList:
    return nn.ModuleList(FusedBlock(cast(Block, block)) for block in blocks)


def _each(blocks: nn.ModuleList) -> list[FusedBlock]:
    return cast(list[FusedBlock], list(blocks))


def _positions(length: int, pad: Tensor) -> Tensor:
    """Positions `[B, T]` that count from the first real candle."""
    return (torch.arange(length, device=pad.device) - pad.unsqueeze(-1)).clamp_min(0)


def _causal_mask(length: int, pad: Tensor) -> Tensor:
    """Boolean `[B, 1, T, T]`: earlier real candles and, so that padding rows are not empty, oneself."""
    order = torch.arange(length, device=pad.device)
    causal = order <= order.unsqueeze(-1)
    real = order >= pad.unsqueeze(-1)  # [B, T]
    return ((causal & real.unsqueeze(1)) | torch.eye(length, dtype=torch.bool, device=pad.device)).unsqueeze(1)


def _path_rotary(positions: Tensor, width: int) -> Rotary:
    """Rotary embedding for `[B, S, N, Q, W]` at positions `[B, Q]`."""
    rotary = Rotary(positions, width)
    rotary.cos, rotary.sin = rotary.cos.unsqueeze(1), rotary.sin.unsqueeze(1)
    return rotary
