"""What of a stored network is trained: all of it, its head, or adapters of low rank beside its matrices."""

import copy
from collections.abc import Mapping
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

Family = Literal["toto", "kronos"]

_HEADS: Final[Mapping[Family, tuple[str, ...]]] = {"toto": ("unembed.", "output_distribution."), "kronos": ("head.",)}
MODULES: Final[Mapping[Family, tuple[str, ...]]] = {
    "toto": ("patch_embed.projection", "wQKV", "wO", "mlp.0", "mlp.2"),
    "kronos": ("fusion_proj", "q_proj", "k_proj", "v_proj", "out_proj", "w1", "w2", "w3", "proj_s1", "proj_s2"),
}
ADAPTERS_ALONE: Final = {"rank", "alpha", "dropout", "modules"}  # settings that only adapters have
_ADAPTER, _BASE = ".lora_", ".base_layer."  # in peft's names


class TuneTable(BaseModel):
    """Start from a version in the store: its config.json is the network's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = Field(description="NAME, NAME@VERSION or NAME@ALIAS.")
    train: Literal["full", "head", "lora"] = Field("full", description="head: the backbone is frozen.")
    per_symbol: bool = Field(False, description="A version for each symbol, trained on it alone, under base's name.")
    rank: int = Field(8, gt=0, description="Of the adapters, like all below.")
    alpha: int = Field(16, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    modules: tuple[str, ...] = Field((), description="Published names that get an adapter; default: all they may have.")


def open_up(network: nn.Module, family: Family, tune: TuneTable) -> None:
    """Let training move what `tune` says, and nothing else; ValueError where it names no such modules."""
    if tune.train == "head":
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith(_HEADS[family]))
    elif tune.train == "lora":
        _inject(network, family, tune)


def _inject(network: nn.Module, family: Family, tune: TuneTable) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise RuntimeError("adapters need pip install 'candlecast[train]'") from error
    if unknown := set(tune.modules) - set(MODULES[family]):
        raise ValueError(f"no adapter for {sorted(unknown)}: {family} may have them at {list(MODULES[family])}")
    modules = list(tune.modules or MODULES[family])
    config = LoraConfig(r=tune.rank, lora_alpha=tune.alpha, lora_dropout=tune.dropout, target_modules=modules)
    inject_adapter_in_model(config, network)


def merged(network: nn.Module) -> dict[str, Tensor]:
    """The weights under their published names, adapters added in."""
    whole = copy.deepcopy(network)
    for module in whole.modules():
        if hasattr(module, "lora_A"):
            module.merge()  # type: ignore[operator]
    tensors = whole.state_dict().items()
    return {name.replace(_BASE, "."): tensor.detach() for name, tensor in tensors if _ADAPTER not in name}


def adapter_of(network: nn.Module) -> dict[str, Tensor]:
    """The adapters alone, under peft's names; empty where there are none."""
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items() if _ADAPTER in name}
