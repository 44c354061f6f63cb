"""What this process has in memory is said to the store, which deletes nothing that is in use."""

import asyncio
import logging
from collections import defaultdict

from model_store.files import StoreError
from service.engine.registry import Registry

_log = logging.getLogger(__name__)


async def announce(registry: Registry, every: float = 60.0) -> None:
    """Until cancelled, every so many seconds."""
    refused: set[str] = set()
    while True:
        await asyncio.to_thread(announce_once, registry, refused)
        await asyncio.sleep(every)


def announce_once(registry: Registry, refused: set[str]) -> None:
    """Hold every version in memory; of names whose store cannot be written to, as is usual, that is logged once."""
    held: dict[str, list[str]] = defaultdict(list)
    for model in registry.loaded().values():
        held[model.name].append(model.version)
    for name, versions in held.items():
        try:
            registry.store.hold(name, versions)
        except (OSError, StoreError) as error:
            if name not in refused:
                _log.info("what is in use of %s cannot be said to the store: %s", name, error)
            refused.add(name)
