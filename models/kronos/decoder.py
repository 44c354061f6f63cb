"""Kronos as it is served: fused weights, cached keys, and four pure functions for runtimes to execute.

`tokenize`, `prefill`, `step`, `detokenize` take and return tensors of static shape. All paths of a symbol share
the keys and values of its context (the prefix); each path owns those of its drawn tokens.
Axes: B symbols, S paths, T context, H horizon, L layers, N heads, W head width, D width.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.adapters import NO_ADAPTERS, Adapter, Adapters, Fitting, Matrices
from models.kronos.network import DEPENDENCY_HEADS, TIME_FIELDS, Block, KronosPredictor, Rotary
from models.kronos.quantizer import pack_bits
from models.kronos.sampling import sample
from models.kronos.tokenizer import KronosTokenizer, code_of
from models.layers import Int8Product, Product, branched_attention, copied_to, merge_heads, split_heads, swiglu


class Tokens(NamedTuple):
    """Token pairs, `[B, T]` each."""

    coarse: Tensor
    fine: Tensor


class Prefix(NamedTuple):
    """What all paths of a symbol attend to: its context."""

    keys: Tensor  # [L, B, N, T, W]
    values: Tensor  # [L, B, N, T, W]
    dependency_keys: Tensor  # [B, 4, T, D/4]
    dependency_values: Tensor  # [B, 4, T, D/4]
    mask: Tensor  # [B, 1, 1, T] 0 or -inf


class Prefilled(NamedTuple):
    """A Prefix, and where its paths start."""

    keys: Tensor
    values: Tensor
    dependency_keys: Tensor
    dependency_values: Tensor
    mask: Tensor
    hidden: Tensor  # [B, D] of the last candle

    @property
    def prefix(self) -> Prefix:
        return Prefix(*self[:5])


class Cache(NamedTuple):
    """Slots of the tokens that paths have drawn: H of them."""

    keys: Tensor  # [L, B, S, N, H, W]
    values: Tensor  # [L, B, S, N, H, W]
    dependency_keys: Tensor  # [B, S, 4, H, D/4]
    dependency_values: Tensor  # [B, S, 4, H, D/4]

    @classmethod
    def empty(cls, prefix: Prefix, paths: int, slots: int) -> "Cache":
        """Zeroed slots beside `prefix`; masked until written."""
        own = (*prefix.keys.shape[:2], paths, prefix.keys.shape[2], slots, prefix.keys.shape[4])
        rows, heads, _, width = prefix.dependency_keys.shape
        dependency = (rows, paths, heads, slots, width)
        like = prefix.keys
        return cls(like.new_zeros(own), like.new_zeros(own), like.new_zeros(dependency), like.new_zeros(dependency))

    def write(self, drawn: "Drawn", index: int) -> None:
        """Put a step's keys and values into slot `index`."""
        for slots, entry in zip(self, drawn[3:7], strict=True):
            slots[..., index : index + 1, :] = entry


class Controls(NamedTuple):
    """Sampling settings per symbol, `[B]` each."""

    temperature: Tensor
    top_k: Tensor  # 0: off
    top_p: Tensor  # 1: off


class Drawn(NamedTuple):
    """What one step yields."""

    coarse: Tensor  # [B, S]
    fine: Tensor  # [B, S]
    hidden: Tensor  # [B, S, D]
    keys: Tensor  # [L, B, S, N, 1, W] and so on: the cache entries of the drawn token
    values: Tensor
    dependency_keys: Tensor
    dependency_values: Tensor
    coarse_logits: Tensor  # [B, S, tokens]; what a runtime is compared by
    fine_logits: Tensor


class Candles(NamedTuple):
    """Normalised candles: of the paths `[B, S, H, 6]`, and the last of the context, reconstructed, `[B, 6]`."""

    paths: Tensor
    last: Tensor


