"""Kronos' predictor as it is trained: published parameter names, full causal forward
(Shi et al. 2025, arXiv 2508.02739).

Axes: B batch, T time, D width, N heads. A token is a pair: coarse (the checkpoint's s1) and fine (s2).
Serving runs the fused form of the same weights, models/kronos/decoder.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.configs import check_fields, check_heads, shown
from models.layers import RMSNorm, merge_heads, rotary_angles, split_heads, swiglu

NORM_EPS = 1e-5
DEPENDENCY_HEADS = 4
TIME_FIELDS = {"minute": 60, "hour": 24, "weekday": 7, "day": 32, "month": 13}
_IGNORED = {"ffn_dropout_p", "attn_dropout_p", "resid_dropout_p", "token_dropout_p"}  # zero when serving


@dataclass(frozen=True)
class PredictorConfig:
    """The predictor's architecture, from `config.json`."""

    s1_bits: int
    s2_bits: int
    n_layers: int
    d_model: int
    n_heads: int
    ff_dim: int
    learn_te: bool

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> "PredictorConfig":
        """Read the published layout; ValueError names unknown or missing keys."""
        found = cls(**known_keys(cls, config, "Kronos predictor"))
        check_fields(found, "Kronos predictor")
        for heads in (found.n_heads, DEPENDENCY_HEADS):
            check_heads(found.d_model, heads, "Kronos predictor")
        return found


def known_keys(cls: type, config: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The keys of `config` that the dataclass `cls` has; ValueError if others or too few are there."""
    names = {field.name for field in fields(cls)}
    unknown, missing = set(config) - names - _IGNORED, names - set(config)
    if unknown or missing:
        keys = f"unknown keys {shown(sorted(unknown))}, missing keys {sorted(missing)}"
        raise ValueError(f"{what} config: {keys}")
    return {name: config[name] for name in names}


class SelfAttention(nn.Module):
    """Projections of rotary multi-head attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: "Rotary | None") -> Tensor:
        return self.attend(x, x, rotary)

    def attend(self, queries: Tensor, context: Tensor, rotary: "Rotary | None") -> Tensor:
        """Causal attention of `queries` `[B, T, D]` over `context` `[B, T, D]`."""
        if context.shape[1] == 1:  # whatever it asks, it sees itself
            alone: Tensor = self.out_proj(self.v_proj(context))
            return alone
        q = split_heads(self.q_proj(queries), self.heads)
        k = split_heads(self.k_proj(context), self.heads)
        v = split_heads(self.v_proj(context), self.heads)
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        out: Tensor = self.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        return out


