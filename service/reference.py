"""docs/reference.md, made of the code: `python -m service.reference > docs/reference.md`."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Final

from fastapi import FastAPI
from pydantic.fields import FieldInfo

from service.api.errors import NEXT_STEPS
from service.app import create_admin_app, create_app
from service.settings import Settings

_INTRODUCTION: Final = """# Reference

Written by `make reference`.

## Settings

Each is an environment variable, or a file of its name in lower case in `/run/secrets`.
"""
_METRICS: Final = """
## Metrics

At port 8001, `/metrics`, beside those of the process and of Python's memory. What they mean together is in the
[dashboards](../monitoring) and the [runbooks](../monitoring/RUNBOOKS.md).
"""
_ROUTES: Final = """
## Routes

`/docs` describes them in full, `/openapi.json` does so for programs.
"""
_ADMIN_ROUTES: Final = """
At the admin port, 8001:
"""
_ERRORS: Final = """
## Errors

Each is a problem document (RFC 9457) with `code`, `detail`, `errors` (where in the request) and `next_steps`:
"""
_ENDINGS: Final = {"counter": "_total", "info": "_info"}  # which the text format adds to a name


def reference() -> str:
    """The page, the same wherever it is made."""
    routes = [_ROUTES, *_routes(_app()), _ADMIN_ROUTES, *_routes(create_admin_app(_app().state.services))]
    return "\n".join([_INTRODUCTION, *_settings(), _METRICS, *_metrics(), *routes, _ERRORS, *_errors(), ""])


@cache
def _app() -> FastAPI:
    """Never started; model_construct, so that no environment has a say."""
    return create_app(Settings.model_construct())


def _settings() -> Iterator[str]:
    fields = Settings.model_fields.items()
    return _table(
        ("variable", "default", "meaning"),
        ((f"`CANDLECAST_{name.upper()}`", _default(field), field.description or "") for name, field in fields),
    )


def _default(field: FieldInfo) -> str:
    return "" if field.default in (None, "", ()) else f"`{field.default}`"


def _metrics() -> Iterator[str]:
    described = _app().state.services.metrics.registry.collect()
    found = {metric.name: metric for metric in described if metric.name.startswith("candlecast_")}
    return _table(
        ("metric", "kind", "meaning"),
        ((f"`{name}{_ENDINGS.get(its.type, '')}`", its.type, its.documentation) for name, its in sorted(found.items())),
    )


def _routes(app: FastAPI) -> Iterator[str]:
    paths = app.openapi()["paths"]
    return _table(
        ("route", "answer"),
        ((f"`{verb.upper()} {path}`", its["summary"]) for path in sorted(paths) for verb, its in paths[path].items()),
    )


def _errors() -> Iterator[str]:
    return _table(("code", "next step"), ((f"`{code}`", NEXT_STEPS[code]) for code in sorted(NEXT_STEPS)))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


if __name__ == "__main__":
    sys.stdout.write(reference())
