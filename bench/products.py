"""The matrix products that a forecast cannot do without, as plain lists of shapes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from models.kronos.network import DEPENDENCY_HEADS

VARIATES: Final = 5
TAIL: Final = 4  # patches of a Toto forecast that are computed to the end


@dataclass(frozen=True)
class Product:
    """`[rows, inner] x [inner, columns]`, `batch` of them in one call, `count` calls with operands of their own."""

    rows: int
    inner: int
    columns: int
    count: int = 1
    batch: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns * self.count * self.batch

    @property
    def operand_elements(self) -> int:
        """Elements of all right-hand sides: weights, or keys and values."""
        return self.inner * self.columns * self.count * self.batch


@dataclass(frozen=True)
class Stage:
    """Products in order, all of them `repeats` times over the same operands."""

    products: Sequence[Product]
    repeats: int = 1

    @property
    def flops(self) -> int:
        return self.repeats * sum(product.flops for product in self.products)

    @property
    def operand_elements(self) -> int:
        """Elements read of weights, keys and values."""
        return self.repeats * sum(product.operand_elements for product in self.products)


def kronos_stages(
    config: Mapping[str, Any], *, symbols: int, paths: int, context: int, slots: int, steps: int
) -> list[Stage]:
    """Tokenise and prefill `symbols` contexts, draw `steps` tokens for each of their paths, decode all `slots`."""
    tokenizer, predictor = config["tokenizer"], config["predictor"]
    small, width = tokenizer["d_model"], predictor["d_model"]
    bits, vocabulary = tokenizer["s1_bits"] + tokenizer["s2_bits"], 2 ** predictor["s1_bits"]
    given, drawn = symbols * context, symbols * paths
    encoder = (small, tokenizer["ff_dim"], tokenizer["n_enc_layers"] - 1)
    decoder = (small, tokenizer["ff_dim"], tokenizer["n_dec_layers"] - 1)
    blocks = (width, predictor["ff_dim"], predictor["n_layers"])
    heads, head = tokenizer["n_heads"], small // tokenizer["n_heads"]
    return [
        Stage(
            [
                Product(given, tokenizer["d_in"], small),
                *_block(given, *encoder),
                *_attention(symbols * heads, context, context, head, encoder[2]),
                Product(given, small, bits),
            ]
        ),
        Stage(
            [
                *_block(given, *blocks),
                *_attention(symbols * predictor["n_heads"], context, context, width // predictor["n_heads"], blocks[2]),
                Product(given, width, 2 * width),
            ]
        ),
        Stage(_draw(symbols, paths, context, slots, width, vocabulary), steps),
        Stage(_advance(symbols, paths, context, slots, blocks, predictor["n_heads"]), steps - 1),
        Stage(
            [
                Product(given, bits, small),
                *_block(given, *decoder),
                *_attention(symbols * heads, context, context, head, decoder[2]),
                Product(drawn * slots, bits, small),
                *_block(drawn * slots, *decoder),
                *_attention(symbols * heads, paths * slots, context, head, decoder[2]),
                *_attention(drawn * heads, slots, slots, head, decoder[2]),
                Product(drawn * slots, small, tokenizer["d_in"]),
            ]
        ),
    ]


def toto_stages(config: Mapping[str, Any], *, symbols: int, patches: int) -> list[Stage]:
    """One pass over `patches` patches of five variates; what follows the last time-wise layer sees the tail only."""
    width, heads, hidden = config["embed_dim"], config["num_heads"], config["mlp_hidden_dim"]
    layers, every = config["num_layers"], config["spacewise_every_n_layers"]
    space = [layer for layer in range(layers) if layer % every == (0 if config["spacewise_first"] else every - 1)]
    last = max(layer for layer in range(layers) if layer not in space)
    before = [layer for layer in space if layer < last]
    series, head = symbols * VARIATES, width // heads
    full, tail = series * patches, series * TAIL
    outputs = config["patch_size"] * 4 * config["output_distribution_kwargs"]["k_components"]
    return [
        Stage(
            [
                Product(full, config["patch_size"], width),
                *_block(full, width, hidden, last),
                *_attention(series * heads, patches, patches, head, last - len(before)),
                *_attention(symbols * patches * heads, VARIATES, VARIATES, head, len(before)),
                Product(full, width, 2 * width),  # keys and values of the last time-wise layer
                Product(tail, width, width),
                *_attention(series * heads, TAIL, patches, head, 1),
                *_block(tail, width, hidden, 1)[1:],
                *_block(tail, width, hidden, layers - 1 - last),
                *_attention(symbols * TAIL * heads, VARIATES, VARIATES, head, layers - 1 - last),
                Product(tail, width, outputs),
            ]
        )
    ]


def _draw(symbols: int, paths: int, context: int, slots: int, width: int, vocabulary: int) -> list[Product]:
    """Both tokens of every path's next candle."""
    rows, head = symbols * paths, width // DEPENDENCY_HEADS
    return [
        Product(rows, width, vocabulary, count=2),
        Product(rows, width, width),
        *_attention(symbols * DEPENDENCY_HEADS, paths, context, head, 1),
        *_attention(rows * DEPENDENCY_HEADS, 1, slots, head, 1),
    ]


def _advance(
    symbols: int, paths: int, context: int, slots: int, blocks: tuple[int, int, int], heads: int
) -> list[Product]:
    """The drawn candle through every block."""
    rows, (width, _, layers) = symbols * paths, blocks
    return [
        *_block(rows, *blocks),
        *_attention(symbols * heads, paths, context, width // heads, layers),
        *_attention(rows * heads, 1, slots, width // heads, layers),
        Product(rows, width, 2 * width),
    ]


def _block(rows: int, width: int, hidden: int, layers: int) -> list[Product]:
    """Queries, keys and values; output; both halves of the feed-forward; its way back."""
    shapes = [(width, 3 * width), (width, width), (width, 2 * hidden), (hidden, width)]
    return [Product(rows, inner, columns, count=layers) for inner, columns in shapes if layers]


def _attention(batch: int, queries: int, keys: int, head: int, layers: int) -> list[Product]:
    """Scores and weighted values."""
    shapes = [(head, keys), (keys, head)]
    return [Product(queries, inner, columns, count=layers, batch=batch) for inner, columns in shapes if layers]
