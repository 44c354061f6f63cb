"""GET /models: what the store holds and what is loaded."""

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter

from model_store.files import VerificationFailed
from model_store.manifest import Evaluation, Manifest
from model_store.store import PRODUCTION
from service.api.schemas import EvaluationAnswer, LimitsAnswer, ModelAnswer, ModelsAnswer, RuntimeAnswer
from service.engine.registry import LoadedModel, Registry
from service.services import Parts

router = APIRouter()


@router.get("/models", response_model=ModelsAnswer, summary="Models that can be asked for")
async def get_models(parts: Parts) -> Any:
    """Every version in the store, with its aliases, limits and scores, and the names of those that are broken."""
    loaded = parts.registry.loaded()
    return await asyncio.to_thread(_describe_all, parts.registry, loaded)


def _describe_all(registry: Registry, loaded: Mapping[str, LoadedModel]) -> ModelsAnswer:
    """What can be read; one broken version or table of aliases hides nothing else."""
    store, found, broken = registry.store, [], []
    for name in store.models():
        try:
            aliases = store.aliases(name)
        except VerificationFailed as error:  # no version can be resolved without it
            broken.append(registry.note_broken(name, error))
            continue
        for version in store.versions(name):
            exact = f"{name}@{version}"
            pointing = sorted(alias for alias, target in aliases.items() if target == version)
            try:
                found.append(_describe(store.manifest(exact), pointing, registry.nicknames, loaded.get(exact)))
            except VerificationFailed as error:
                broken.append(registry.note_broken(exact, error))
    return ModelsAnswer(models=found, broken=broken)


def _describe(
    manifest: Manifest, aliases: list[str], nicknames: Mapping[str, str], loaded: LoadedModel | None
) -> ModelAnswer:
    name = manifest.model
    asked_for_as = [f"{name}@{target}" for target in (manifest.version, *aliases)]
    if PRODUCTION in aliases:
        asked_for_as = [word for word, meant in nicknames.items() if meant == name] + [name, *asked_for_as]
    return ModelAnswer(
        name=name,
        version=manifest.version,
        family=manifest.family,
        aliases=aliases,
        asked_for_as=asked_for_as,
        loaded=loaded is not None,
        runtime=_runtime(loaded) if loaded else None,
        limits=LimitsAnswer(**manifest.limits.model_dump()),
        licence=manifest.origin.licence,
        created_at=manifest.created_at,
        evaluations=[_scores(evaluation) for evaluation in manifest.evaluations],
    )


def _runtime(model: LoadedModel) -> RuntimeAnswer:
    choice = model.choice
    return RuntimeAnswer(
        name=model.runtime,
        dtype=model.dtype,
        settled=model.settled,
        forced=choice.forced if choice else False,
        times_ms=choice.times_ms if choice else {},
        batch_invariant=choice.batch_invariant if choice else None,
    )


def _scores(evaluation: Evaluation) -> EvaluationAnswer:
    return EvaluationAnswer(
        windows=evaluation.windows,
        start=evaluation.start,
        end=evaluation.end,
        interval=evaluation.interval,
        horizon=evaluation.horizon,
        origins=evaluation.origins,
        metrics={name: metric.model_dump() for name, metric in evaluation.metrics.items()},
    )
