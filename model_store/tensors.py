"""Safetensors files to tensors: strictly checked, and hashed in the very memory that they are used from."""

import hashlib
import io
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from torch import Tensor

from model_store.files import VerificationFailed, open_listed, verify_file
from model_store.manifest import FileEntry, in_a_line, strict_json
from models.layers import JOINED

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_METADATA: Final = "__metadata__"
_LENGTH_BYTES: Final = 8  # of the header's length, in front of it
_MAX_HEADER_BYTES: Final = 16 * 2**20
_CHUNK_BYTES: Final = 4 * 2**20

_Whole = Annotated[int, Field(strict=True, ge=0)]


class _Stored(BaseModel):
    """What the header says of one tensor; offsets count from the end of the header."""

    model_config = ConfigDict(extra="forbid")

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8"]
    shape: Annotated[list[_Whole], Field(max_length=8)]
    data_offsets: tuple[_Whole, _Whole]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


_HEADER: Final = TypeAdapter(dict[str, _Stored])


class _NotSafetensors(VerificationFailed):
    """The bytes are not of the format."""


def read_tensors(path: Path, listed: FileEntry | None, what: str) -> dict[str, Tensor]:
    """Every tensor of a file; VerificationFailed, beginning with `what`, unless it is whole and as it was `listed`."""
    try:
        with open_listed(path, listed, what) as file:
            return _read(file, os.fstat(file.fileno()).st_size, listed, what)
    except _NotSafetensors:
        if listed:
            verify_file(path, listed, what)  # most likely they were, until something damaged them: that is the news
        raise


def tensors_of(data: bytes, what: str) -> dict[str, Tensor]:
    """Every tensor of a file that is in memory, and is as it was listed."""
    return _read(io.BytesIO(data), len(data), None, what)


def _read(file: BinaryIO, size: int, listed: FileEntry | None, what: str) -> dict[str, Tensor]:
    """Each tensor is read into memory of its own, so that one that is used in another form can be given up.

    A thread hashes them where they lie while the next are read. Nothing is allocated that the file has no bytes for.
    """
    with ThreadPoolExecutor(1) as hashing:
        digest = hashlib.sha256()

        def fill(buffer: memoryview) -> None:
            for start in range(0, len(buffer), _CHUNK_BYTES):
                part = buffer[start : start + _CHUNK_BYTES]
                if file.readinto(part) != len(part):  # type: ignore[attr-defined]
                    raise VerificationFailed(f"{what} ended while it was read")
                if listed:
                    hashing.submit(digest.update, part)

        def bytes_of(count: int) -> bytearray:
            data = bytearray(count)
            fill(memoryview(data))
            return data

        length = int.from_bytes(bytes_of(min(_LENGTH_BYTES, size)), "little")
        room = size - _LENGTH_BYTES - length
        if room < 0 or length > _MAX_HEADER_BYTES:
            raise _refusal(what, f"a header of {length} bytes does not fit in {size}, or is beyond {_MAX_HEADER_BYTES}")
        stored = _stored(bytes_of(length), room, what)
        places = _places(stored)
        for name in stored:
            fill(places[name].numpy().data)
    if listed and digest.hexdigest() != listed.sha256:
        raise VerificationFailed(f"{what} is not what was stored")
    return {name: places[name].view(_DTYPES[entry.dtype]).view(entry.shape) for name, entry in stored.items()}


def _stored(header: bytearray, room: int, what: str) -> dict[str, _Stored]:
    """The tensors in the order of their bytes, which fill `room` without holes or overlaps."""
    try:
        content = strict_json(header)
        metadata: Any = content.pop(_METADATA, {})
        found = _HEADER.validate_python(content)
    except ValueError as error:
        raise _refusal(what, f"its header: {in_a_line(error)}") from error
    if not isinstance(metadata, dict):
        raise _refusal(what, f"{_METADATA} is not an object")
    end = 0
    ordered = dict(sorted(found.items(), key=lambda pair: pair[1].data_offsets))
    for name, entry in ordered.items():
        if entry.data_offsets != (end, end + entry.bytes):
            raise _refusal(what, f"{name!r} of {entry.bytes} bytes lies at {entry.data_offsets}, not at {end}")
        end += entry.bytes
    if end != room:
        raise _refusal(what, f"its tensors have {end} bytes, the file {room}")
    return ordered


def _places(stored: Mapping[str, _Stored]) -> dict[str, Tensor]:
    """Memory for the bytes of every tensor; those that networks join lie side by side."""
    groups: dict[object, dict[str, int]] = defaultdict(dict)
    for name, entry in stored.items():
        group, rank = _neighbourhood(name)
        groups[group, entry.dtype][name] = rank
    places: dict[str, Tensor] = {}
    for ranks in groups.values():
        names = sorted(ranks, key=ranks.__getitem__)
        sizes = [stored[name].bytes for name in names]
        places.update(zip(names, torch.empty(sum(sizes), dtype=torch.uint8).split(sizes), strict=True))
    return places


def _neighbourhood(name: str) -> tuple[str, int]:
    """What the tensors beside which one is read have in common, and its rank among them."""
    for layers in JOINED:
        for rank, layer in enumerate(layers):
            if f".{layer}." in name:
                return name.replace(f".{layer}.", f".{layers}."), rank
    return name, 0


def _refusal(what: str, reason: str) -> _NotSafetensors:
    return _NotSafetensors(f"{what} is not a safetensors file: {reason}")
