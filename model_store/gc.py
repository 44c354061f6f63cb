"""Which versions nobody needs any more."""

import contextlib

from model_store.files import StoreError, VerificationFailed
from model_store.manifest import Manifest
from model_store.store import ModelStore
from models.ensemble import ENSEMBLE, members_of

KEEP = 3


def unused(store: ModelStore, *, keep: int = KEEP) -> list[Manifest]:
    """Versions that no alias points at or has just left, no running service holds, and no version that is kept was
    made from or blends; nor are they among the `keep` newest of their name. What cannot be read is kept: a later
    release may.
    """
    if keep < 1:
        raise StoreError("keep at least the newest version of every name")
    known: dict[str, Manifest] = {}
    needed: set[str] = set()
    for model in store.models():
        versions = store.versions(model)
        needed |= {*versions[-keep:], *store.used(model)}
        for version in versions:
            try:
                known[version] = store.manifest(f"{model}@{version}")
            except VerificationFailed:
                continue
    waiting = list(needed)
    while waiting:
        manifest = known.get(waiting.pop())
        found = {version for version in _made_of(store, manifest) if version in known} - needed if manifest else set()
        needed |= found
        waiting += found
    return [manifest for version, manifest in known.items() if version not in needed]


def _made_of(store: ModelStore, manifest: Manifest) -> list[str]:
    """Versions of its parent and its members."""
    found = [manifest.origin.revision] if manifest.origin.revision else []
    if manifest.family == ENSEMBLE:
        with contextlib.suppress(VerificationFailed, ValueError):  # nobody can serve it any more
            found += [member.partition("@")[2] for member in members_of(store.config(manifest))]
    return found


def collect(store: ModelStore, *, keep: int = KEEP, reason: str | None = None) -> list[Manifest]:
    """Delete what is unused, and leases that have run out; every deletion is in the log."""
    found = unused(store, keep=keep)
    for model in store.models():
        store.drop_old_leases(model)
    for manifest in found:
        store.delete(manifest, reason=reason)
    return found
