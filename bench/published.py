"""The published architectures with random weights, candles to forecast, and the requests made of them.

Speed does not depend on what the weights are worth, so nothing has to be downloaded to measure it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from models.adapters import matrices_of
from models.candles import Floats, with_amount
from models.forecaster import ForecastInput, Sampling
from models.kronos.network import KronosPredictor, PredictorConfig
from models.kronos.tokenizer import KronosTokenizer, TokenizerConfig
from models.toto.network import TotoConfig, TotoNetwork
from training.tuning import MODULES, Family

HOUR_MS: Final = 3_600_000
START_MS: Final = 1_700_006_400_000  # 2023-11-15 00:00 UTC

TOTO_BASE: Final[dict[str, Any]] = {
    "patch_size": 64,
    "stride": 64,
    "embed_dim": 768,
    "num_layers": 12,
    "num_heads": 12,
    "mlp_hidden_dim": 3072,
    "dropout": 0.1,
    "spacewise_every_n_layers": 12,
    "spacewise_first": False,
    "scaler_cls": "<class 'model.scaler.CausalPatchStdMeanScaler'>",
    "output_distribution_classes": ["<class 'model.distribution.MixtureOfStudentTsOutput'>"],
    "output_distribution_kwargs": {"k_components": 24},
    "use_memory_efficient_attention": False,
    "stabilize_with_global": True,
    "scale_factor_exponent": 10.0,
}
TOTO_TINY: Final[dict[str, Any]] = TOTO_BASE | {
    "embed_dim": 32,
    "num_layers": 4,
    "num_heads": 4,
    "mlp_hidden_dim": 64,
    "spacewise_every_n_layers": 2,
    "output_distribution_kwargs": {"k_components": 3},
}
TOTO_CONTEXT: Final = 4096


def _kronos(layers: int, width: int, heads: int, hidden: int) -> dict[str, Any]:
    drop = dict.fromkeys(("ffn_dropout_p", "attn_dropout_p", "resid_dropout_p", "token_dropout_p"), 0.0)
    shape = {"n_layers": layers, "d_model": width, "n_heads": heads, "ff_dim": hidden}
    return {"s1_bits": 10, "s2_bits": 10, "learn_te": True, **shape, **drop}


def _tokenizer(group_size: int) -> dict[str, Any]:
    drop = dict.fromkeys(("ffn_dropout_p", "attn_dropout_p", "resid_dropout_p"), 0.0)
    shape = {"d_in": 6, "d_model": 256, "n_heads": 4, "ff_dim": 512, "n_enc_layers": 4, "n_dec_layers": 4}
    loss = {"beta": 0.05, "gamma0": 1.0, "gamma": 1.1, "zeta": 0.05, "group_size": group_size}
    return {"s1_bits": 10, "s2_bits": 10, **shape, **loss, **drop}


KRONOS: Final[dict[str, dict[str, Any]]] = {
    "mini": {"predictor": _kronos(4, 256, 4, 512), "tokenizer": _tokenizer(5), "context": 2048},
    "small": {"predictor": _kronos(8, 512, 8, 1024), "tokenizer": _tokenizer(4), "context": 512},
    "base": {"predictor": _kronos(12, 832, 16, 2048), "tokenizer": _tokenizer(4), "context": 512},
}

KRONOS_TINY: Final[dict[str, Any]] = {
    "predictor": _kronos(2, 32, 4, 64) | {"s1_bits": 4, "s2_bits": 4},
    "tokenizer": _tokenizer(4)
    | {"d_model": 32, "ff_dim": 64, "n_enc_layers": 2, "n_dec_layers": 2, "s1_bits": 4, "s2_bits": 4},
    "context": 128,
}


def random_weights(family: str, config: dict[str, Any], seed: int = 3) -> dict[str, Tensor]:
    """A version's tensors for its `config.json`, drawn at random."""
    torch.manual_seed(seed)
    if family == "toto":
        return dict(TotoNetwork(TotoConfig.from_published(config["network"])).state_dict())
    parts: dict[str, nn.Module] = {
        "tokenizer": KronosTokenizer(TokenizerConfig.from_published(config["tokenizer"])),
        "predictor": KronosPredictor(PredictorConfig.from_published(config["predictor"])),
    }
    return dict(nn.ModuleDict(parts).state_dict())


def random_adapter(
    family: Family, weights: Mapping[str, Tensor], rank: int, seed: int, modules: Sequence[str] = ()
) -> dict[str, Tensor]:
    """An adapter of a version's tensors in the form in which training stores it; of all modules that may have one."""
    torch.manual_seed(seed)
    found = {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if not name.startswith("tokenizer.") and f".{layer}".endswith(
            tuple(f".{m}" for m in modules or MODULES[family])
        ):
            outputs, inputs = weight.shape
            found[f"{layer}.lora_A.default.weight"] = torch.randn(rank, inputs) / inputs**0.5
            found[f"{layer}.lora_B.default.weight"] = 0.02 * torch.randn(outputs, rank)
    return found


def merged_with(weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A version's tensors with an adapter added in."""
    pairs = matrices_of(adapter, scale)
    added = {f"{layer}.weight": up.double() @ down.double() for layer, (down, up) in pairs.items()}
    return {name: (w.double() + added[name]).float() if name in added else w for name, w in weights.items()}


def toto_config(network: dict[str, Any], max_context: int = TOTO_CONTEXT) -> dict[str, Any]:
    """A version's `config.json` around a published network config."""
    return {"network": network, "max_context": max_context}


def toto_weights(reference: nn.Module) -> dict[str, Tensor]:
    """A version's tensors out of the reference Toto."""
    backbone: nn.Module = reference.get_submodule("model")
    return {name: tensor for name, tensor in backbone.state_dict().items() if "rotary" not in name}


def kronos_weights(tokenizer: nn.Module, predictor: nn.Module) -> dict[str, Tensor]:
    """A version's tensors out of the reference tokenizer and predictor."""
    parts = {"tokenizer": tokenizer, "predictor": predictor}
    return {
        f"{part}.{name}": tensor
        for part, network in parts.items()
        for name, tensor in network.state_dict().items()
        if "rotary" not in name and "bsq" not in name
    }


def walk(length: int, seed: int) -> Floats:
    """`[length, 6]` valid candles of a random walk."""
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, length)))
    opened = np.concatenate([[100.0], close[:-1]])
    high, low = np.maximum(opened, close) * 1.003, np.minimum(opened, close) * 0.997
    return with_amount(np.column_stack([opened, high, low, close, rng.lognormal(10, 0.5, length)]))


def request(length: int, horizon: int, seed: int, **settings: Any) -> ForecastInput:
    """A forecast request over `walk(length, seed)`, hourly; `settings` are Sampling's and ForecastInput's."""
    times = START_MS + HOUR_MS * np.arange(length + horizon, dtype=np.int64)
    sampling = {key: settings.pop(key) for key in Sampling.__dataclass_fields__ if key in settings}
    return ForecastInput(
        timestamps=times[:length],
        candles=walk(length, seed),
        future_timestamps=times[length:],
        local_times=times,
        sampling=Sampling(**sampling),
        seed=seed,
        **settings,
    )
