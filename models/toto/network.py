"""Toto 1.0 as it is trained: patch embedding, time-wise and variate-wise attention, a Student-T mixture head.

Module names are those of the published checkpoint (Cohen et al. 2025, arXiv 2505.14766).
Axes: B batch, V variates, T time, P patches, D width, N heads, K mixture components, S steps of one patch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.configs import check_fields, check_heads, finite_number, shown, whole_number
from models.layers import RMSNorm, merge_heads, rotary_angles, swiglu
from models.toto.scaler import causal_patch_scale

_SCALER = "<class 'model.scaler.CausalPatchStdMeanScaler'>"
_MIXTURE = "<class 'model.distribution.MixtureOfStudentTsOutput'>"
_IGNORED = {"dropout", "use_memory_efficient_attention", "pre_xformers_checkpoint"}  # no effect on the numbers
XPOS_BASE = 512


@dataclass(frozen=True)
class TotoConfig:
    """The architecture, from `config.json`."""

    patch_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_hidden_dim: int
    spacewise_every_n_layers: int | Literal[-1]
    spacewise_first: bool
    components: int
    scale_exponent: float | None

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> "TotoConfig":
        """Read the published layout; ValueError names what this implementation does not know."""
        known = dict(config)
        scale_exponent: float | None = finite_number(
            known.pop("scale_factor_exponent", 10.0), "Toto config: scale_factor_exponent"
        )
        if not known.pop("stabilize_with_global", True):
            scale_exponent = None
        for key, expected in (("scaler_cls", _SCALER), ("output_distribution_classes", [_MIXTURE])):
            if (found := known.pop(key)) != expected:
                raise ValueError(f"Toto config: {key} {shown(found)} is not supported, only {expected!r}")
        if known.pop("stride") != known["patch_size"]:
            raise ValueError("Toto config: stride must equal patch_size")
        components = (known.pop("output_distribution_kwargs") or {})["k_components"]
        unknown = set(known) - {f.name for f in fields(cls)} - _IGNORED
        if unknown:
            raise ValueError(f"Toto config: unknown keys {shown(sorted(unknown))}")
        rest = {key: value for key, value in known.items() if key not in _IGNORED}
        network = cls(**rest, components=components, scale_exponent=scale_exponent)
        check_fields(network, "Toto")
        check_heads(network.embed_dim, network.num_heads, "Toto")
        if (every := network.spacewise_every_n_layers) != -1:
            whole_number(every, "Toto config: spacewise_every_n_layers")
        return network

    def is_spacewise(self, layer: int) -> bool:
        """Whether a layer attends across variates instead of time."""
        every = self.spacewise_every_n_layers
        if every == -1:
            return False
        return layer % every == (0 if self.spacewise_first else every - 1)


class Mixture(NamedTuple):
    """Student-T mixture parameters, each `[..., K]`: degrees of freedom, location, scale, log-weights."""

    df: Tensor
    loc: Tensor
    scale: Tensor
    log_weights: Tensor


class ScaledNorm(RMSNorm):
    """RMSNorm whose weight the checkpoint calls `scale`."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-8)
        self.scale = self.weight
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.scale.dtype), self.scale.shape, self.scale, self.eps)


class Attention(nn.Module):
    """Multi-head attention along the last-but-one axis; `wQKV` is packed (qkv, head width, heads)."""

    def __init__(self, config: TotoConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.wQKV = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.wO = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, rotary: "Rotary | None") -> Tensor:
        """`x` `[B, T, D]` to `[B, T, D]`: with rotary embedding causal, without it of all positions to all."""
        packed = self.wQKV(x).unflatten(-1, (3, -1, self.heads)).permute(2, 0, 4, 1, 3)
        q, k, v = packed.contiguous()  # each [B, N, T, D/N]; fused attention needs the last axis in one piece
        if rotary is not None:
            q, k = rotary(q, 1.0), rotary(k, -1.0)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=rotary is not None)
        projected: Tensor = self.wO(merge_heads(out))
        return projected


