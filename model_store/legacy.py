"""Checkpoints that torch.save wrote, as data: whatever only code could rebuild is refused, and no code runs."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from model_store.files import StoreError

_STATES: Final = ("model_state_dict", "state_dict", "model")
_CONFIGS: Final = ("model_config", "config")
_FORBIDDEN: Final = re.compile(r"GLOBAL (\S+)")


class LegacyRefused(StoreError):
    """The file is not one that can be read without running what it says."""


def read_legacy(path: Path) -> tuple[dict[str, torch.Tensor], list[Mapping[str, Any]]]:
    """The weights of a trainer's checkpoint, or of a bare state dict, and what it says of their architecture.

    Of optimizers and schedulers that lie beside the weights nothing is kept. Raises LegacyRefused.
    """
    content = _load(path)
    state = next((content[key] for key in _STATES if isinstance(content.get(key), Mapping)), content)
    strange = sorted(f"{name!r} ({type(value).__name__})" for name, value in state.items() if not _is_plain(value))
    if strange or not state:
        shown = ", ".join(strange[:8]) or "nothing"
        raise LegacyRefused(f"{path} has no weights under {', '.join(_STATES)} or at its top, but {shown}")
    configs = [content[key] for key in _CONFIGS if isinstance(content.get(key), Mapping)]
    return {str(name): tensor.detach().clone() for name, tensor in state.items()}, configs


def _load(path: Path) -> Mapping[str, Any]:
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except LegacyRefused:
        raise
    except pickle.UnpicklingError as error:
        found = _FORBIDDEN.search(str(error))
        what = f"names {found[1]}" if found else "is something else"
        raise LegacyRefused(
            f"{path} is read as tensors, numbers and text only, and {what}, which may run code: where you trust it,"
            " save its weights alone with safetensors.torch.save_file"
        ) from error
    except Exception as error:  # a made-up pickle fails in more ways than torch has names for
        why = str(error).partition("\n")[0] or type(error).__name__
        raise LegacyRefused(f"{path} is no checkpoint of torch.save: {why}") from error
    if not isinstance(content, Mapping):
        raise LegacyRefused(f"{path} holds a {type(content).__name__}, not weights by name")
    return content


def _check_archive(path: Path) -> None:
    """torch.save stores each part once, as it is, and with its checksum: what does not could grow without end."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise LegacyRefused(f"{path} is compressed, which torch.save never does")
        if sum(part.file_size for part in parts) > path.stat().st_size:
            raise LegacyRefused(f"{path} has parts that overlap")
        if damaged := archive.testzip():
            raise LegacyRefused(f"{path} is damaged: {damaged!r} does not match its checksum")


def _is_plain(value: object) -> bool:
    """A dense tensor whose every element lies in the file."""
    return (
        isinstance(value, torch.Tensor)
        and type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not value.is_quantized
        and value.nbytes <= value.untyped_storage().nbytes()
    )