class FusedBlock(nn.Module):
    """A Block with one matrix for queries, keys, values and one for both halves of the feed-forward."""

    def __init__(self, block: Block, name: str) -> None:
        super().__init__()
        self.name = name  # to adapters
        attention, ffn = block.self_attn, block.ffn
        self.heads = attention.heads
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.qkv = Product.of(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Product.of(attention.out_proj)
        self.gate_value, self.down = Product.of(ffn.w1, ffn.w3), Product.of(ffn.w2)

    def fit(self, adapter: Fitting, published: str) -> None:
        """Take from an adapter what lies beside the block that is called `published`."""
        projections = [f"{published}.self_attn.{each}_proj" for each in "qkv"]
        adapter.product(f"{self.name}.qkv", self.qkv.weight, projections)
        adapter.product(f"{self.name}.out", self.out.weight, [f"{published}.self_attn.out_proj"])
        adapter.product(
            f"{self.name}.gate_value", self.gate_value.weight, [f"{published}.ffn.w1", f"{published}.ffn.w3"]
        )
        adapter.product(f"{self.name}.down", self.down.weight, [f"{published}.ffn.w2"])

    def project(self, x: Tensor, rotary: Rotary, adapters: Adapters = NO_ADAPTERS) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, of `x` `[..., T, D]`: `[..., N, T, W]` each."""
        normed = self.norm1(x)
        q, k, v = adapters.add(f"{self.name}.qkv", normed, self.qkv(normed)).chunk(3, dim=-1)
        q, k = (rotary(split_heads(part, self.heads)).to(v.dtype) for part in (q, k))
        return q, k, split_heads(v, self.heads)

    def finish(self, x: Tensor, attended: Tensor, adapters: Adapters = NO_ADAPTERS) -> Tensor:
        """The rest of the block after attention `[..., N, T, W]`."""
        merged = merge_heads(attended)
        x = x + adapters.add(f"{self.name}.out", merged, self.out(merged))
        normed = self.norm2(x)
        gate, value = adapters.add(f"{self.name}.gate_value", normed, self.gate_value(normed)).chunk(2, dim=-1)
        inner = swiglu(gate, value)
        return x + adapters.add(f"{self.name}.down", inner, self.down(inner))

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor, adapters: Adapters = NO_ADAPTERS
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, keys and values of a whole context under a boolean `mask` `[B, 1, T, T]`."""
        q, k, v = self.project(x, rotary, adapters)
        return self.finish(x, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), adapters), k, v


