"""GET /models, /models/{name}/shadow and /weights: what the store holds, what answers and why, and what it is worth."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter

from model_store.files import VerificationFailed, VersionNotFound
from model_store.manifest import Evaluation, Manifest
from model_store.store import PRODUCTION
from models.scoring import group_name
from service.api.errors import problems
from service.api.routes.accuracy import scores_answer
from service.api.schemas import (
    ComparedAnswer,
    EvaluationAnswer,
    FailureAnswer,
    LimitsAnswer,
    ModelAnswer,
    ModelsAnswer,
    RuntimeAnswer,
    ShadowAnswer,
    WeightsAnswer,
    WeightsInUse,
)
from service.api.security import GuardedRoute, open_to
from service.engine.failures import Failure
from service.engine.registry import LoadedModel, Registry
from service.score.standings import Compared
from service.score.weights import HALF_LIFE_BLOCKS
from service.services import Parts, Services

router = APIRouter(route_class=GuardedRoute)


@router.get(
    "/models",
    response_model=ModelsAnswer,
    responses=problems(503),
    summary="Models that can be asked for",
    openapi_extra=open_to("forecast", "admin"),
)
async def get_models(parts: Parts) -> Any:
    """Every version in the store, with its aliases, limits and scores, those that are broken, and why any is not
    served."""
    return await asyncio.to_thread(_describe_all, parts.registry)


@router.get(
    "/models/{name}/shadow",
    response_model=ShadowAnswer,
    responses=problems(404, 422, 503),
    summary="What a shadow is worth beside production",
    openapi_extra=open_to("forecast", "admin"),
)
async def get_shadow(name: str, parts: Parts) -> Any:
    """404 where the model has no shadow."""
    name = parts.registry.nicknames.get(name, name)
    found = await shadow_of(name, parts)
    if found is None:
        raise VersionNotFound(f"{name} has no shadow")
    return found


@router.get(
    "/models/{name}/weights",
    response_model=WeightsAnswer,
    responses=problems(404, 422, 503),
    summary="An ensemble's weights, now and before",
    openapi_extra=open_to("forecast", "admin"),
)
async def get_weights(name: str, parts: Parts) -> Any:
    """404 where the model is no ensemble."""
    return await weights_of(*await exact_of(name, parts), parts)


async def exact_of(name: str, parts: Services) -> tuple[str, str]:
    """Model and version that a name means in the store."""
    return await asyncio.to_thread(parts.registry.store.resolve, parts.registry.nicknames.get(name, name))


async def weights_of(model: str, version: str, parts: Services) -> WeightsAnswer:
    """The published weights of an ensemble, and all that followed."""
    exact = f"{model}@{version}"
    former = await parts.weights.former(exact)
    published = parts.weights.published(exact)
    return WeightsAnswer(
        model=model,
        version=version,
        members=list(published.members),
        live=parts.weights.live,
        half_life_blocks=HALF_LIFE_BLOCKS,
        published=_by_group(published.weights),
        in_use=[
            WeightsInUse(
                number=each.number,
                at=each.at,
                why=each.why,
                held=each.held,
                weights={interval: _by_group(rows) for interval, rows in each.weights.items()},
                scores={interval: _by_group(rows) for interval, rows in each.scores.items()},
            )
            for each in reversed(former)
        ],
    )


def _by_group(rows: Sequence[tuple[float, ...] | None]) -> dict[str, list[float]]:
    return {group_name(group): list(row) for group, row in enumerate(rows) if row}


async def shadow_of(name: str, parts: Services) -> ShadowAnswer | None:
    """What a model's shadow is worth so far beside the version that is in production, if it has one."""
    store, registry = parts.registry.store, parts.registry
    shadow = await asyncio.to_thread(store.shadow, name)
    if shadow is None:
        return None
    version, share = shadow
    production = (await asyncio.to_thread(store.aliases, name)).get(PRODUCTION)
    exact = f"{name}@{version}"
    pairs = await parts.evaluator.compared(f"{name}@{production}", exact) if production not in (None, version) else []
    return ShadowAnswer(
        model=name,
        production=production,
        shadow=version,
        share=share,
        loaded=exact in registry.loaded(),
        compared=[_compared(pair) for pair in pairs],
    )


def _compared(pair: Compared) -> ComparedAnswer:
    return ComparedAnswer(
        interval=pair.interval,
        steps=group_name(pair.group),
        symbols=pair.symbols,
        production=scores_answer(pair.version, None),
        shadow=scores_answer(pair.rival, None),
        relative_mae=pair.relative_mae,
        relative_mae_interval=None if pair.low is None or pair.high is None else (pair.low, pair.high),
    )


def _describe_all(registry: Registry) -> ModelsAnswer:
    """What can be read; one broken version or table of aliases hides nothing else."""
    store, loaded, serving = registry.store, registry.loaded(), registry.serving()
    found, broken = [], []
    for name in store.models():
        try:
            aliases = store.aliases(name)
        except VerificationFailed as error:  # no version can be resolved without it
            broken.append(registry.note_broken(name, error))
            continue
        for version in store.versions(name):
            exact = f"{name}@{version}"
            pointing = sorted(alias for alias, target in aliases.items() if target == version)
            answers_for = sorted(alias for (its, alias), served in serving.items() if its == name and served == exact)
            try:
                manifest = store.manifest(exact)
                found.append(_describe(manifest, pointing, answers_for, registry.nicknames, loaded.get(exact)))
            except VerificationFailed as error:
                broken.append(registry.note_broken(exact, error))
    failures = [_failure(*each) for each in sorted(registry.failures.all().items(), key=lambda its: its[0])]
    return ModelsAnswer(models=found, broken=broken, failures=failures)


def _failure(exact: str, failure: Failure) -> FailureAnswer:
    name, _, version = exact.partition("@")
    at = int(1000 * failure.at)
    return FailureAnswer(
        model=name, version=version, reason=failure.reason, detail=failure.detail, at=at, tries=failure.tries
    )


def _describe(
    manifest: Manifest,
    aliases: list[str],
    answers_for: list[str],
    nicknames: Mapping[str, str],
    loaded: LoadedModel | None,
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
        answers_for=answers_for,
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
        base=model.beside.base if model.beside else None,
        canary_moved=model.beside.canary_moved if model.beside else None,
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
