"""Toto as it is served: weights laid out for inference, and four pure functions for runtimes to execute.

`forward` answers up to one patch. Longer horizons take one `prefill`, then `draw` a patch for every path and
`step` over it. All take and return tensors of static shape. The paths of a series share the keys and values of
its context (the prefix); each path owns those of its drawn patches.
Axes: B series, V variates, S paths, P patches, L time-wise layers, N heads, W head width, D width, K components.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.adapters import NO_ADAPTERS, Adapter, Adapters, Fitting, Matrices
from models.layers import branched_attention, copied_to, merge_heads, rotary_angles, swiglu
from models.toto.network import XPOS_BASE, Layer, Mixture, TotoNetwork
from models.toto.scaler import Statistics, causal_patch_scale, extend

# Whole patches in fours: every matrix product then has a multiple of 4 rows, whose bits on a CPU do not
# depend on how many rows there are.
TAIL = 4
VARIATES = 5


class Prefix(NamedTuple):
    """What the paths of a series share after `prefill`."""

    keys: Tensor  # [L, B * V, N, P, W]
    values: Tensor  # [L, B * V, N, P, W]
    mask: Tensor  # [B * V, 1, 1, P] 0 or -inf
    patches: Tensor  # [B] those that are real


class Cache(NamedTuple):
    """Slots of the patches that paths have drawn; a step returns the entries of one."""

    keys: Tensor  # [L, B * V, S, N, slots, W]
    values: Tensor  # [L, B * V, S, N, slots, W]

    @classmethod
    def empty(cls, prefix: Prefix, paths: int, slots: int) -> "Cache":
        """Zeroed slots beside `prefix`; masked until written."""
        layers, series, heads, _, width = prefix.keys.shape
        shape = (layers, series, paths, heads, slots, width)
        return cls(prefix.keys.new_zeros(shape), prefix.keys.new_zeros(shape))

    def write(self, entries: "Cache", index: int) -> None:
        """Put a step's keys and values into slot `index`."""
        for slots, entry in zip(self, entries, strict=True):
            slots[..., index : index + 1, :] = entry


class Projected(NamedTuple):
    """Head outputs of one patch, in units that its location and scale undo."""

    outputs: Tensor  # [B, V, 64, 4K]
    loc: Tensor  # [B, V]
    scale: Tensor  # [B, V]


class Prefilled(NamedTuple):
    """What one pass says of the next patch, and what paths go on from."""

    ahead: Projected
    prefix: Prefix
    reached: Statistics


class Stepped(NamedTuple):
    """A Prefilled with an axis of paths after V, and the cache entries of the patch that was read."""

    ahead: Projected
    reached: Statistics
    entries: Cache


class Patch(NamedTuple):
    """A drawn patch of every path."""

    values: Tensor  # [B, V, S, 64]


class Rotation(NamedTuple):
    """Rotary embedding with xpos decay (Sun et al. 2022, arXiv 2212.10554), `[…, 2, 1, W / 2]` each.

    The axis of 2 tells queries, which grow by the decay, from keys, which shrink by it.
    """

    cos_even: Tensor
    sin_even: Tensor
    cos_odd: Tensor
    sin_odd: Tensor

    def at(self, positions: Tensor) -> "Rotation":
        """Of tables `[P, …]` those at `positions` `[B, T]`, with an axis for variates, `[B, 1, T, …]`."""
        return Rotation(*(table[positions].unsqueeze(1) for table in self))


def rotation(patches: int, centre: int, width: int, device: torch.device) -> Rotation:
    """Tables of the positions 0 … `patches` - 1, which count from a series' first real patch.

    At `centre` nothing decays; queries and keys that meet need the same.

    The checkpoint was trained with decays laid out in halves although angles are laid out in pairs: the two do
    not commute, and scores depend on where the counting starts, not on differences of positions alone.
    """
    positions = torch.arange(patches, device=device)
    angles = rotary_angles(positions, width)
    base = (torch.arange(0, width, 2, device=device) + 0.4 * width) / (1.4 * width)
    power = (positions - centre).unsqueeze(-1) / XPOS_BASE
    decay = (base**power).repeat(1, 2).unflatten(-1, (-1, 2))  # [P, W / 2, (even, odd)]
    both = torch.stack((decay, 1 / decay), dim=1).unsqueeze(2)  # [P, 2, 1, W / 2, 2]
    cos, sin = (table[:, None, None, :, None] * both for table in (angles.cos(), angles.sin()))
    return Rotation(*(table[..., place] for place in (0, 1) for table in (cos, sin)))