class KronosDecoder(nn.Module):
    """Both networks of a Kronos version, ready to serve. `pad` `[B]` counts padding candles on the left.

    `path_blocks` and `path_dependency` are the predictor's blocks and dependency layer as steps see them.
    """

    functions: tuple[str, ...] = ("tokenize", "prefill", "step", "detokenize")
    repeated: tuple[str, ...] = ("step",)

    coarse_order: Tensor
    fine_order: Tensor
    coarse_table: Tensor
    fine_table: Tensor
    query_table: Tensor

    def __init__(self, tokenizer: KronosTokenizer, predictor: KronosPredictor) -> None:
        super().__init__()
        config, embedding, dependency = predictor.config, predictor.embedding, predictor.dep_layer.cross_attn
        self.tokens = tokenizer.config
        self.width, self.heads = config.d_model, config.n_heads
        self.embed, self.quantise = tokenizer.embed, tokenizer.quant_embed
        self.expand, self.reconstruct = Product.of(tokenizer.post_quant_embed), tokenizer.head
        self.encoder, self.decoder = _fused(tokenizer.encoder), _fused(tokenizer.decoder)
        self.blocks = self.path_blocks = _fused(predictor.transformer)
        self.norm, self.time_emb = predictor.norm, predictor.time_emb
        self.dependency = self.path_dependency = Product.of(dependency.k_proj, dependency.v_proj)
        self.dependency_norm, self.dependency_out = predictor.dep_layer.norm, Product.of(dependency.out_proj)
        for name, order in zip(("coarse", "fine"), tokenizer.close_orders(), strict=True):
            self.register_buffer(f"{name}_order", order.to(predictor.head.proj_s1.weight.device))
        self.coarse_head = reordered(predictor.head.proj_s1, self.coarse_order)
        self.fine_head = reordered(predictor.head.proj_s2, self.fine_order)
        with torch.no_grad():
            left, right = embedding.fusion_proj.weight.double().chunk(2, dim=1)
            root = math.sqrt(config.d_model)
            coarse = embedding.emb_s1.weight.double() @ left.T * root
            fine = embedding.emb_s2.weight.double() @ right.T * root + embedding.fusion_proj.bias.double()
            queries = dependency.q_proj(embedding.emb_s1.weight)
        self.register_buffer("coarse_table", coarse.float())
        self.register_buffer("fine_table", fine.float())
        self.register_buffer("query_table", queries)  # the dependency layer asks with the coarse token alone
        self._unfolded = (embedding.emb_s1.weight.detach(), embedding.emb_s2.weight.detach())  # what adapters multiply

    @property
    def device(self) -> torch.device:
        return self.coarse_table.device

    def examples(self, size: int) -> Mapping[str, tuple[Any, ...]]:
        """Arguments of the four functions, for runtimes that are traced."""
        B, T, S, H = ((5, 64, 12, 24), (6, 128, 8, 16))[size]
        device = self.device
        pad = torch.zeros(B, dtype=torch.int64, device=device)
        candles = torch.zeros(B, T, self.embed.in_features, device=device)
        stamps = torch.ones(B, T, len(TIME_FIELDS), dtype=torch.int64, device=device)
        context = Tokens(*torch.zeros(2, B, T, dtype=torch.int64, device=device))
        drawn = Tokens(*torch.zeros(2, B, S, H, dtype=torch.int64, device=device))
        with torch.no_grad():
            filled = self.prefill(context, stamps, pad)
        step = (
            filled.hidden.unsqueeze(1).repeat(1, S, 1),
            filled.prefix,
            Cache.empty(filled.prefix, S, H),
            torch.tensor(0, device=device),
            pad + T,
            stamps[:, -1],
            torch.zeros(B, S, 2, device=device),
            Controls(torch.ones(B, device=device), torch.zeros_like(pad), torch.ones(B, device=device)),
        )
        return {
            "tokenize": (candles, pad),
            "prefill": (context, stamps, pad),
            "step": step,
            "detokenize": (context, drawn, pad),
        }

    def reduced(self, dtype: torch.dtype) -> "KronosDecoder":
        """A copy whose matrices over drawn candles are of `dtype`.

        Norms, tables and the sum that runs through the layers stay in float32, and so does the tokenizer's
        encoder: a context has the same tokens at any precision. In int8 only what a step reads for a few rows is
        smaller; all else is shared.
        """
        copied = copy.copy(self)
        copied._modules, copied._buffers = dict(self._modules), dict(self._buffers)
        if dtype == torch.int8:
            copied.path_blocks = nn.ModuleList(_in_int8(block) for block in _each(self.blocks))
            copied.path_dependency = cast(Product, Int8Product(self.dependency))
            for name in ("coarse_head", "fine_head", "dependency_out"):
                setattr(copied, name, Int8Product(getattr(self, name)))
            return copied
        for name in ("blocks", "decoder", "dependency", "dependency_out", "expand", "coarse_head", "fine_head"):
            setattr(copied, name, copied_to(getattr(self, name), dtype, Product))
        copied.path_blocks, copied.path_dependency = copied.blocks, copied.dependency
        copied.query_table = self.query_table.to(dtype)
        return copied

    def fitted(self, matrices: Matrices) -> Adapter:
        """An adapter as this network is served; WeightsMismatch if it is of another network."""
        adapter, width, published = Fitting(matrices, self.device), self.width, "predictor.dep_layer.cross_attn"
        for index, block in enumerate(_each(self.blocks)):
            block.fit(adapter, f"predictor.transformer.{index}")
        adapter.product("dependency", self.dependency.weight, [f"{published}.k_proj", f"{published}.v_proj"])
        adapter.product("dependency_out", self.dependency_out.weight, [f"{published}.out_proj"])
        adapter.product("coarse_head", self.coarse_head.weight, ["predictor.head.proj_s1"], self.coarse_order)
        adapter.product("fine_head", self.fine_head.weight, ["predictor.head.proj_s2"], self.fine_order)
        coarse, fine = (table.double() for table in self._unfolded)
        if pair := adapter.take("predictor.embedding.fusion_proj", 2 * width, width):
            left, right = (math.sqrt(width) * half.to(self.device).double() for half in pair[0].chunk(2, dim=1))
            adapter.fit("coarse_table", [((left @ coarse.T).float(), pair[1])])
            adapter.fit("fine_table", [((right @ fine.T).float(), pair[1])])
        if pair := adapter.take(f"{published}.q_proj", width, width):
            adapter.fit("query_table", [((pair[0].to(self.device).double() @ coarse.T).float(), pair[1])])
        return adapter.done()

    # -- the four functions ----------------------------------------------------------------------

    def tokenize(self, x: Tensor, pad: Tensor) -> Tokens:
        """The tokens of normalised candles `[B, T, 6]`."""
        z, mask = self.embed(x), _causal_mask(x.shape[1], pad)
        rotary = Rotary(_positions(x.shape[1], pad), self.tokens.d_model // self.tokens.n_heads)
        for block in _each(self.encoder):
            z, _, _ = block(z, rotary, mask)
        coarse, fine = self.quantise(z).split((self.tokens.s1_bits, self.tokens.s2_bits), dim=-1)
        return Tokens(pack_bits(coarse), pack_bits(fine))

    def prefill(self, tokens: Tokens, stamps: Tensor, pad: Tensor, adapters: Adapters = NO_ADAPTERS) -> Prefilled:
        """Everything the paths of each symbol share, from its tokens and features `[B, T, 5]`."""
        T = stamps.shape[1]
        x = self._embed(tokens, self.time_emb(stamps), adapters)
        rotary, mask = Rotary(_positions(T, pad), self.width // self.heads), _causal_mask(T, pad)
        keys, values = [], []
        for block in _each(self.blocks):
            x, k, v = block(x, rotary, mask, adapters)
            keys.append(k)
            values.append(v)
        hidden = self.norm(x)
        dependency = adapters.add("dependency", hidden, self.dependency(hidden))
        return Prefilled(torch.stack(keys), torch.stack(values), *_halves(dependency), _padding(T, pad), hidden[:, -1])

    def step(
        self,
        hidden: Tensor,
        prefix: Prefix,
        cache: Cache,
        index: Tensor,
        position: Tensor,
        stamps: Tensor,
        uniforms: Tensor,
        controls: Controls,
        adapters: Adapters = NO_ADAPTERS,
    ) -> Drawn:
        """Draw one token pair per path and advance.

        `hidden` `[B, S, D]` stands at the candle before; `cache` slots from `index` on are not yet written;
        `position` `[B]` and `stamps` `[B, 5]` are those of the drawn candle; `uniforms` `[B, S, 2]`.
        """
        empty = torch.where(torch.arange(cache.keys.shape[-2], device=hidden.device) < index, 0.0, -torch.inf)
        coarse_logits = adapters.add("coarse_head", hidden, self.coarse_head(hidden)).float()
        coarse = self.coarse_order[sample(coarse_logits, uniforms[..., 0], *controls)]
        asked = adapters.look_up("query_table", coarse, F.embedding(coarse, self.query_table))
        asked = split_heads(asked.unsqueeze(2), DEPENDENCY_HEADS)
        found = branched_attention(
            asked,
            (prefix.dependency_keys, prefix.dependency_values, prefix.mask),
            [(cache.dependency_keys, cache.dependency_values, empty)],
        )
        found = merge_heads(found).squeeze(2)
        found = adapters.add("dependency_out", found, self.dependency_out(found))
        conditioned = self.dependency_norm(hidden + found)
        fine_logits = adapters.add("fine_head", conditioned, self.fine_head(conditioned)).float()
        fine = self.fine_order[sample(fine_logits, uniforms[..., 1], *controls)]

        x = self._embed(Tokens(coarse, fine), self.time_emb(stamps).unsqueeze(1), adapters).unsqueeze(2)
        rotary = _path_rotary(position.unsqueeze(-1), self.width // self.heads)
        keys, values = [], []
        for layer, block in enumerate(_each(self.path_blocks)):
            q, k, v = block.project(x, rotary, adapters)  # [B, S, N, 1, W]
            own = [(cache.keys[layer], cache.values[layer], empty), (k, v, None)]
            attended = branched_attention(q, (prefix.keys[layer], prefix.values[layer], prefix.mask), own)
            x = block.finish(x, attended, adapters)
            keys.append(k)
            values.append(v)
        advanced = self.norm(x)
        entries = (
            torch.stack(keys),
            torch.stack(values),
            *_halves(adapters.add("dependency", advanced, self.path_dependency(advanced))),
        )
        return Drawn(coarse, fine, advanced.squeeze(2), *entries, coarse_logits, fine_logits)

    def detokenize(self, context: Tokens, drawn: Tokens, pad: Tensor) -> Candles:
        """The candles of drawn tokens `[B, S, H]`.

        Those of the context `[B, T]` are decoded once per symbol; only what is new is decoded per path.
        """
        T, H = context.coarse.shape[1], drawn.coarse.shape[2]
        width = self.tokens.d_model // self.tokens.n_heads
        shared, x = (self.expand(code_of(*part, self.tokens)).float() for part in (context, drawn))
        positions = _positions(T, pad)
        rotary, mask = Rotary(positions, width), _causal_mask(T, pad)
        path_rotary = _path_rotary(T - pad.unsqueeze(-1) + torch.arange(H, device=pad.device), width)
        order = torch.arange(H, device=pad.device)
        causal = torch.where(order <= order.unsqueeze(-1), 0.0, -torch.inf)
        padding = _padding(T, pad)
        for block in _each(self.decoder):
            q, k, v = block.project(x, path_rotary)  # [B, S, N, H, W]
            shared, prefix_k, prefix_v = block(shared, rotary, mask)
            x = block.finish(x, branched_attention(q, (prefix_k, prefix_v, padding), [(k, v, causal)]))
        return Candles(self.reconstruct(x), self.reconstruct(shared)[:, -1])

    # -- private ---------------------------------------------------------------------------------

    def _embed(self, tokens: Tokens, stamps: Tensor, adapters: Adapters) -> Tensor:
        coarse, fine = (F.embedding(*pair) for pair in zip(tokens, (self.coarse_table, self.fine_table), strict=True))
        coarse = adapters.look_up("coarse_table", tokens.coarse, coarse)
        return coarse + adapters.look_up("fine_table", tokens.fine, fine) + stamps


def _halves(both: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the dependency layer, `[..., 4, T, D/4]`."""
    k, v = both.chunk(2, dim=-1)
    return split_heads(k, DEPENDENCY_HEADS), split_heads(v, DEPENDENCY_HEADS)


def _in_int8(block: FusedBlock) -> FusedBlock:
    """A copy that reads its matrices in 8 bits."""
    copied = copy.copy(block)
    copied._modules = dict(block._modules)
    for name, part in block.named_children():
        if isinstance(part, Product):
            setattr(copied, name, Int8Product(part))
    return copied


def reordered(head: nn.Linear, order: Tensor) -> Product:
    """`head` with its outputs in `order`: a distribution function over them rises with the close."""
    found = Product(head.in_features, head.out_features, device=head.weight.device)
    with torch.no_grad():
        found.weight.copy_(head.weight[order])
        found.bias.copy_(head.bias[order])
    return found


def _fused(blocks: nn.ModuleList) -> nn.ModuleList:
    return nn.ModuleList(FusedBlock(cast(Block, block), f"blocks.{index}") for index, block in enumerate(blocks))


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


def _padding(length: int, pad: Tensor) -> Tensor:
    """`[B, 1, 1, T]` to add to scores: -inf where a candle is padding."""
    order = torch.arange(length, device=pad.device)
    return torch.where(order >= pad.unsqueeze(-1), 0.0, -torch.inf)[:, None, None]


def _path_rotary(positions: Tensor, width: int) -> Rotary:
    """Rotary embedding for `[B, S, N, Q, W]` at positions `[B, Q]`."""
    rotary = Rotary(positions, width)
    rotary.cos, rotary.sin = rotary.cos.unsqueeze(1), rotary.sin.unsqueeze(1)
    return rotary
