"""Put, find, verify, load, promote. A version is whole or absent; aliases are the only mutable names."""

import contextlib
import getpass
import json
import os
import re
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import save as save_tensors

from model_store.artefacts import check_runtimes
from model_store.files import (
    StoreError,
    VerificationFailed,
    VersionNotFound,
    check_listing,
    entries_of,
    read_file,
    verify_file,
)
from model_store.gate import Judged, PromotionRefused, refuse_unlike, refuse_worse
from model_store.manifest import (
    ADAPTER,
    CONFIG,
    MANIFEST,
    RUNTIMES,
    SCORES,
    VERSION,
    WEIGHTS,
    Alias,
    Manifest,
    canonical_json,
    in_a_line,
    strict_json,
    version_of,
)
from model_store.roots import root_of
from model_store.signatures import check_signature, signature_of, trusted_key
from model_store.tensors import read_tensors, tensors_of
from models.candles import SYMBOL
from models.ensemble import ENSEMBLE, EnsembleForecaster, member_of, members_of

if TYPE_CHECKING:
    from models.adapters import Matrices
    from models.forecaster import Forecaster

CANDIDATE, PRODUCTION, PREVIOUS, SHADOW = "candidate", "production", "previous", "shadow"
ALIASES: Final = "aliases"
BESIDE: Final = (ALIASES, "audit", "signatures")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_LEASE: Final = timedelta(minutes=10)  # services say every minute what they hold


class _Lease(BaseModel):
    """What a running service holds."""

    at: datetime
    versions: set[str]


@dataclass(frozen=True)
class LoadedVersion:
    """A verified version in memory."""

    manifest: Manifest
    config: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]
    adapter: Mapping[str, torch.Tensor]  # what the weights have added in; mostly there is none
    members: tuple["LoadedVersion", ...] = ()  # of an ensemble

    def build(self, device: str = "cpu") -> "Forecaster":
        """What forecasts with it; VerificationFailed where the config and the tensors are not of one network."""
        from models.families import build_forecaster  # the networks take a second to import

        try:
            if self.members:
                built = [member_of(member.build(device), member.manifest.serving) for member in self.members]
                return EnsembleForecaster.from_config(self.config, built)
            return build_forecaster(self.manifest.family, self.config, self.weights, device)
        except (KeyError, ValueError) as error:
            raise VerificationFailed(f"{self.manifest.model}@{self.manifest.version}: {error}") from error


