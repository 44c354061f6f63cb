"""Put, find, verify, load, promote. A version is whole or absent; aliases are the only mutable names."""

import contextlib
import fcntl
import getpass
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from model_store.files import (
    StoreError,
    VerificationFailed,
    VersionNotFound,
    entries_of,
    open_regular,
    read_listed,
    sync_directory,
    write_directory,
    write_synced,
)
from model_store.manifest import (
    ADAPTER,
    CONFIG,
    MANIFEST,
    RUNTIMES,
    WEIGHTS,
    Evaluation,
    Manifest,
    canonical_json,
    version_of,
)

CANDIDATE, PRODUCTION, PREVIOUS = "candidate", "production", "previous"
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION: Final = re.compile(r"[0-9a-f]{12}")
_MAX_JSON_BYTES: Final = 16 * 2**20
_GATE: Final = "skill_vs_naive"
_ALIASES: Final = TypeAdapter(dict[str, str])


class PromotionRefused(StoreError):
    """The gate said no; `--force REASON` overrides it."""


@dataclass(frozen=True)
class LoadedVersion:
    """A verified version in memory."""

    manifest: Manifest
    config: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]
    adapter: Mapping[str, torch.Tensor]  # what the weights have added in; mostly there is none


class ModelStore:
    """Versions under `<root>/<model>/<version>/`, aliases in `<root>/<model>/aliases.json`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    # -- reading ---------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """Names that have at least one version."""
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if _NAME.fullmatch(p.name) and self.versions(p.name))

    def versions(self, model: str) -> list[str]:
        """Versions of `model`, oldest first; those with a broken manifest, which no reader loads, before all."""
        home = self._home(model)
        if not home.is_dir():
            return []
        found = [p.name for p in home.iterdir() if _VERSION.fullmatch(p.name) and (p / MANIFEST).is_file()]
        return sorted(found, key=lambda version: (self._created_at(model, version), version))

    def aliases(self, model: str) -> dict[str, str]:
        """Alias to version."""
        path = self._home(model) / "aliases.json"
        if not path.is_file():
            return {}
        try:
            with open_regular(path) as file:
                return _ALIASES.validate_json(file.read(_MAX_JSON_BYTES))
        except ValidationError as error:
            raise VerificationFailed(f"{model}: {path.name} is not a table of aliases") from error

    def resolve(self, reference: str) -> tuple[str, str]:
        """`name` (its production version), `name@version` or `name@alias` as (model, version)."""
        model, _, wanted = reference.partition("@")
        wanted = wanted or PRODUCTION
        version = self.aliases(model).get(wanted, wanted)
        if not _VERSION.fullmatch(version) or not (self._home(model) / version / MANIFEST).is_file():
            known = ", ".join([*self.aliases(model), *self.versions(model)]) or "none"
            raise VersionNotFound(f"the store has no {model}@{wanted}; it has: {known}")
        return model, version

    def manifest(self, reference: str) -> Manifest:
        """The manifest of a reference, its own digest checked."""
        return self._read_manifest(*self.resolve(reference))

    def verify(self, reference: str) -> Manifest:
        """Hash every file of the version; VerificationFailed names the first that differs."""
        manifest = self.manifest(reference)
        self._read_files(manifest)
        return manifest

    def load(self, reference: str) -> LoadedVersion:
        """The version's config and tensors; the bytes that were hashed are the bytes that are parsed."""
        manifest = self.manifest(reference)
        files = self._read_files(manifest)
        config = json.loads(files[CONFIG])
        weights = load_tensors(bytes(files[WEIGHTS])) if WEIGHTS in files else {}
        adapter = load_tensors(bytes(files[ADAPTER])) if ADAPTER in files else {}
        return LoadedVersion(manifest, config, weights, adapter)

    def find(self, model: str, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Manifest | None:
        """The newest version of `model` with this very config and these very tensors."""
        wanted = entries_of(_serialise(config, weights))
        for version in reversed(self.versions(model)):
            with contextlib.suppress(VerificationFailed):  # a broken version is nobody's equal
                manifest = self._read_manifest(model, version)
                if manifest.files == wanted:
                    return manifest
        return None

    # -- writing ---------------------------------------------------------------------------------

    def put(
        self,
        manifest: Mapping[str, Any],
        config: Mapping[str, Any],
        weights: Mapping[str, torch.Tensor],
        adapter: Mapping[str, torch.Tensor] | None = None,
    ) -> Manifest:
        """Store a version whole or not at all and return its completed manifest.

        `manifest` holds the fields of Manifest but `version` and `files`. An equal version is kept as it is.
        """
        contents = _serialise(config, weights, adapter)
        draft = Manifest.model_validate({**manifest, "files": entries_of(contents)})
        complete = draft.model_copy(update={"version": draft.digest()})
        target = self._home(complete.model) / complete.version
        if target.exists():
            return self.verify(f"{complete.model}@{complete.version}")
        contents[MANIFEST] = canonical_json(complete.model_dump(mode="json"))
        write_directory(target, contents)
        return complete

    def set_alias(self, model: str, alias: str, version: str) -> None:
        """Point `alias` at `version` (or at what another alias points at now) atomically."""
        if not _NAME.fullmatch(alias) or _VERSION.fullmatch(alias):
            raise StoreError(f"{alias!r} cannot be an alias: use lower-case letters, digits, dots and dashes")
        _, version = self.resolve(f"{model}@{version}")
        with self._locked(model):
            self._write_aliases(model, {**self.aliases(model), alias: version})

    def promote(self, reference: str, *, force: str | None = None) -> Manifest:
        """Make a version its name's production version; the old one becomes `previous`.

        The gate verifies every hash and, where the current version has an evaluation, refuses a version without
        one on the same test set, or with a worse one. `force` is the reason for overriding the latter.
        """
        if force is not None and not force.strip():
            raise PromotionRefused("an override needs a reason: --force REASON")
        model, version = self._promotable(reference)
        manifest = self.verify(f"{model}@{version}")
        with self._locked(model):
            aliases = self.aliases(model)
            current = aliases.get(PRODUCTION)
            if current and current != version:
                if force is None:
                    _refuse_worse(manifest, self.manifest(f"{model}@{current}"))
                aliases[PREVIOUS] = current
            self._write_aliases(model, aliases | {PRODUCTION: version})
            self._record(model, "promote", version=version, previous=current, force=force)
        return manifest

    # -- private ---------------------------------------------------------------------------------

    def _promotable(self, reference: str) -> tuple[str, str]:
        """`name` alone means its candidate, or its newest version where it has none."""
        if "@" in reference:
            return self.resolve(reference)
        versions = self.versions(reference)
        if not versions:
            raise VersionNotFound(f"the store has no model called {reference}")
        return self.resolve(f"{reference}@{self.aliases(reference).get(CANDIDATE, versions[-1])}")

    def _home(self, model: str) -> Path:
        if not _NAME.fullmatch(model):
            raise VersionNotFound(f"{model!r} is not a model name")
        return self.root / model

    def _created_at(self, model: str, version: str) -> str:
        try:
            return self._read_manifest(model, version).created_at
        except VerificationFailed:
            return ""

    def _read_manifest(self, model: str, version: str) -> Manifest:
        home = self._home(model) / version
        if home.is_symlink():
            raise VerificationFailed(f"{model}@{version} is a link")
        with open_regular(home / MANIFEST) as file:
            data = file.read(_MAX_JSON_BYTES)
        try:
            content = from_json(data)  # unlike json, it survives a thousand brackets
            manifest, digest = Manifest.model_validate(content), version_of(content)
        except ValueError as error:
            raise VerificationFailed(f"{model}@{version}: {MANIFEST} is not a manifest: {error}") from error
        if manifest.version != version or digest != version or manifest.model != model:
            raise VerificationFailed(f"{model}@{version}: {MANIFEST} does not hash to its version")
        return manifest

    def _read_files(self, manifest: Manifest) -> dict[str, bytes]:
        home = self._home(manifest.model) / manifest.version
        what = f"{manifest.model}@{manifest.version}"
        return read_listed(home, manifest.files, beside=frozenset({MANIFEST, RUNTIMES}), what=what)

    def _write_aliases(self, model: str, aliases: Mapping[str, str]) -> None:
        path = self._home(model) / "aliases.json"
        temporary = path.with_suffix(".tmp")
        write_synced(temporary, canonical_json(aliases))
        os.replace(temporary, path)
        sync_directory(path.parent)

    def _record(self, model: str, event: str, **facts: str | None) -> None:
        """One file per event, so that no two writers ever share one."""
        now = datetime.now(UTC)
        directory = self._home(model) / "audit"
        directory.mkdir(exist_ok=True)
        entry = {"at": now.isoformat(), "event": event, "by": _whoami(), **facts}
        name = f"{now:%Y%m%dT%H%M%S.%fZ}-{event}-{secrets.token_hex(4)}.json"
        write_synced(directory / name, canonical_json(entry))

    @contextlib.contextmanager
    def _locked(self, model: str) -> Iterator[None]:
        with open(self._home(model) / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _serialise(
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    adapter: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, bytes]:
    contents = {CONFIG: canonical_json(config)}
    for name, tensors in ((WEIGHTS, weights), (ADAPTER, adapter)):
        if tensors:
            contents[name] = save_tensors({key: tensors[key].contiguous() for key in sorted(tensors)})
    return contents


def _refuse_worse(new: Manifest, current: Manifest) -> None:
    """PromotionRefused unless, wherever the current version's skill is known, the new one's on the very same test
    set is known too and may, by its interval, be as high."""
    for old in current.evaluations:
        before = old.metrics.get(_GATE)
        if before is None:
            continue
        scored = [fresh for fresh in new.evaluations if fresh.windows == old.windows and _GATE in fresh.metrics]
        same = [fresh for fresh in scored if _test_set(fresh) == _test_set(old)]
        if not same:
            other = "was scored on another test set than" if scored else f"has no {_GATE} beside"
            raise PromotionRefused(
                f"{new.model}@{new.version} {other} the current version {current.version} on the"
                f" {old.windows} windows: evaluate it on the same, or give --force REASON"
            )
        after = same[0].metrics[_GATE]
        at_most = after.value if after.high is None else after.high
        if at_most < before.value:
            raise PromotionRefused(
                f"{_GATE} on the {old.windows} windows is {after.value:+.4f} (at most {at_most:+.4f}),"
                f" the current version's is {before.value:+.4f}: give --force REASON to promote it all the same"
            )


def _test_set(evaluation: Evaluation) -> tuple[object, ...]:
    """What two evaluations must share for their scores to be comparable."""
    e = evaluation
    return e.windows, e.start, e.end, e.interval, e.horizon, sorted(e.symbols)


def _whoami() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's numeric user has no name
        return str(os.getuid())
