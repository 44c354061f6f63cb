"""Checkpoints of the Hugging Face Hub through its official client: one commit, and the very bytes it announced."""

import hashlib
import re
from pathlib import Path
from typing import Final

from model_store.files import StoreError

SCHEME: Final = "hf://"
_REFERENCE: Final = re.compile(r"hf://(?P<id>[\w.-]+/(?P<name>[\w.-]+))(?:@(?P<revision>[\w./-]+))?")
_SNAPSHOT: Final = re.compile(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})$")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_FILES: Final = ("config.json", "model.safetensors", "model.safetensors.index.json", "README.md")


class FetchFailed(StoreError):
    """The hub's files are not to be had; the message says how to bring them by hand."""


def name_of(reference: str) -> str:
    """A model's name in the store: that of `hf://OWNER/NAME[@REVISION]` in lower case."""
    return _parse(reference)["name"].lower()


def fetch(reference: str, by_hand: str) -> Path:
    """A folder with what the import needs of `hf://OWNER/NAME[@REVISION]`, one commit of it, in the client's cache.

    HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are the client's own affair. Raises FetchFailed, which ends with
    `by_hand`: what to do, `{0}` being its name, with a folder that was downloaded elsewhere.
    """
    parsed = _parse(reference)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FetchFailed(f"{reference} needs the hub's client: pip install 'candlecast[hub]'") from error
    wanted = [*_FILES, *(f"tokenizer/{name}" for name in _FILES)]
    try:
        folder = Path(snapshot_download(parsed["id"], revision=parsed["revision"], allow_patterns=wanted))
    except Exception as error:
        # Its errors share no base, and not even the library below them is the same in every release.
        raise FetchFailed(f"{reference} cannot be fetched: {_reason(error)}. {_advice(parsed, by_hand)}") from error
    _check_announced(folder)
    return folder


def is_snapshot(folder: Path) -> bool:
    """Whether `folder` is what `fetch` returns."""
    return _SNAPSHOT.search(folder.absolute().as_posix()) is not None


def origin_of(place: Path) -> tuple[str, str | None]:
    """Hub id and commit of a folder of the client's cache; else its name, and the commit that `hf download` noted."""
    if match := _SNAPSHOT.search(place.absolute().as_posix()):
        return f"{match[1]}/{match[2]}", match[3]
    note = place / ".cache" / "huggingface" / "download" / "config.json.metadata"
    commit = note.read_text().partition("\n")[0] if note.is_file() else ""
    return place.absolute().name, commit if _COMMIT.fullmatch(commit) else None


def _parse(reference: str) -> "re.Match[str]":
    if not (match := _REFERENCE.fullmatch(reference)):
        raise FetchFailed(f"{reference} is not hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    return match


def _reason(error: Exception) -> str:
    """The client's in one line: where it missed its cache, why it looked there."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300].rstrip('.')}"


def _advice(parsed: "re.Match[str]", by_hand: str) -> str:
    revision = f" --revision {parsed['revision']}" if parsed["revision"] else ""
    download = f"hf download {parsed['id']}{revision} --local-dir {parsed['name']}"
    return f"By hand: `{download}` on a machine that reaches it, copy the folder, {by_hand.format(parsed['name'])}"


def _check_announced(folder: Path) -> None:
    """The client checks sizes; the cache calls a large file by the SHA-256 that the hub announced."""
    for path in folder.rglob("*.safetensors"):
        blob = path.resolve()
        if not _SHA256.fullmatch(blob.name):
            continue
        with blob.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != blob.name:
                raise FetchFailed(f"{path.name} is not what the hub announced: delete {blob} and import again")
