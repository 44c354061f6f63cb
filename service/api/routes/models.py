"""GET /models: what the store holds and what is loaded."""

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter

from model_store.manifest import Evaluation, Manifest
from model_store.store import PRODUCTION, ModelStore
from service.api.schemas import EvaluationAnswer, LimitsAnswer, ModelAnswer, ModelsAnswer
from service.services import Parts

router = APIRouter()


@router.get("/models", response_model=ModelsAnswer, summary="Models that can be asked for")
async def get_models(parts: Parts) -> Any:
    """Every version in the store, with its aliases, limits and scores."""
    loaded = set(parts.registry.loaded())
    found = await asyncio.to_thread(_describe_all, parts.registry.store, parts.registry.nicknames, loaded)
    return ModelsAnswer(models=found)


def _describe_all(store: ModelStore, nicknames: Mapping[str, str], loaded: set[str]) -> list[ModelAnswer]:
    answers = []
    for name in store.models():
        aliases = store.aliases(name)
        for version in store.versions(name):
            pointing = sorted(alias for alias, target in aliases.items() if target == version)
            manifest = store.manifest(f"{name}@{version}")
            answers.append(_describe(manifest, pointing, nicknames, f"{name}@{version}" in loaded))
    return answers


def _describe(manifest: Manifest, aliases: list[str], nicknames: Mapping[str, str], loaded: bool) -> ModelAnswer:
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
        loaded=loaded,
        limits=LimitsAnswer(**manifest.limits.model_dump()),
        licence=manifest.origin.licence,
        created_at=manifest.created_at,
        evaluations=[_scores(evaluation) for evaluation in manifest.evaluations],
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
