"""Kronos' tokenizer as it is trained: candles to token pairs and back."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.candles import CLOSE
from models.configs import check_fields, check_heads
from models.kronos.network import Block, known_keys
from models.kronos.quantizer import pack_bits, quantize, unpack_bits


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer's architecture, from its `config.json`; `n` layers build n - 1 blocks a side."""

    d_in: int
    d_model: int
    n_heads: int
    ff_dim: int
    n_enc_layers: int
    n_dec_layers: int
    s1_bits: int
    s2_bits: int
    beta: float
    gamma0: float
    gamma: float
    zeta: float
    group_size: int

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> "TokenizerConfig":
        """Read the published layout; ValueError names unknown or missing keys."""
        found = cls(**known_keys(cls, config, "Kronos tokenizer"))
        check_fields(found, "Kronos tokenizer")
        check_heads(found.d_model, found.n_heads, "Kronos tokenizer")
        return found


class KronosTokenizer(nn.Module):
    """Causal encoder, sign quantiser, causal decoder; published parameter names."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        width, bits = config.d_model, config.s1_bits + config.s2_bits
        self.embed = nn.Linear(config.d_in, width)
        self.head = nn.Linear(width, config.d_in)
        self.encoder = nn.ModuleList(
            Block(width, config.n_heads, config.ff_dim) for _ in range(config.n_enc_layers - 1)
        )
        self.decoder = nn.ModuleList(
            Block(width, config.n_heads, config.ff_dim) for _ in range(config.n_dec_layers - 1)
        )
        self.quant_embed = nn.Linear(width, bits)
        self.post_quant_embed_pre = nn.Linear(config.s1_bits, width)
        self.post_quant_embed = nn.Linear(bits, width)

    def latent(self, x: Tensor) -> Tensor:
        """Encoder output `[B, T, bits]` of normalised candles `[B, T, 6]`."""
        z = self.embed(x)
        for block in self.encoder:
            z = block(z)
        out: Tensor = self.quant_embed(z)
        return out

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Coarse and fine tokens `[B, T]` of normalised candles `[B, T, 6]`."""
        z = self.latent(x)
        coarse, fine = z.split((self.config.s1_bits, self.config.s2_bits), dim=-1)
        return pack_bits(coarse), pack_bits(fine)

    def decode(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Normalised candles `[B, T, 6]` of tokens `[B, T]`."""
        return self._decode(self.post_quant_embed(code_of(coarse, fine, self.config)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructions of `[B, T, 6]` from the coarse bits and from all bits, and the latent `[B, T, bits]`."""
        z = self.latent(x)
        code = quantize(z)
        from_coarse = self._decode(self.post_quant_embed_pre(code[..., : self.config.s1_bits]))
        return from_coarse, self._decode(self.post_quant_embed(code)), z

    @torch.no_grad()
    def close_orders(self) -> tuple[Tensor, Tensor]:
        """All coarse tokens `[2^s1]` and all fine tokens `[2^s2]`, by the close that each decodes to, rising.

        A token is decoded alone, as a sequence of one, with the mean code of the other half: its components are
        +-1, so the mean over all tokens is zero. In double precision on the CPU, or neighbours whose closes agree
        in float32 would change places between machines.
        """
        exact = copy.deepcopy(self).cpu().double()
        width, scale = self.config.s1_bits, (self.config.s1_bits + self.config.s2_bits) ** -0.5
        orders = []
        for bits, sides in ((width, (0, self.config.s2_bits)), (self.config.s2_bits, (width, 0))):
            code = F.pad(unpack_bits(torch.arange(2**bits), bits).double() * scale, sides)
            closes = exact._decode(exact.post_quant_embed(code).unsqueeze(1))[:, 0, CLOSE]
            orders.append(closes.argsort(stable=True))
        return orders[0], orders[1]

    def _decode(self, z: Tensor) -> Tensor:
        for block in self.decoder:
            z = block(z)
        out: Tensor = self.head(z)
        return out


def code_of(coarse: Tensor, fine: Tensor, config: TokenizerConfig) -> Tensor:
    """The quantised vector `[..., bits]` that a token pair stands for."""
    bits = config.s1_bits + config.s2_bits
    parts = (unpack_bits(coarse, config.s1_bits), unpack_bits(fine, config.s2_bits))
    code: Tensor = torch.cat(parts, dim=-1) * bits**-0.5
    return code
