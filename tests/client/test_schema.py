"""The client's types are those that the service documents."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import candlecast_client.schema
from service.app import create_app
from service.settings import Settings

Fields = dict[str, dict[str, str]]
FORECAST = {"ForecastOptions", "ForecastRequest"}  # of which the second has what the first one has


def documented_type(schema: dict[str, Any]) -> str:
    """A type of JSON schema as Python writes it."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "enum" in schema:
        return f"Literal[{', '.join(map(repr, schema['enum']))}]"
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(map(documented_type, schema["anyOf"])))
    if "prefixItems" in schema:
        return f"tuple[{', '.join(map(documented_type, schema['prefixItems']))}]"
    if schema.get("type") == "array":
        return f"list[{documented_type(schema['items'])}]"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return f"dict[str, {documented_type(values) if isinstance(values, dict) else 'Any'}]"
    names = {None: "Any", "string": "str", "number": "float", "integer": "int", "boolean": "bool", "null": "None"}
    return names[schema.get("type")]


@pytest.fixture(scope="module")
def openapi(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("openapi")
    return create_app(Settings(home=place / "home", store_root=place / "store")).openapi()


@pytest.fixture(scope="module")
def documented(openapi: dict[str, Any]) -> Fields:
    return {
        name: {field: documented_type(its) for field, its in schema["properties"].items()}
        for name, schema in openapi["components"]["schemas"].items()
    }


@pytest.fixture(scope="module")
def written() -> Fields:
    tree = ast.parse(Path(candlecast_client.schema.__file__).read_text())
    return {
        each.name: {
            ast.unparse(line.target): ast.unparse(line.annotation)
            for line in each.body
            if isinstance(line, ast.AnnAssign)
        }
        for each in tree.body
        if isinstance(each, ast.ClassDef)
    }


def test_every_answer_has_the_fields_and_types_that_are_documented(written: Fields, documented: Fields) -> None:
    answers = sorted(written.keys() - FORECAST)
    assert len(answers) > 20
    assert {name: written[name] for name in answers} == {name: documented.get(name) for name in answers}


def test_a_forecast_may_be_asked_for_all_that_is_documented(written: Fields, documented: Fields) -> None:
    options, request = written["ForecastOptions"], written["ForecastRequest"]
    asked = {name: hint.replace(" | datetime", "") for name, hint in (options | request).items()}
    assert asked == documented["ForecastRequest"]


def test_every_answer_of_a_call_is_written_down(written: Fields, openapi: dict[str, Any]) -> None:
    """But for those of operators and probes, of the page, and of another protocol's clients."""
    answers = set()
    for path, methods in openapi["paths"].items():
        if not path.endswith(("z", "/shadow", "/weights", "/watch")) and not path.startswith("/v2"):
            answers |= {json.dumps(each["responses"]["200"]) for each in methods.values()}
    named = {name for name in written if any(f"/{name}" in answer for answer in answers)}
    referred = {part.split('"')[0] for answer in answers for part in answer.split("#/components/schemas/")[1:]}
    assert referred - named == set()