class Rotary:
    """Rotary embedding at `positions` `[T]` or `[B, T]`, laid out in halves."""

    def __init__(self, positions: Tensor, head_width: int) -> None:
        angles = rotary_angles(positions, head_width).repeat(*[1] * positions.ndim, 2)
        if positions.ndim == 2:
            angles = angles.unsqueeze(1)  # [B, 1, T, D/N] beside the heads
        self.cos, self.sin = angles.cos(), angles.sin()

    def __call__(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin


class FeedForward(nn.Module):
    """SwiGLU without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(swiglu(self.w1(x), self.w3(x)))
        return out


class Block(nn.Module):
    """Pre-norm causal attention and feed-forward; the tokenizer is built of the same blocks."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width, NORM_EPS)
        self.self_attn = SelfAttention(width, heads)
        self.norm2 = RMSNorm(width, NORM_EPS)
        self.ffn = FeedForward(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        rotary = Rotary(torch.arange(x.shape[1], device=x.device), x.shape[2] // self.self_attn.heads)
        x = x + self.self_attn(self.norm1(x), rotary)
        out: Tensor = x + self.ffn(self.norm2(x))
        return out


class TokenEmbedding(nn.Module):
    """Two tables and the projection that fuses them."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.emb_s1 = nn.Embedding(2**config.s1_bits, config.d_model)
        self.emb_s2 = nn.Embedding(2**config.s2_bits, config.d_model)
        self.fusion_proj = nn.Linear(2 * config.d_model, config.d_model)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        pair = torch.cat((self.emb_s1(coarse), self.emb_s2(fine)), dim=-1)
        fused: Tensor = self.fusion_proj(pair * math.sqrt(self.emb_s1.embedding_dim))
        return fused


class FixedTable(nn.Module):
    """A sinusoidal table under the published name `emb`, for configs with `learn_te` false."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(size, width)
        angles = torch.arange(size).unsqueeze(1) * torch.exp(torch.arange(0, width, 2) * -(math.log(10_000) / width))
        with torch.no_grad():
            self.emb.weight[:, 0::2], self.emb.weight[:, 1::2] = angles.sin(), angles.cos()
        self.emb.weight.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        return self.emb.weight


class TimeEmbedding(nn.Module):
    """Sum of one embedding per calendar feature, in the order of `TIME_FIELDS`."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        for name, size in TIME_FIELDS.items():
            table = nn.Embedding(size, config.d_model) if config.learn_te else FixedTable(size, config.d_model)
            self.add_module(f"{name}_embed", table)

    def forward(self, stamps: Tensor) -> Tensor:
        """`[..., 5]` integer features to `[..., D]`."""
        tables = (self.get_submodule(f"{name}_embed").weight for name in TIME_FIELDS)
        parts = [F.embedding(stamps[..., i], table) for i, table in enumerate(tables)]  # type: ignore[arg-type]
        return torch.stack(parts).sum(0)


class DependencyLayer(nn.Module):
    """Looks up the context with the coarse token just drawn, to condition the fine one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cross_attn = SelfAttention(width, DEPENDENCY_HEADS)
        self.norm = RMSNorm(width, NORM_EPS)

    def forward(self, hidden: Tensor, sibling: Tensor) -> Tensor:
        """`hidden` and `sibling` `[B, T, D]`: position t asks with its coarse target over positions <= t.

        Without rotary embedding: decoding asks with a single query, whose rotary angle upstream is zero, so
        this is the function that is served; upstream's training rotates and then serves something else.
        """
        out: Tensor = self.norm(hidden + self.cross_attn.attend(sibling, hidden, None))
        return out


class DualHead(nn.Module):
    """Logits of coarse and of fine tokens."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.proj_s1 = nn.Linear(config.d_model, 2**config.s1_bits)
        self.proj_s2 = nn.Linear(config.d_model, 2**config.s2_bits)


class KronosPredictor(nn.Module):
    """Next-token model over token pairs and calendar features."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config)
        self.time_emb = TimeEmbedding(config)
        self.transformer = nn.ModuleList(
            Block(config.d_model, config.n_heads, config.ff_dim) for _ in range(config.n_layers)
        )
        self.norm = RMSNorm(config.d_model, NORM_EPS)
        self.dep_layer = DependencyLayer(config.d_model)
        self.head = DualHead(config)

    def forward(self, coarse: Tensor, fine: Tensor, stamps: Tensor, next_coarse: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher-forced logits of the next coarse and fine tokens, `[B, T, 2^bits]` each.

        `coarse`, `fine`, `next_coarse` are `[B, T]` token indices, `stamps` `[B, T, 5]` calendar features.
        """
        hidden = self.hidden(coarse, fine, stamps)
        return self.head.proj_s1(hidden), self.fine(hidden, next_coarse)

    def hidden(self, coarse: Tensor, fine: Tensor, stamps: Tensor) -> Tensor:
        """`[B, T, D]`, which the coarse logits are a linear map of."""
        x = self.embedding(coarse, fine) + self.time_emb(stamps)
        for block in self.transformer:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def fine(self, hidden: Tensor, next_coarse: Tensor) -> Tensor:
        """Logits of the next fine tokens, given the next coarse ones."""
        logits: Tensor = self.head.proj_s2(self.dep_layer(hidden, self.embedding.emb_s1(next_coarse)))
        return logits
