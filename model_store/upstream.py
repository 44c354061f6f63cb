"""Other people's checkpoints to versions: weights and config.json in, nothing guessed, nothing ignored."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch

from model_store.canary import canary_of
from model_store.files import StoreError, VerificationFailed, read_start
from model_store.hub import SCHEME, fetch, is_snapshot, name_of, origin_of
from model_store.legacy import read_legacy
from model_store.manifest import Manifest, strict_json
from model_store.store import ModelStore
from model_store.tensors import read_tensors
from models.forecaster import InvalidModelOutput

Weights = dict[str, torch.Tensor]
Config = Mapping[str, Any]

_CONFIG: Final = "config.json"
_WEIGHTS: Final = "model.safetensors"
_SHARDS: Final = "model.safetensors.index.json"
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What the weights are stored in is what they came in: networks are built in float32, which holds all of these exactly.
_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
# Saved with the weights, but functions of the config alone: the networks compute them.
_RECOMPUTED: Final = re.compile(r".*\brotary_emb\.\w+|.*\brotary\.inv_freq|tokenizer\.bsq\.\w+")
_WRAPPERS: Final = re.compile(r"^(?:(?:module|model|_orig_mod)\.)+|\b_orig_mod\.")  # hub classes, DDP, torch.compile
_LOW_RANK: Final = re.compile(r"\.(?:base_layer|lora_\w+)\b")
_FUSED_SWIGLU: Final = (("mlp.0.w12.", "mlp.0."), ("mlp.0.w3.", "mlp.2."))  # xformers' names first
_BY_HAND: Final = "`candlecast store import {0}` (of a Kronos with its tokenizer, brought likewise, in {0}/tokenizer)"
_TOKENIZER_BY_HAND: Final = "`--tokenizer {0}`"
_TOTO_CONTEXT: Final = 4096
_KRONOS_CONTEXTS: Final = {4: 512, 5: 2048}  # by the tokenizer's group_size
_TOKENIZERS: Final = {4: "NeoQuasar/Kronos-Tokenizer-base", 5: "NeoQuasar/Kronos-Tokenizer-2k"}
_KRONOS_GROUPS: Final = {(4, 256): 5, (8, 512): 4, (12, 832): 4}  # mini, small, base by layers and width


class ImportRefused(StoreError):
    """This is no checkpoint that can be imported as it is."""


@dataclass(frozen=True)
class _Network:
    """One network as it was found: where, how it is built, and its tensors by their plain names."""

    place: Path
    config: Config
    weights: Weights


@dataclass(frozen=True)
class _Checkpoint:
    family: str
    config: Config
    weights: Weights
    tokenizer: Path | None = None


def default_name(source: str) -> str:
    """What a checkpoint is called in the store unless its importer says otherwise: the last part, in lower case."""
    return name_of(source) if source.startswith(SCHEME) else Path(source).absolute().name.lower()


def import_checkpoint(
    store: ModelStore,
    source: str | Path,
    name: str,
    *,
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
    licence: str | None = None,
) -> Manifest:
    """Store a Toto or a Kronos as a version of `name`; the same checkpoint again is the same version.

    `source` is a folder in the published layout, `hf://OWNER/NAME[@REVISION]`, or a file of torch.save, which needs a
    `config` file unless one lies in it or beside it. `tokenizer` is where a Kronos' lies: by default in `tokenizer`
    inside the folder, or else on the hub where the predictor came from it. Raises ImportRefused, which names every
    tensor that is missing, extra or of another shape, FetchFailed or LegacyRefused; nothing is stored then.
    """
    from models.families import build_forecaster  # the networks take a second to import

    place = _locate(source, _BY_HAND)
    try:
        network = _read_legacy(place, config) if place.is_file() else _read_folder(place)
        checkpoint = _assemble(network, tokenizer)
        forecaster = build_forecaster(checkpoint.family, checkpoint.config, checkpoint.weights)
        canary = canary_of(forecaster)
    except (KeyError, TypeError, ValueError, InvalidModelOutput) as error:
        what = f"{_CONFIG} lacks {error}" if isinstance(error, KeyError) else error
        raise ImportRefused(f"{source}: {what}") from error
    known = store.find(name, checkpoint.config, checkpoint.weights)
    if known:
        return known
    manifest = {
        "model": name,
        "family": checkpoint.family,
        "origin": _origin(place, checkpoint.tokenizer, licence),
        "limits": asdict(forecaster.limits),
        "canary": canary,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return store.put(manifest, checkpoint.config, checkpoint.weights)


def _locate(source: str | Path, by_hand: str) -> Path:
    return fetch(source, by_hand) if isinstance(source, str) and source.startswith(SCHEME) else Path(source)


def _assemble(network: _Network, tokenizer: str | Path | None) -> _Checkpoint:
    place, config = network.place, network.config
    family = _family(config)
    if family == "toto":
        if tokenizer:
            raise ImportRefused(f"{place} holds a Toto, which has no tokenizer")
        return _Checkpoint("toto", {"network": config, "max_context": _TOTO_CONTEXT}, network.weights)
    if family == "kronos":
        group = _KRONOS_GROUPS.get((config["n_layers"], config["d_model"]))
        return _kronos(network, _read_folder(_find_tokenizer(place, tokenizer, group)), group)
    if {"d_in", "n_enc_layers"} <= config.keys():
        raise ImportRefused(f"{place} holds a Kronos tokenizer alone: import the predictor's folder, and name this one")
    raise ImportRefused(f"{place}: {_CONFIG} describes neither a Toto 1.0 nor a Kronos: its keys are {sorted(config)}")


def _family(config: Config) -> str | None:
    if {"patch_size", "spacewise_every_n_layers"} <= config.keys():
        return "toto"
    return "kronos" if {"s1_bits", "n_layers", "d_model"} <= config.keys() else None


def _find_tokenizer(place: Path, given: str | Path | None, group: int | None) -> Path:
    if given:
        return _locate(given, _TOKENIZER_BY_HAND)
    inside = _inside(place)
    if inside.is_dir():
        return inside
    if is_snapshot(place) and group:
        return fetch(f"{SCHEME}{_TOKENIZERS[group]}", _TOKENIZER_BY_HAND)
    raise ImportRefused(
        f"{place} holds a Kronos predictor without its tokenizer: put the tokenizer's folder at {inside}"
        " (Kronos-Tokenizer-2k for mini, Kronos-Tokenizer-base for the others), or say --tokenizer"
    )


def _inside(place: Path) -> Path:
    return (place.parent if place.is_file() else place) / "tokenizer"


def _kronos(predictor: _Network, tokenizer: _Network, group: int | None) -> _Checkpoint:
    for bits in ("s1_bits", "s2_bits"):
        if tokenizer.config[bits] != predictor.config[bits]:
            raise ImportRefused(
                f"{tokenizer.place} has {bits} {tokenizer.config[bits]}, the predictor {predictor.config[bits]}"
            )
    group_size = tokenizer.config["group_size"]
    if group_size not in _KRONOS_CONTEXTS:
        raise ImportRefused(f"{tokenizer.place}: group_size {group_size} is that of no published tokenizer (4 or 5)")
    if group not in (None, group_size):  # the other one fits as well, and its tokens mean other candles
        raise ImportRefused(
            f"{tokenizer.place} has group_size {group_size}: predictors of this size were trained with"
            f" {_TOKENIZERS[group]}"
        )
    weights = {
        f"{part}.{name}": tensor
        for part, network in (("predictor", predictor), ("tokenizer", tokenizer))
        for name, tensor in network.weights.items()
    }
    stored = {
        "predictor": predictor.config,
        "tokenizer": tokenizer.config,
        "context": _KRONOS_CONTEXTS[group_size],
    }
    return _Checkpoint("kronos", stored, weights, tokenizer.place)


def _read_folder(folder: Path) -> _Network:
    config = _read_config(folder / _CONFIG)
    return _Network(folder, config, _plain_names(folder / _WEIGHTS, _read_weights(folder)))


def _read_legacy(file: Path, config: str | Path | None) -> _Network:
    """The architecture is what `config` says, else the checkpoint, else its folder: a trainer's own settings,
    which often name another network than the one that was tuned, are not it."""
    weights, inside = read_legacy(file)
    beside = file.with_name(_CONFIG)
    published = [found for found in inside if _is_published(found)]
    if config:
        chosen: Config = _read_config(Path(config))
    elif published:
        chosen = published[0]
    elif beside.is_file():
        chosen = _read_config(beside)
    else:
        raise ImportRefused(
            f"{file} does not say what it is: no published config in it, no {_CONFIG} beside it; name with --config"
            f" the {_CONFIG} of the checkpoint that it was tuned from"
        )
    return _Network(file, chosen, _plain_names(file, weights))


def _is_published(config: Config) -> bool:
    from models.kronos.network import PredictorConfig
    from models.toto.network import TotoConfig

    try:
        (TotoConfig if _family(config) == "toto" else PredictorConfig).from_published(config)
    except (KeyError, TypeError, ValueError):
        return False
    return True


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ImportRefused(f"{path.parent} has no {path.name}")
    try:
        return strict_json(read_start(path))
    except ValueError as error:
        raise ImportRefused(f"{path}: {error}") from error


def _read_weights(folder: Path) -> Weights:
    path = folder / _WEIGHTS
    if not path.is_file():
        raise ImportRefused(f"{folder} has no {_WEIGHTS}{_advice(folder)}")
    try:
        return read_tensors(path.resolve(), None, f"{path}")  # where the hub's links lead
    except VerificationFailed as error:
        raise ImportRefused(f"{error}") from error


def _advice(folder: Path) -> str:
    if (folder / _SHARDS).is_file():
        return f", but parts of one ({_SHARDS}), as no published Toto 1.0 or Kronos has: save it as one file"
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if not pickles:
        return ""
    return (
        f": {', '.join(pickles)} may run code when read: import it with --legacy-pt, which reads tensors alone, or"
        f" convert it to {_WEIGHTS} with safetensors.torch.save_file where you trust it"
    )


def _plain_names(path: Path, weights: Weights) -> Weights:
    """Without what wraps the network and what it computes itself, and with the names of the plain feed-forward."""
    renamed: Weights = {}
    for published, tensor in weights.items():
        name = _WRAPPERS.sub("", published)
        if _RECOMPUTED.fullmatch(name):
            continue
        if _LOW_RANK.search(name):
            raise ImportRefused(
                f"{path} holds adapters of low rank ({name}) without the factor that they are added in with: merge"
                " them where they were trained, and import what that saves"
            )
        if tensor.dtype not in _DTYPES:
            raise ImportRefused(f"{path}: {name} is {tensor.dtype}, not a float of 32 or 16 bits")
        for fused, plain in _FUSED_SWIGLU:
            name = name.replace(fused, plain)
        if name in renamed:
            raise ImportRefused(f"{path}: two tensors are called {name} once {published} is renamed")
        renamed[name] = tensor
    return renamed


def _origin(place: Path, tokenizer: Path | None, licence: str | None) -> dict[str, str | None]:
    source, revision = origin_of(place)
    apart = tokenizer if tokenizer != _inside(place) else None
    other, other_revision = origin_of(apart) if apart else (None, None)
    return {
        "kind": "imported",
        "source": source,
        "revision": revision,
        "tokenizer": other,
        "tokenizer_revision": other_revision,
        "licence": licence or _licence(place),
    }


def _licence(folder: Path) -> str | None:
    """What the model card's front matter says."""
    card = folder / "README.md"
    text = read_start(card).decode(errors="replace") if card.is_file() else ""
    match = re.match(r"---\n(?:(?!---).*\n)*?license: *([\w.+-]+)", text)
    return match[1] if match else None