class Rotary:
    """Rotary embedding with xpos decay (Sun et al. 2022, arXiv 2212.10554) at positions 0 … P - 1."""

    def __init__(self, patches: int, width: int, device: torch.device) -> None:
        positions = torch.arange(patches, device=device)
        angles = rotary_angles(positions, width).repeat_interleave(2, dim=-1)
        self.cos, self.sin = angles.cos(), angles.sin()  # [P, D/N]
        base = (torch.arange(0, width, 2, device=device) + 0.4 * width) / (1.4 * width)
        power = (positions - patches // 2).unsqueeze(-1) / XPOS_BASE
        # The checkpoint was trained with decays laid out in halves although angles are laid out in pairs.
        self.decay = (base**power).repeat(1, 2)

    def __call__(self, x: Tensor, sign: float) -> Tensor:
        """Rotate `[B, N, P, D/N]`; queries grow by the decay (sign 1), keys shrink by it (sign -1)."""
        odd = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        decay = self.decay if sign > 0 else 1 / self.decay
        return (x * self.cos + odd * self.sin) * decay


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU; time-wise layers attend over patches, space-wise ones over variates."""

    def __init__(self, config: TotoConfig, spacewise: bool) -> None:
        super().__init__()
        self.spacewise = spacewise
        self.norm1 = ScaledNorm(config.embed_dim)
        self.norm2 = ScaledNorm(config.embed_dim)
        self.attention = Attention(config)
        self.mlp = nn.ModuleDict(
            {
                "0": nn.Linear(config.embed_dim, 2 * config.mlp_hidden_dim),
                "2": nn.Linear(config.mlp_hidden_dim, config.embed_dim),
            }
        )

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """`x` `[B, V, P, D]` to the same."""
        normed = self.norm1(x)
        if self.spacewise:
            across = normed.transpose(1, 2).flatten(0, 1)  # [B * P, V, D]
            attended = self.attention(across, None)
            attended = attended.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
        else:
            attended = self.attention(normed.flatten(0, 1), rotary).unflatten(0, x.shape[:2])
        x = x + attended
        gate, value = self.mlp["0"](self.norm2(x)).chunk(2, dim=-1)
        out: Tensor = x + self.mlp["2"](swiglu(gate, value))
        return out


class MixtureHead(nn.Module):
    """The four projections of the Student-T mixture."""

    def __init__(self, width: int, components: int) -> None:
        super().__init__()
        self.df = nn.Linear(width, components)
        self.loc_proj = nn.Linear(width, components)
        self.scale_proj = nn.Linear(width, components)
        self.mixture_weights = nn.Linear(width, components)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """All four as one matrix `[4K, D]` and bias `[4K]`."""
        parts = (self.df, self.loc_proj, self.scale_proj, self.mixture_weights)
        return torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])


class PatchEmbedding(nn.Module):
    """One linear map of a patch."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(patch, width)

    def forward(self, patches: Tensor) -> Tensor:
        embedded: Tensor = self.projection(patches)
        return embedded


class Transformer(nn.Module):
    """The stack of layers."""

    def __init__(self, config: TotoConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, config.is_spacewise(i)) for i in range(config.num_layers))


class TotoNetwork(nn.Module):
    """The backbone of Toto with its published parameter names."""

    def __init__(self, config: TotoConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config.patch_size, config.embed_dim)
        self.transformer = Transformer(config)
        self.unembed = nn.Linear(config.embed_dim, config.embed_dim * config.patch_size)
        self.output_distribution = MixtureHead(config.embed_dim, config.components)

    def scale(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale per patch, `[B, V, P]` each, of windows `[B, V, T]` without padding."""
        weights = torch.ones_like(values[:, :1])
        return causal_patch_scale(values, weights, self.config.patch_size, self.config.scale_exponent)[:2]

    def embed(self, values: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """Hidden states `[B, V, P, D]` of windows `[B, V, T]` without padding."""
        patches = values.unflatten(-1, (-1, self.config.patch_size))
        x: Tensor = self.patch_embed((patches - loc.unsqueeze(-1)) / scale.unsqueeze(-1))
        rotary = Rotary(patches.shape[2], self.config.embed_dim // self.config.num_heads, values.device)
        for layer in self.transformer.layers:
            x = layer(x, rotary)
        return x

    def composed_head(
        self, steps: slice | Tensor = slice(None), dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Unembedding and mixture head as one map `[S, 4K, D]` and bias `[S, 4K]`, both being linear; of some steps.

        A few at a time: the unembedding is a quarter of all weights, and is never converted whole.
        """
        S, D = self.config.patch_size, self.config.embed_dim
        head, bias = (part.to(dtype) for part in self.output_distribution.stacked())
        unembed = self.unembed.weight.view(S, D, D)[steps]
        weight = torch.cat([head @ some.to(dtype) for some in unembed.split(4)])
        return weight, self.unembed.bias.view(S, D)[steps].to(dtype) @ head.T + bias

    @staticmethod
    def mixture(projected: Tensor) -> Mixture:
        """Mixture parameters of head outputs `[..., 4K]`."""
        df, loc, scale, logits = projected.chunk(4, dim=-1)
        tiny = torch.finfo(projected.dtype).eps
        return Mixture(
            2 + F.softplus(df).clamp_min(tiny), loc, F.softplus(scale).clamp_min(tiny), logits.log_softmax(-1)
        )
