"""Published checkpoint folders to versions: safetensors and config.json in, nothing guessed, nothing ignored."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from model_store.files import StoreError
from model_store.manifest import Manifest
from model_store.store import ModelStore

Weights = dict[str, torch.Tensor]

_WEIGHTS: Final = "model.safetensors"
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Saved with the weights, but functions of the config alone: the networks compute them.
_RECOMPUTED: Final = re.compile(r".*\brotary_emb\.\w+|.*\brotary\.inv_freq|tokenizer\.bsq\.\w+")
_FUSED_SWIGLU: Final = (("mlp.0.w12.", "mlp.0."), ("mlp.0.w3.", "mlp.2."))  # xformers' names first
_TOTO_CONTEXT: Final = 4096
_KRONOS_CONTEXTS: Final = {4: 512, 5: 2048}  # by the tokenizer's group_size: base, 2k


class ImportRefused(StoreError):
    """The folder does not hold a checkpoint that can be imported as it is."""


@dataclass(frozen=True)
class _Checkpoint:
    family: str
    config: Mapping[str, Any]
    weights: Weights


def import_folder(
    store: ModelStore, folder: str | Path, name: str, *, tokenizer: str | Path | None = None, licence: str | None = None
) -> Manifest:
    """Store a published Toto or Kronos folder as a version of `name`; the same folder again is the same version.

    A Kronos tokenizer lies in `tokenizer` or in `<folder>/tokenizer`. ImportRefused names every tensor that is
    missing, extra or of another shape; nothing is stored then.
    """
    from models.families import build_forecaster  # the networks take a second to import

    folder = Path(folder)
    try:
        checkpoint = _read(folder, Path(tokenizer) if tokenizer else None)
        limits = build_forecaster(checkpoint.family, checkpoint.config, checkpoint.weights).limits
    except (KeyError, TypeError, ValueError) as error:
        what = f"config.json lacks {error}" if isinstance(error, KeyError) else error
        raise ImportRefused(f"{folder}: {what}") from error
    known = store.find(name, checkpoint.config, checkpoint.weights)
    if known:
        return known
    source, revision = _hub_name(folder)
    manifest = {
        "model": name,
        "family": checkpoint.family,
        "origin": {"kind": "imported", "source": source, "revision": revision, "licence": licence or _licence(folder)},
        "limits": asdict(limits),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return store.put(manifest, checkpoint.config, checkpoint.weights)


def _read(folder: Path, tokenizer: Path | None) -> _Checkpoint:
    config = _read_config(folder)
    if {"patch_size", "spacewise_every_n_layers"} <= config.keys():
        if tokenizer:
            raise ImportRefused(f"{folder} holds a Toto, which has no tokenizer")
        weights = _toto_names(_read_weights(folder))
        return _Checkpoint("toto", {"network": config, "max_context": _TOTO_CONTEXT}, weights)
    if {"s1_bits", "n_layers", "d_model"} <= config.keys():
        return _read_kronos(folder, config, tokenizer or folder / "tokenizer")
    if {"d_in", "n_enc_layers"} <= config.keys():
        raise ImportRefused(
            f"{folder} holds a Kronos tokenizer alone: import the predictor's folder, and name this one"
        )
    raise ImportRefused(
        f"{folder}/config.json describes neither a Toto 1.0 nor a Kronos: its keys are {sorted(config)}"
    )


def _read_kronos(folder: Path, config: Mapping[str, Any], tokenizer: Path) -> _Checkpoint:
    if not tokenizer.is_dir():
        raise ImportRefused(
            f"{folder} holds a Kronos predictor without its tokenizer: put the tokenizer's folder at {tokenizer}"
            " (Kronos-Tokenizer-2k for mini, Kronos-Tokenizer-base for the others)"
        )
    tokenizer_config = _read_config(tokenizer)
    for bits in ("s1_bits", "s2_bits"):
        if tokenizer_config[bits] != config[bits]:
            raise ImportRefused(f"{tokenizer} has {bits} {tokenizer_config[bits]}, the predictor {config[bits]}")
    group_size = tokenizer_config["group_size"]
    if group_size not in _KRONOS_CONTEXTS:
        raise ImportRefused(f"{tokenizer}: group_size {group_size} is that of no published tokenizer (4 or 5)")
    weights = {
        f"{part}.{name}": tensor
        for part, home in (("predictor", folder), ("tokenizer", tokenizer))
        for name, tensor in _without_recomputed(_read_weights(home)).items()
    }
    stored = {"predictor": config, "tokenizer": tokenizer_config, "context": _KRONOS_CONTEXTS[group_size]}
    return _Checkpoint("kronos", stored, weights)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ImportRefused(f"{folder} has no config.json")
    config = json.loads(path.read_bytes())
    if not isinstance(config, dict):
        raise ImportRefused(f"{path} does not hold an object")
    return config


def _read_weights(folder: Path) -> Weights:
    path = folder / _WEIGHTS
    if not path.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        advice = (
            f": {', '.join(pickles)} may run code when read and is never opened; convert it to {_WEIGHTS} with"
            " safetensors.torch.save_file where you trust it"
            if pickles
            else ""
        )
        raise ImportRefused(f"{folder} has no {_WEIGHTS}{advice}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ImportRefused(f"{path} is not a safetensors file: {error}") from error


def _toto_names(weights: Weights) -> Weights:
    """Without the wrapper's prefix, and with the names of the plain feed-forward."""
    renamed: Weights = {}
    for published, tensor in _without_recomputed(weights).items():
        name = published.removeprefix("model.")
        for fused, plain in _FUSED_SWIGLU:
            name = name.replace(fused, plain)
        if name in renamed:
            raise ImportRefused(f"two tensors are called {name} once {published} is renamed")
        renamed[name] = tensor
    return renamed


def _without_recomputed(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if not _RECOMPUTED.fullmatch(name)}


def _hub_name(folder: Path) -> tuple[str, str | None]:
    """Hub id and revision of a folder of the hub's cache, else the folder's own name."""
    match = re.search(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})$", folder.absolute().as_posix())
    return (f"{match[1]}/{match[2]}", match[3]) if match else (folder.absolute().name, None)


def _licence(folder: Path) -> str | None:
    """What the model card's front matter says."""
    card = folder / "README.md"
    match = re.match(r"---\n(?:(?!---).*\n)*?license: *([\w.+-]+)", card.read_text()) if card.is_file() else None
    return match[1] if match else None