class ModelStore:
    """Versions under `<root>/<model>/<version>/`, each alias in `<root>/<model>/aliases/<alias>.json`.

    `previous` lies with `production`, so that both change at once. The alias of a symbol is the symbol itself.
    The root is a folder or a URL such as `s3://bucket/prefix`, whose versions are read through a mirror in `cache`.
    """

    def __init__(self, root: str | Path, cache: Path | None = None, public_key: Path | None = None) -> None:
        """Where there is a `public_key`, or CANDLECAST_STORE_PUBLIC_KEY names one, it must have signed what is used."""
        self.where = str(root) if "://" in str(root) else str(Path(root).absolute())  # as another process finds it
        self._at = root_of(root, cache or Path(os.environ.get("CANDLECAST_HOME", "var")) / "store-cache")
        self.root = self._at.folder
        self._key = trusted_key(public_key)

    # -- reading ---------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """Names that have at least one version."""
        return [name for name in self._at.names("") if _NAME.fullmatch(name) and self.versions(name)]

    def versions(self, model: str) -> list[str]:
        """Versions of `model`, oldest first; those with a broken manifest, which no reader loads, before all."""
        _check_name(model)
        return sorted(self._at.versions(model), key=lambda version: (self._created_at(model, version), version))

    def aliases(self, model: str) -> dict[str, str]:
        """Alias to version."""
        found = self._pointers(model)
        known = {alias: pointer.version for alias, pointer in found.items()}
        previous = found[PRODUCTION].previous if PRODUCTION in found else None
        return known | ({PREVIOUS: previous} if previous else {})

    def stamp(self, model: str) -> str:
        """Changes whenever an alias of `model` does; it costs a `stat`."""
        _check_name(model)
        return self._at.stamp(f"{model}/aliases")

    def shadow(self, model: str) -> tuple[str, float] | None:
        """The version that forecasts beside production for nobody to see, and for which share of requests."""
        pointer = self._pointer(model, SHADOW)
        return (pointer.version, pointer.share) if pointer and pointer.share else None

    def log(self, model: str) -> list[dict[str, Any]]:
        """Who did what when and why, oldest first."""
        _check_name(model)
        return [json.loads(data) for _, data in sorted(self._at.read_all(f"{model}/audit").items())]

    def beside(self, model: str) -> dict[str, bytes]:
        """What lies beside the versions of `model`: aliases, log and signatures, by path under the model."""
        _check_name(model)
        return {
            f"{kind}/{name}": data for kind in BESIDE for name, data in self._at.read_all(f"{model}/{kind}").items()
        }

    def resolve(self, reference: str) -> tuple[str, str]:
        """`name` (its production version), `name@version` or `name@alias` as (model, version)."""
        model, _, wanted = reference.partition("@")
        wanted = wanted or PRODUCTION
        _check_name(model)
        version = wanted if VERSION.fullmatch(wanted) else self._version_behind(model, wanted)
        if version is None or not self._has(model, version):
            known = ", ".join([*self.aliases(model), *self.versions(model)]) or "none"
            raise VersionNotFound(f"the store has no {model}@{wanted}; it has: {known}")
        return model, version

    def manifest(self, reference: str) -> Manifest:
        """The manifest of a reference, its own digest checked."""
        return self._read_manifest(*self.resolve(reference))

    def used(self, model: str) -> set[str]:
        """Versions that aliases point at or have just left, or that a running service holds."""
        pointers = self._pointers(model).values()
        held = [versions for run_out, versions in self._leases(model).values() if not run_out]
        return {v for each in pointers for v in (each.version, each.previous) if v}.union(*held)

    def config(self, manifest: Manifest) -> dict[str, Any]:
        """Its `config.json`, verified, without its weights."""
        return _parse_config(self._read_file(manifest, CONFIG), f"{manifest.model}@{manifest.version}")

    def members(self, manifest: Manifest) -> tuple[str, ...]:
        """`name@version` of every member of an ensemble; nothing for other families.

        VerificationFailed where it names none, or what is an ensemble or is not in the store.
        """
        if manifest.family != ENSEMBLE:
            return ()
        what = f"{manifest.model}@{manifest.version}"
        try:
            found = members_of(self.config(manifest))
            for name in found:
                if not VERSION.fullmatch(name.partition("@")[2]) or self.manifest(name).family == ENSEMBLE:
                    raise ValueError(f"{name[:80]} is not the exact version of a model by itself")
        except (ValueError, VersionNotFound) as error:
            raise VerificationFailed(f"{what}: {error}") from error
        return found

    def verify(self, reference: str) -> Manifest:
        """Hash every file of the version, and of an ensemble's members; VerificationFailed names the first that
        differs."""
        manifest = self._trusted(reference)
        self._at.check(f"{manifest.model}/{manifest.version}", manifest.files)
        self._hash(manifest)
        for member in self.members(manifest):
            self.verify(member)
        return manifest

    def files(self, reference: str) -> tuple[Manifest, dict[str, bytes]]:
        """The manifest, and the bytes of every file of the version, verified and with the manifest's own."""
        model, version = self.resolve(reference)
        data = self._manifest_data(model, version)
        manifest = parse_manifest(data, model, version)
        with self._folder(manifest) as home:
            contents = {
                name: read_file(home / name, entry, f"{manifest.model}@{manifest.version}: {name}")
                for name, entry in manifest.files.items()
            }
        return manifest, {MANIFEST: data, **contents}

    def load(self, reference: str, *, alone: bool = False) -> LoadedVersion:
        """The version's config and tensors; the bytes that were hashed are the bytes that are used.

        With an ensemble come its members, unless it is loaded `alone`.
        """
        manifest = self._trusted(reference)
        files, what = manifest.files, f"{manifest.model}@{manifest.version}"
        with self._folder(manifest) as home:
            config = _parse_config(read_file(home / CONFIG, files[CONFIG], f"{what}: {CONFIG}"), what)
            weights, adapter = (
                read_tensors(home / name, files[name], f"{what}: {name}") if name in files else {}
                for name in (WEIGHTS, ADAPTER)
            )
        members = () if alone else tuple(self.load(member) for member in self.members(manifest))
        return LoadedVersion(manifest, config, weights, adapter, members)

    def matrices(self, reference: str) -> "Matrices":
        """Those of the version's adapter, verified; none of its other files is read."""
        from models.adapters import matrices_of

        manifest = self._trusted(reference)
        what = f"{manifest.model}@{manifest.version}"
        if manifest.adapts is None:
            raise StoreError(f"{what} is no version with an adapter alone")
        tensors = tensors_of(self._read_file(manifest, ADAPTER), f"{what}: {ADAPTER}")
        try:
            return matrices_of(tensors, manifest.adapts[1])
        except ValueError as error:
            raise VerificationFailed(f"{what}: {error}") from error

    def find(self, model: str, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Manifest | None:
        """The newest version of `model` with this very config and these very tensors."""
        wanted = entries_of(_serialise(config, {WEIGHTS: weights}))
        for version in reversed(self.versions(model)):
            with contextlib.suppress(VerificationFailed):  # a broken version is nobody's equal
                manifest = self._read_manifest(model, version)
                if {name: manifest.files[name] for name in (CONFIG, WEIGHTS) if name in manifest.files} == wanted:
                    return manifest
        return None

    # -- writing ---------------------------------------------------------------------------------

    def put(
        self,
        manifest: Mapping[str, Any],
        config: Mapping[str, Any],
        weights: Mapping[str, torch.Tensor],
        adapter: Mapping[str, torch.Tensor] | None = None,
        scores: Mapping[str, torch.Tensor] | None = None,
    ) -> Manifest:
        """Store a version whole or not at all and return its completed manifest.

        `manifest` holds the fields of Manifest but `version` and `files`; `scores` are those of gate.window_scores.
        An equal version is kept as it is.
        """
        contents = _serialise(config, {WEIGHTS: weights, ADAPTER: adapter or {}, SCORES: scores or {}})
        draft = Manifest.model_validate({**manifest, "files": entries_of(contents)})
        complete = draft.model_copy(update={"version": draft.digest()})
        contents[MANIFEST] = canonical_json(complete.model_dump(mode="json"))
        return self.put_files(complete, contents, reason=f"{complete.origin.kind} from {complete.origin.source}")

    def put_files(self, manifest: Manifest, contents: Mapping[str, bytes], *, reason: str | None) -> Manifest:
        """Store a version's files, its manifest among them, as they are; they have been verified.

        Without a reason the log, which is then put back too, does not mention it.
        """
        model, version = manifest.model, manifest.version
        if self._has(model, version):
            return self.verify(f"{model}@{version}")
        self._at.publish(f"{model}/{version}", contents)
        if reason is not None:
            self._record(model, "put", reason, version=version)
        return manifest

    def put_beside(self, model: str, found: Mapping[str, bytes]) -> None:
        """Have the aliases among `found`, as `beside` gave it, and no others; add the rest to what is there."""
        with self._at.locked(model):
            for path, data in sorted(found.items(), reverse=True):  # aliases last
                self._at.write(f"{model}/{path}", data)
            for path in self.beside(model).keys() - found.keys():
                if path.startswith(f"{ALIASES}/"):
                    self._at.remove(f"{model}/{path}")

    def set_alias(self, model: str, alias: str, version: str, *, reason: str | None = None) -> None:
        """Point `alias` at `version` (or at what another alias points at now) atomically."""
        if not _is_alias(alias) or alias == PREVIOUS:
            raise StoreError(
                f"{alias!r} cannot be an alias: use a symbol, or lower-case letters, digits, dots and dashes;"
                f" `{PREVIOUS}` follows {PRODUCTION}"
            )
        _, version = self.resolve(f"{model}@{version}")
        with self._at.locked(model):
            self._point(model, alias, version)
            self._record(model, "alias", reason, alias=alias, version=version)

    def promote(
        self, reference: str, *, symbol: str | None = None, force: str | None = None, reason: str | None = None
    ) -> tuple[Manifest, list[str]]:
        """Make a version its name's production version, or the one that serves `symbol` instead of it.

        The gate asks for every file as it was stored, runtimes that were compared with float32 and the forecast of the
        canary; and, where the version that serves now has an evaluation, for one on the same test set that is not
        worse. `force` is the reason for overriding the last. VerificationFailed or PromotionRefused say what is wrong.
        Returns the version's manifest, and what the gate found.
        """
        if force is not None and not force.strip():
            raise PromotionRefused("an override needs a reason: --force REASON")
        if symbol is not None and not _is_symbol(symbol):
            raise StoreError(f"{symbol!r} cannot have a version of its own: use its upper-case name")
        model, version = self._promotable(reference)
        manifest, notes = self._check(f"{model}@{version}")
        if manifest.symbol not in (None, symbol) and force is None:
            raise PromotionRefused(
                f"{model}@{version} was trained for {manifest.symbol} alone: name it, or say --force"
            )
        alias = symbol or PRODUCTION
        with self._at.locked(model):
            serving = self._pointer(model, alias) or self._pointer(model, PRODUCTION)
            current = serving.version if serving else None
            if current and current != version and force is None:
                before = self.manifest(f"{model}@{current}")
                notes += refuse_worse(self._judged(manifest), self._judged(before), symbol)
            self._point(model, alias, version)
            facts = {"symbol": symbol} if symbol else {}
            self._record(model, "promote", reason, version=version, previous=current, force=force, gate=notes, **facts)
        return manifest, notes

    def rollback(self, model: str, *, symbol: str | None = None, reason: str | None = None) -> Manifest:
        """Serve again what served before; done twice, it is undone.

        A symbol whose first version is taken back is served by production's again. VersionNotFound where nothing
        served before.
        """
        alias = symbol or PRODUCTION
        pointer = self._pointer(model, alias)
        if pointer is None or (pointer.previous is None and not symbol):
            raise VersionNotFound(f"nothing served before as {model}{f' for {symbol}' if symbol else ''}")
        manifest = self.verify(f"{model}@{pointer.previous or PRODUCTION}")
        with self._at.locked(model):
            if self._pointer(model, alias) != pointer:
                raise StoreError(f"{model} was switched meanwhile: look at it again")
            if pointer.previous:
                self._point(model, alias, pointer.previous)
            else:
                self._at.remove(_path_of(model, alias))
            facts = {"symbol": symbol} if symbol else {}
            self._record(model, "rollback", reason, version=manifest.version, previous=pointer.version, **facts)
        return manifest

    def hold(self, model: str, versions: Iterable[str]) -> None:
        """Keep `versions` from being deleted for ten minutes more, in the name of this process."""
        lease = {"at": datetime.now(UTC).isoformat(), "versions": sorted(versions)}
        self._at.write(f"{model}/in-use/{socket.gethostname()}-{os.getpid()}.json", canonical_json(lease))

    def drop_old_leases(self, model: str) -> None:
        """Of processes that are gone."""
        for name, (run_out, _) in self._leases(model).items():
            if run_out:
                self._at.remove(f"{model}/in-use/{name}")

    def delete(self, manifest: Manifest, *, reason: str | None = None) -> None:
        """Delete a version that nothing uses; StoreError where something does."""
        model, version = manifest.model, manifest.version
        if version in self.used(model):
            raise StoreError(f"{model}@{version} is in use")
        self._at.withdraw(f"{model}/{version}")
        self._record(model, "gc", reason, version=version)

    def set_shadow(self, model: str, version: str, share: float, *, reason: str | None = None) -> None:
        """Let `version` (or what an alias points at now) forecast beside production for `share` of the requests."""
        if not 0 < share <= 1:
            raise StoreError(f"the share of a shadow lies above 0 and at most at 1: {share} does not")
        _, version = self.resolve(f"{model}@{version}")
        with self._at.locked(model):
            self._point(model, SHADOW, version, share)
            self._record(model, "shadow", reason, version=version, share=share)

    def end_shadow(self, model: str, *, reason: str | None = None) -> None:
        """Let nothing forecast beside production any more."""
        if self._pointer(model, SHADOW) is None:
            return
        self._at.remove(_path_of(model, SHADOW))
        self._record(model, "shadow", reason, version=None)

    def sign(self, reference: str, key: Path, *, reason: str | None = None) -> Manifest:
        """Verify a version and sign its manifest, `key` being the PEM file of a private Ed25519 key."""
        model, version = self.resolve(reference)
        data = self._manifest_data(model, version)
        manifest = parse_manifest(data, model, version)
        self._hash(manifest)
        self._at.write(_signature_path(model, version), signature_of(data, key))
        self._record(model, "sign", reason, version=version)
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

    def _has(self, model: str, version: str) -> bool:
        try:
            return self._at.manifest(f"{model}/{version}") is not None
        except VerificationFailed:
            return True  # and it is broken

    def _created_at(self, model: str, version: str) -> str:
        try:
            return self._read_manifest(model, version).created_at
        except VerificationFailed:
            return ""

    def _trusted(self, reference: str) -> Manifest:
        """The manifest of a reference, signed where there is a key to trust."""
        model, version = self.resolve(reference)
        data = self._manifest_data(model, version)
        if self._key:
            check_signature(self._key, data, self._at.read(_signature_path(model, version)), f"{model}@{version}")
        return parse_manifest(data, model, version)

    def _read_manifest(self, model: str, version: str) -> Manifest:
        return parse_manifest(self._manifest_data(model, version), model, version)

    def _manifest_data(self, model: str, version: str) -> bytes:
        data = self._at.manifest(f"{model}/{version}")
        if data is None:
            raise VersionNotFound(f"the store has no {model}@{version}")
        return data

    @contextlib.contextmanager
    def _folder(self, manifest: Manifest) -> Iterator[Path]:
        """The folder that has the files of a version and no others; it is not to be trusted after a failure inside."""
        path, what = f"{manifest.model}/{manifest.version}", f"{manifest.model}@{manifest.version}"
        if CONFIG not in manifest.files or manifest.files.keys() - {CONFIG, WEIGHTS, ADAPTER, SCORES}:
            listed = ", ".join(sorted(manifest.files)) or "nothing"
            raise VerificationFailed(f"{what}: {MANIFEST} lists {listed[:200]!r}")
        self._at.bring(path, manifest.files)
        try:
            beside = frozenset({MANIFEST, RUNTIMES})
            check_listing(self.root / path, manifest.files, beside=beside, what=what)
            yield self.root / path
        except VerificationFailed:
            self._at.forget(path)
            raise

    def _hash(self, manifest: Manifest) -> None:
        with self._folder(manifest) as home:
            for name, entry in manifest.files.items():
                verify_file(home / name, entry, f"{manifest.model}@{manifest.version}: {name}")

    def _read_file(self, manifest: Manifest, name: str) -> bytes:
        """One small file, verified."""
        data = self._at.read(f"{manifest.model}/{manifest.version}/{name}")
        if data is None or entries_of({name: data})[name] != manifest.files.get(name):
            raise VerificationFailed(f"{manifest.model}@{manifest.version}: {name} is not what was stored")
        return data

    def _judged(self, manifest: Manifest) -> Judged:
        if SCORES not in manifest.files:
            return Judged(manifest, {})
        what = f"{manifest.model}@{manifest.version}: {SCORES}"
        return Judged(manifest, tensors_of(self._read_file(manifest, SCORES), what))

    def _check(self, exact: str) -> tuple[Manifest, list[str]]:
        """What the gate asks of a version by itself, and notes on it."""
        manifest = self.manifest(exact)
        self._at.check(f"{manifest.model}/{manifest.version}", manifest.files)
        found = self.load(exact)
        check_runtimes(self.root / manifest.model / manifest.version)
        if manifest.canary is None:
            return manifest, ["it carries no canary"]
        return manifest, [refuse_unlike(manifest, manifest.canary, found.build)]

    def _leases(self, model: str) -> dict[str, tuple[bool, set[str]]]:
        """By name, whether it has run out and the versions it holds."""
        found = {}
        for name, data in self._at.read_all(f"{model}/in-use").items():
            try:
                lease = _Lease.model_validate_json(data)
            except ValidationError as error:
                raise VerificationFailed(f"{model}: in-use/{name} is not a lease") from error
            found[name] = datetime.now(UTC) - lease.at > _LEASE, lease.versions
        return found

    def _pointers(self, model: str) -> dict[str, Alias]:
        _check_name(model)
        found = self._at.read_all(f"{model}/aliases")
        names = {name: name.removesuffix(".json") for name in found if name.endswith(".json")}
        return {alias: _parse_alias(model, alias, found[name]) for name, alias in names.items() if _is_alias(alias)}

    def _pointer(self, model: str, alias: str) -> Alias | None:
        _check_name(model)
        data = self._at.read(_path_of(model, alias)) if _is_alias(alias) else None
        return None if data is None else _parse_alias(model, alias, data)

    def _version_behind(self, model: str, alias: str) -> str | None:
        pointer = self._pointer(model, PRODUCTION if alias == PREVIOUS else alias)
        if pointer is None:
            return None
        return pointer.previous if alias == PREVIOUS else pointer.version

    def _point(self, model: str, alias: str, version: str, share: float | None = None) -> None:
        before = self._pointer(model, alias)
        previous = before and (before.previous if before.version == version else before.version)
        pointer = Alias(version=version, previous=previous, share=share)
        self._at.write(_path_of(model, alias), canonical_json(pointer.model_dump(exclude_none=True)))

    def _record(self, model: str, event: str, reason: str | None, **facts: Any) -> None:
        """One object per event, so that no two writers ever share one."""
        now = datetime.now(UTC)
        why = {"reason": reason} if reason else {}
        entry = {"at": now.isoformat(), "event": event, "by": _whoami(), **facts, **why}
        name = f"{now:%Y%m%dT%H%M%S.%fZ}-{event}-{secrets.token_hex(4)}.json"
        self._at.write(f"{model}/audit/{name}", canonical_json(entry))


def parse_manifest(data: bytes, model: str, version: str) -> Manifest:
    """The manifest of `model`@`version`; VerificationFailed unless it is that."""
    try:
        content = strict_json(data)
        manifest, digest = Manifest.model_validate(content), version_of(content)
    except ValueError as error:
        raise VerificationFailed(f"{model}@{version}: {MANIFEST} is not a manifest: {in_a_line(error)}") from error
    if manifest.version != version or digest != version or manifest.model != model:
        raise VerificationFailed(f"{model}@{version}: {MANIFEST} does not hash to its version")
    return manifest


def _parse_config(data: bytes, what: str) -> dict[str, Any]:
    try:
        return strict_json(data)
    except ValueError as error:
        raise VerificationFailed(f"{what}: {CONFIG}: {error}") from error


def _check_name(model: str) -> None:
    if not _NAME.fullmatch(model):
        raise VersionNotFound(f"{model!r} is not a model name")


def _path_of(model: str, alias: str) -> str:
    return f"{model}/aliases/{alias}.json"


def _signature_path(model: str, version: str) -> str:
    return f"{model}/signatures/{version}.ed25519"


def _is_alias(name: str) -> bool:
    return bool(_NAME.fullmatch(name) and not VERSION.fullmatch(name)) or _is_symbol(name)


def _is_symbol(name: str) -> bool:
    return bool(SYMBOL.fullmatch(name) and not VERSION.fullmatch(name))


def _parse_alias(model: str, alias: str, data: bytes) -> Alias:
    try:
        return Alias.model_validate_json(data)
    except ValidationError as error:
        raise VerificationFailed(f"{model}: aliases/{alias}.json is not an alias") from error


def _serialise(config: Mapping[str, Any], tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, bytes]:
    """By file name; a file of no tensors is none."""
    contents = {CONFIG: canonical_json(config)}
    for name, found in tensors.items():
        if found:
            contents[name] = save_tensors({key: found[key].contiguous() for key in sorted(found)})
    return contents


def _whoami() -> str:
    """user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's numeric user has no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
