"""How a miniature starts: at the random walk, with the bits of its tokens. It then needs a minute, not a day."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kronos.network import Block, KronosPredictor
from models.kronos.quantizer import unpack_bits
from models.toto.network import Layer, TotoNetwork


def start_at_random_walk(network: TotoNetwork, first_scale: float = 0.1) -> None:
    """Initialise so that the forecast is a driftless walk whose spread grows with the root of the step.

    Width 0 of the residual stream carries the last value of the patch and is all the location sees; width 1 of
    the unembedding carries the scale; residual branches start at zero. `first_scale` is the one-step spread in
    the units of the scaler. The other widths see the changes inside the patch, in such spreads, beside a constant in
    width 1: volatility is then two layers away, where levels would drown it.
    """
    config = network.config
    patch = config.patch_size
    with torch.no_grad():
        for layer in _layers(network):
            for output in _outputs(layer):
                output.weight.zero_()
                output.bias.zero_()
        embedding, head = network.patch_embed.projection, network.output_distribution
        changes = F.pad(embedding.weight[:, 1:], (1, 1)) / first_scale  # none before the first, nor after the last
        embedding.weight.copy_(changes[:, :-1] - changes[:, 1:])
        embedding.weight[1].zero_()
        embedding.bias[1] = config.embed_dim**0.5  # alone it would have the root mean square 1
        embedding.weight[0].zero_()
        embedding.weight[0, -1] = 1
        embedding.bias[0] = 0
        unembed, bias = network.unembed.weight.view(patch, config.embed_dim, -1), network.unembed.bias.view(patch, -1)
        unembed[..., 1] = 0
        unembed[:, 0].zero_()
        unembed[:, 0, 0] = 1
        bias[:, 0] = 0
        head.loc_proj.weight.zero_()
        head.loc_proj.weight[:, 0] = 1
        head.loc_proj.bias.zero_()
        spread = first_scale * torch.arange(1, patch + 1).sqrt()
        unembed[:, 1].mul_(0.1)
        bias[:, 1] = torch.expm1(spread).log()  # softplus^-1
        head.scale_proj.weight.mul_(0.5)
        head.scale_proj.weight[:, 1] = 1
        head.scale_proj.weight[:, 0] = 0
        head.scale_proj.bias.copy_(torch.linspace(-0.5, 0.5, config.components))
        head.df.bias.fill_(2.0)


def frozen_location(network: TotoNetwork) -> list[tuple[Tensor, Tensor]]:
    """Parameters and masks of the path that carries the last value to the location: it stays as initialised."""
    config = network.config
    parts: list[tuple[Tensor, int | slice]] = []
    for layer in _layers(network):
        for output in _outputs(layer):
            parts += [(output.weight, 0), (output.bias, 0)]
    embedding, head = network.patch_embed.projection, network.output_distribution
    parts += [(embedding.weight, 0), (embedding.bias, 0)]
    parts += [(head.loc_proj.weight, slice(None)), (head.loc_proj.bias, slice(None))]
    rows = slice(0, None, config.embed_dim)  # row 0 of every step
    parts += [(network.unembed.weight, rows), (network.unembed.bias, rows)]
    masks = []
    for parameter, index in parts:
        mask = torch.zeros_like(parameter, dtype=torch.bool)
        mask[index] = True
        masks.append((parameter, mask))
    return masks


def _layers(network: TotoNetwork) -> list[Layer]:
    return cast(list[Layer], list(network.transformer.layers))


def _outputs(layer: Layer) -> tuple[nn.Linear, nn.Linear]:
    """The two maps that write into the residual stream."""
    return layer.attention.wO, cast(nn.Linear, layer.mlp["2"])


def start_with_bits(predictor: KronosPredictor, scale: float = 0.5) -> None:
    """Start at a random walk over tokens: the present one is the likeliest next, then those that share most bits.

    The bits of both tokens pass through to their heads; all else starts small.
    """
    config, embedding, fusion = predictor.config, predictor.embedding, predictor.embedding.fusion_proj
    halves = (
        (embedding.emb_s1, predictor.head.proj_s1, config.s1_bits),
        (embedding.emb_s2, predictor.head.proj_s2, config.s2_bits),
    )
    with torch.no_grad():
        fusion.bias.zero_()
        fusion.weight[: config.s1_bits + config.s2_bits].zero_()
        tables = [weight for table, head, _ in halves for weight in (table.weight, head.weight)]
        for parameter in (*tables, *predictor.time_emb.parameters(), predictor.dep_layer.cross_attn.out_proj.weight):
            parameter.mul_(0.1)
        first = 0
        for index, (table, head, bits) in enumerate(halves):
            places = torch.arange(first, first + bits)
            codes = unpack_bits(torch.arange(2**bits), bits) * scale
            table.weight[:, places] = codes
            head.weight[:, places] = codes
            fusion.weight[places, index * config.d_model + places] = 1 / (scale * config.d_model**0.5)
            first += bits
    damp_residuals(predictor.transformer, 0.1)


def damp_residuals(blocks: nn.ModuleList, factor: float) -> None:
    """Scale what every block adds to its input."""
    with torch.no_grad():
        for block in cast(list[Block], list(blocks)):
            block.self_attn.out_proj.weight.mul_(factor)
            block.ffn.w2.weight.mul_(factor)