def rotated(x: Tensor, tables: Rotation) -> Tensor:
    """Queries and keys `[…, 2, N, W]`, even channels before odd ones, turned in float32."""
    even, odd = x.float().chunk(2, dim=-1)
    turned = (
        torch.addcmul(even * tables.cos_even, odd, tables.sin_even, value=-1),
        torch.addcmul(odd * tables.cos_odd, even, tables.sin_odd),
    )
    return torch.cat(turned, dim=-1).to(x.dtype)


class ServedLayer(nn.Module):
    """A Layer whose packed projection is laid out (qkv, heads, head width).

    The channels of time-wise queries and keys stand in halves, even before odd: scores do not see their order.
    """

    qkv: Tensor
    qkv_bias: Tensor

    def __init__(self, layer: Layer, name: str) -> None:
        super().__init__()
        self.name = name  # to adapters
        packed, self.heads = layer.attention.wQKV, layer.attention.heads
        self.spacewise = layer.spacewise
        order = self._order(packed.in_features)
        self.register_buffer("qkv", packed.weight.detach()[order])
        self.register_buffer("qkv_bias", packed.bias.detach()[order])
        self.norm1, self.norm2, self.out = layer.norm1, layer.norm2, layer.attention.wO
        self.up, self.down = cast(nn.Linear, layer.mlp["0"]), cast(nn.Linear, layer.mlp["2"])

    def _order(self, width: int) -> Tensor:
        """Of the outputs of the published projection."""
        order = torch.arange(3 * width).view(3, width // self.heads, self.heads).transpose(1, 2)
        if not self.spacewise:
            halves = torch.cat([torch.arange(0, order.shape[2], 2), torch.arange(1, order.shape[2], 2)])
            order = torch.cat([order[:2, :, halves], order[2:]])
        return order.flatten()

    def fit(self, adapter: Fitting) -> None:
        """Take from an adapter what lies beside this layer."""
        published = f"transformer.{self.name}"
        order = self._order(self.qkv.shape[1])
        adapter.product(f"{self.name}.qkv", self.qkv, [f"{published}.attention.wQKV"], order)
        adapter.product(f"{self.name}.out", self.out.weight, [f"{published}.attention.wO"])
        adapter.product(f"{self.name}.up", self.up.weight, [f"{published}.mlp.0"])
        adapter.product(f"{self.name}.down", self.down.weight, [f"{published}.mlp.2"])

    def project(self, x: Tensor, adapters: Adapters) -> Tensor:
        """Queries, keys and values `[…, 3, N, W]` of `x` `[…, D]`."""
        normed = self.norm1(x)
        packed = adapters.add(f"{self.name}.qkv", normed, F.linear(normed, self.qkv, self.qkv_bias))
        apart: Tensor = packed.unflatten(-1, (3, self.heads, -1))
        return apart

    def along_time(self, x: Tensor, tables: Rotation, adapters: Adapters) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, of `x` `[B, V, P, D]`: `[B * V, N, P, W]` each."""
        projected = self.project(x, adapters)  # [B, V, P, 3, N, W]
        q, k = rotated(projected[:, :, :, :2], tables).permute(3, 0, 1, 4, 2, 5).flatten(1, 2)
        return q, k, projected[:, :, :, 2].flatten(0, 1).transpose(1, 2)

    def across(self, x: Tensor, adapters: Adapters) -> Tensor:
        """The layer over the variates of `x` `[B, V, P, D]`, for every patch (or path) by itself."""
        q, k, v = self.project(x, adapters).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # each [B * P, N, V, W]
        attended = F.scaled_dot_product_attention(q, k, v)
        merged = merge_heads(attended).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
        return self.finish(x, merged, adapters)

    def finish(self, x: Tensor, attended: Tensor, adapters: Adapters) -> Tensor:
        """The rest of the layer after attention `[…, D]`.

        A product adds its bias before or after it rounds, depending on the layout, which can depend on the batch.
        """
        attended = attended.contiguous()
        x = x + adapters.add(f"{self.name}.out", attended, self.out(attended))
        normed = self.norm2(x)
        gate, value = adapters.add(f"{self.name}.up", normed, self.up(normed)).chunk(2, dim=-1)
        inner = swiglu(gate, value)
        return x + adapters.add(f"{self.name}.down", inner, self.down(inner))


class TotoDecoder(nn.Module):
    """A Toto ready to serve.

    `values` `[B, V, P, 64]` are raw, zero where `weights` `[B, 1, P, 64]` is zero (padding on the left). In whatever
    precision the weights are, statistics, rotations and head outputs are float32. `adapters` go beside float32 weights.
    """

    functions: tuple[str, ...] = ("forward", "prefill", "draw", "step")
    repeated: tuple[str, ...] = ("step",)

    head: Tensor
    head_bias: Tensor

    def __init__(self, network: TotoNetwork) -> None:
        super().__init__()
        self.config = network.config
        with torch.no_grad():
            weight, bias = network.composed_head(dtype=torch.float64)
        self.register_buffer("head", weight.flatten(0, 1).float())  # [S * 4K, D]
        self.register_buffer("head_bias", bias.flatten().float())
        del weight  # before the layers take more
        self.patch_embed = network.patch_embed
        layers = cast(list[Layer], list(network.transformer.layers))
        self.layers = nn.ModuleList(ServedLayer(layer, f"layers.{index}") for index, layer in enumerate(layers))
        timewise = [index for index, layer in enumerate(layers) if not layer.spacewise]
        self._timewise = len(timewise)
        self._last_timewise = timewise[-1] if timewise else 0

    # -- the four functions ----------------------------------------------------------------------

    def forward(self, values: Tensor, weights: Tensor, adapters: Adapters = NO_ADAPTERS) -> Projected:
        """What one pass says of the next patch."""
        values, weights = values.flatten(-2), weights.flatten(-2)
        loc, scale, _ = self._scale(values, weights)
        hidden, _ = self._read(values, weights, loc, scale, adapters)
        return Projected(self._head(hidden)[:, :, -1], loc[..., -1], scale[..., -1])

    def prefill(self, values: Tensor, weights: Tensor, adapters: Adapters = NO_ADAPTERS) -> Prefilled:
        """As `forward`, and everything that the paths of each series share."""
        values, weights = values.flatten(-2), weights.flatten(-2)
        loc, scale, reached = self._scale(values, weights)
        hidden, entries = self._read(values, weights, loc, scale, adapters)
        real = self._real(weights)
        mask = torch.where(real, 0.0, -torch.inf).expand(-1, values.shape[1], -1).flatten(0, 1)
        keys, found = (torch.stack(parts) for parts in zip(*entries, strict=True))
        reached = Statistics(*(fact.unsqueeze(-1) for fact in reached))  # an axis for the paths
        ahead = Projected(self._head(hidden)[:, :, -1], loc[..., -1], scale[..., -1])
        return Prefilled(ahead, Prefix(keys, found, mask[:, None, None], real.sum(-1).squeeze(-1).int()), reached)

    def draw(self, ahead: Projected, uniforms: Tensor) -> Patch:
        """One patch of every path; `ahead` has an axis of paths, of length 1 where they do not differ yet.

        `uniforms` `[B, V, S, 64, 2]` in [0, 1): as the reference does, the steps of a patch are drawn independently.
        """
        # ONNX Runtime has no softplus in double; shares of components need double: a small one magnifies their errors.
        df, loc, scale, _ = (parameter.double() for parameter in TotoNetwork.mixture(ahead.outputs))
        logits = ahead.outputs.chunk(4, dim=-1)[-1].double()
        drawn = draw_from(Mixture(df, loc, scale, logits.log_softmax(-1)), uniforms)
        return Patch((drawn * ahead.scale.unsqueeze(-1) + ahead.loc.unsqueeze(-1)).float())

    def step(
        self,
        patch: Patch,
        reached: Statistics,
        prefix: Prefix,
        cache: Cache,
        index: Tensor,
        adapters: Adapters = NO_ADAPTERS,
    ) -> Stepped:
        """Advance every path over its drawn patch, which is number `index` after the context.

        Cache slots from `index` on are not yet written.
        """
        loc, scale, reached = extend(reached, patch.values)
        x = self._embed(patch.values, loc, scale, adapters)  # [B, V, S, D]
        drawn, series = cache.keys.shape[4], prefix.keys
        tables = rotation(series.shape[3] + drawn + 1, series.shape[3] // 2, series.shape[4], x.device)
        tables = tables.at((prefix.patches.long() + index).unsqueeze(-1))
        unwritten = torch.where(torch.arange(drawn, device=x.device) < index, 0.0, -torch.inf)
        entries: list[tuple[Tensor, Tensor]] = []
        for layer in self._layers():
            if layer.spacewise:
                x = layer.across(x, adapters)
                continue
            q, k, v = (
                part.transpose(1, 2).unsqueeze(3) for part in layer.along_time(x, tables, adapters)
            )  # [B * V, S, N, 1, W]
            place = len(entries)
            own = [(cache.keys[place], cache.values[place], unwritten), (k, v, None)]
            attended = branched_attention(q, (prefix.keys[place], prefix.values[place], prefix.mask), own)
            x = layer.finish(x, merge_heads(attended).squeeze(2).unflatten(0, x.shape[:2]), adapters)
            entries.append((k, v))
        keys, found = (torch.stack(parts) for parts in zip(*entries, strict=True))
        return Stepped(Projected(self._head(x), loc, scale), reached, Cache(keys, found))

    # -- for runtimes ----------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.head.device

    def examples(self, size: int) -> Mapping[str, tuple[Any, ...]]:
        """Arguments of the four functions, for runtimes that are traced."""
        B, P, S, slots = ((3, 8, 4, 2), (2, 12, 8, 3))[size]
        patch = self.config.patch_size
        values = torch.arange(B * VARIATES * P * patch, device=self.device).float().sin().view(B, VARIATES, P, patch)
        context = (values, torch.ones(B, 1, P, patch, device=self.device))
        with torch.no_grad():
            ahead, prefix, reached = self.prefill(*context)
            apart = Projected(*(part.unsqueeze(2).repeat_interleave(S, dim=2) for part in ahead))
            uniforms = torch.full((B, VARIATES, S, patch, 2), 0.5, dtype=torch.float64, device=self.device)
            drawn = self.draw(apart, uniforms)
        reached = Statistics(*(fact.repeat_interleave(S, dim=-1) for fact in reached))
        step = (drawn, reached, prefix, Cache.empty(prefix, S, slots), torch.tensor(0, device=self.device))
        return {"forward": context, "prefill": context, "draw": (apart, uniforms), "step": step}

    def reduced(self, dtype: torch.dtype) -> "TotoDecoder":
        """A copy whose weights are of `dtype`; ValueError for int8."""
        if dtype == torch.int8:
            raise ValueError("Toto reads its weights once per pass: int8 gains nothing, use bfloat16")
        return copied_to(self, dtype)

    def fitted(self, matrices: Matrices) -> Adapter:
        """An adapter as this network is served; WeightsMismatch if it is of another network."""
        adapter = Fitting(matrices, self.device)
        adapter.product("patch_embed", self.patch_embed.projection.weight, ["patch_embed.projection"])
        for layer in self._layers():
            layer.fit(adapter)
        return adapter.done()

    @property
    def patch_bytes(self) -> int:
        """Memory that a drawn patch of one variate takes: its keys and values, and its head outputs."""
        return 4 * (2 * self._timewise * self.config.embed_dim + len(self.head))

    # -- private ---------------------------------------------------------------------------------

    def _layers(self) -> list[ServedLayer]:
        return cast(list[ServedLayer], list(self.layers))

    def _scale(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Statistics]:
        return causal_patch_scale(values, weights, self.config.patch_size, self.config.scale_exponent)

    def _embed(self, values: Tensor, loc: Tensor, scale: Tensor, adapters: Adapters) -> Tensor:
        """Patches `[…, 64]` standardised and embedded."""
        scaled = ((values - loc.unsqueeze(-1)) / scale.unsqueeze(-1)).to(self.head.dtype)
        return adapters.add("patch_embed", scaled, self.patch_embed(scaled))

    def _head(self, hidden: Tensor) -> Tensor:
        projected: Tensor = F.linear(hidden, self.head, self.head_bias).float()
        steps: Tensor = projected.unflatten(-1, (self.config.patch_size, -1))
        return steps

    def _read(
        self, values: Tensor, weights: Tensor, loc: Tensor, scale: Tensor, adapters: Adapters
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Hidden states `[B, V, TAIL, D]` of the last patches, keys and values of every time-wise layer.

        Layers after the last time-wise one see no other patch, so earlier ones are dropped there.
        Patches without a single real candle are masked out of attention.
        """
        x = self._embed(values.unflatten(-1, (-1, self.config.patch_size)), loc, scale, adapters)
        patches, real = x.shape[2], self._real(weights)
        mask = self._mask(real).to(x.dtype).expand(-1, x.shape[1], -1, -1).flatten(0, 1).unsqueeze(1)
        tables = rotation(patches, patches // 2, self.config.embed_dim // self.config.num_heads, x.device)
        tables = tables.at((real.squeeze(1).cumsum(-1) - 1).clamp_min(0))
        entries: list[tuple[Tensor, Tensor]] = []
        for index, layer in enumerate(self._layers()):
            kept = patches if index < self._last_timewise else TAIL
            if layer.spacewise:
                x = layer.across(x[:, :, -kept:], adapters)
                continue
            q, k, v = layer.along_time(x, tables, adapters)
            attended = F.scaled_dot_product_attention(q[:, :, -kept:], k, v, attn_mask=mask[:, :, -kept:])
            x = layer.finish(x[:, :, -kept:], merge_heads(attended).unflatten(0, x.shape[:2]), adapters)
            entries.append((k, v))
        return x, entries

    def _real(self, weights: Tensor) -> Tensor:
        """Which patches `[B, 1, P]` hold a candle."""
        real: Tensor = weights.unflatten(-1, (-1, self.config.patch_size)).amax(-1) > 0
        return real

    def _mask(self, real: Tensor) -> Tensor:
        """What is added to scores, `[B, 1, P, P]`: earlier patches with candles are seen, and oneself: no 0 / 0."""
        itself = torch.eye(real.shape[-1], dtype=torch.bool, device=real.device)
        causal = torch.ones_like(itself).tril()
        return torch.where((causal & real.unsqueeze(-2)) | itself, 0.0, -torch.inf)


def draw_from(mixture: Mixture, uniforms: Tensor) -> Tensor:
    """One value of every mixture `[…, K]` from `uniforms` `[…, 2]` in [0, 1).

    The first uniform chooses a component; how far into its share it lies is again uniform. With that and the
    second, Bailey's (1994) closed form of Box and Muller's method draws from Student-T.
    """
    weights = mixture.log_weights.exp()
    reached, u = weights.cumsum(-1), uniforms[..., :1]
    chosen = (reached <= u).sum(-1, keepdim=True).clamp_max(weights.shape[-1] - 1)
    shape = (*torch.broadcast_shapes(weights.shape[:-1], uniforms.shape[:-1]), weights.shape[-1])

    def of_chosen(parameter: Tensor) -> Tensor:
        return parameter.expand(shape).gather(-1, chosen).squeeze(-1)

    df, loc, scale, weight, end = (of_chosen(p) for p in (*mixture[:3], weights, reached))
    left = ((end - uniforms[..., 0]) / weight).clamp(2.0**-53, 1.0)
    radius = (df * torch.expm1(-2 / df * left.log())).sqrt()
    return loc + scale * radius * torch.cos(2 * math.pi * uniforms[..., 1])
