"""The Open Inference Protocol: Triton's own client against a running service, and what it refuses."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from bench.service import HOUR_MS, Service, ccxt_rows, start_service
from model_store.store import ModelStore
from service.keys import KeyFile, grant

ASKED = {"symbol": "btc/usdt", "interval": "1h", "horizon": 3, "seed": 7, "samples": 2}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, put_tiny: Any) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("inference")
    store = ModelStore(folder / "store")
    put_tiny(store, "kronos")
    with start_service(store, folder / "home", {"CANDLECAST_RUNTIME": "eager-float32"}) as service:
        service.put_history(100, "AAPL")
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(service.url.removeprefix("http://")) as client:
        yield client


@pytest.fixture(scope="module")
def sent() -> list[list[float]]:
    return ccxt_rows(40, time.time_ns() // 1_000_000 // HOUR_MS * HOUR_MS - HOUR_MS, HOUR_MS)


def tensors(rows: list[list[float]], binary: bool) -> list[triton.InferInput]:
    candles, times = np.array([row[1:] for row in rows]), np.array([row[0] for row in rows], np.int64)
    given = [triton.InferInput("candles", candles.shape, "FP64"), triton.InferInput("timestamp", times.shape, "INT64")]
    for tensor, values in zip(given, (candles, times), strict=True):
        tensor.set_data_from_numpy(values, binary_data=binary)
    return given


def post(service: Service, rows: list[list[float]] | None, symbol: str, **asked: Any) -> Any:
    body = {"model": "kronos", **asked, **({"candles": rows} if rows else {})}
    answer = httpx.post(f"{service.url}/forecast/{symbol}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def infer(service: Service, body: Any, model: str = "kronos", **headers: str) -> httpx.Response:
    return httpx.post(f"{service.url}/v2/models/{model}/infer", content=json.dumps(body), headers=headers, timeout=60)


def test_the_server_and_its_models_describe_themselves(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["name"] == "candlecast"
    told = client.get_model_metadata("kronos")
    (version,) = told["versions"]
    assert {each["name"]: each["datatype"] for each in told["inputs"]} == {"candles": "FP64", "timestamp": "INT64"}
    assert client.is_model_ready("kronos")
    assert client.is_model_ready("kronos", version)
    assert client.get_model_metadata("kronos-demo", version)["name"] == "kronos-demo"
    assert not client.is_model_ready("kronos", "20250101T000000Z-00000000")
    assert not client.is_model_ready("none")


@pytest.mark.parametrize("binary", [True, False])
def test_the_forecast_is_that_of_the_post_to_the_last_bit(
    client: Any, service: Service, sent: Any, binary: bool
) -> None:
    expected = post(
        service, sent, "BTC-USDT", **{name: ASKED[name] for name in ASKED if name != "symbol"}, cache="bypass"
    )
    names = ("forecast", "timestamp", "quantiles", "levels", "prob_up")
    outputs = None if binary else [triton.InferRequestedOutput(name, binary_data=False) for name in names]
    given = {**ASKED, "cache": "bypass"}
    result = client.infer("kronos", tensors(sent, binary), request_id="42", outputs=outputs, parameters=given)
    forecast = result.as_numpy("forecast")
    assert forecast.tolist() == [row[1:] for row in expected["forecast"]]
    assert len(np.unique(forecast)) > 5  # a network's, not the last close
    assert result.as_numpy("timestamp").tolist() == [row[0] for row in expected["forecast"]]
    assert result.as_numpy("levels").tolist() == [float(level) for level in expected["quantiles"]["close"]]
    bands = [list(expected["quantiles"][name].values()) for name in ("high", "low", "close")]
    assert result.as_numpy("quantiles").tolist() == bands
    assert result.as_numpy("prob_up").tolist() == expected["returns"]["prob_up"]
    told = result.get_response()
    assert told["id"] == "42"
    assert (told["model_name"], told["model_version"]) == ("kronos-demo", expected["model"]["version"])
    assert told["parameters"]["symbol"] == "BTC-USDT"
    assert told["parameters"]["seed"] == 7
    assert told["parameters"]["reasons"].split(", ") == expected["reasons"]


def test_a_version_is_asked_of_stored_candles_for_one_tensor(client: Any, service: Service) -> None:
    (version,) = client.get_model_metadata("kronos")["versions"]
    wanted = [triton.InferRequestedOutput("forecast")]
    given = {"symbol": "AAPL", "horizon": 2, "seed": 1, "quantiles": "0.25,0.5"}
    result = client.infer("kronos", [], version, outputs=wanted, parameters=given, timeout=30_000_000)
    expected = post(service, None, "AAPL", horizon=2, seed=1, quantiles=[0.25, 0.5])
    assert result.as_numpy("forecast").tolist() == [row[1:] for row in expected["forecast"]]
    assert [each["name"] for each in result.get_response()["outputs"]] == ["forecast"]


def test_refusals_are_said_in_the_protocol_s_own_words(client: Any, sent: Any) -> None:
    for status, match, model, rows, given in (
        ("404", "no such model", "none", sent, ASKED),
        ("422", "/horizon: .*greater than or equal to 1", "kronos", sent, {**ASKED, "horizon": 0}),
        ("422", "/paths: is no parameter here", "kronos", sent, {"paths": True}),
        ("422", "/parameters/quantiles: must be numbers", "kronos", sent, {"quantiles": "0.1;0.9"}),
        ("422", "/candles/39/2: ", "kronos", [*sent[:-1], [sent[-1][0], 1, 0.5, 1, 1, 1]], ASKED),
        ("422", "/candles/1/0: ", "kronos", [sent[0], sent[0]], ASKED),
        ("404", "no candles of NONE", "kronos", [], {"symbol": "NONE"}),
        ("422", "name a symbol", "kronos", [], {}),
    ):
        with pytest.raises(InferenceServerException, match=match) as refused:
            client.infer(model, tensors(rows, binary=True) if rows else [], parameters=given)
        assert refused.value.status() == status
    with pytest.raises(InferenceServerException, match="Not Found"):
        client.get_model_config("kronos")


def of(candles: Any = None, **fields: Any) -> dict[str, Any]:
    whole = {"name": "candles", "datatype": "FP64", "shape": [1, 5], "data": [1.0] * 5} | (candles or {})
    return {"inputs": [whole, {"name": "timestamp", "datatype": "INT64", "shape": [1], "data": [HOUR_MS]}], **fields}


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ({"inputs": of()["inputs"][:1]}, "candles and timestamp"),
        (of({"datatype": "INT64"}), "/inputs/0/datatype: must be FP64"),
        (of({"shape": [1, 4]}), "/inputs/0/shape"),
        (of({"shape": [2, 5]}), "/inputs/1/shape"),
        (of({"shape": [1, -5]}), "/inputs/0/shape"),
        (of({"data": [1.0] * 6}), "/inputs/0/data"),
        (of({"data": ["1"] * 5}), "must be a number"),
        (of({"parameters": {"binary_data_size": 40}}), "so many bytes"),
        (of({"parameters": {"binary_data_size": 40.0}}), "so many bytes"),
        (of(outputs=[{"name": "volume"}]), "/outputs/0/name"),
        (of(parameters={"symbol": 5}), "/parameters/symbol"),
        (of(parameters={"symbol": "no symbol"}), "symbol: a symbol has"),
        ([], "valid dictionary"),
    ],
)
def test_tensors_that_do_not_fit_are_named(service: Service, body: Any, match: str) -> None:
    answer = infer(service, body)
    assert answer.status_code == 422, answer.text
    assert answer.json().keys() == {"error"}
    assert match in answer.json()["error"]
    assert answer.headers["content-type"] == "application/json"


def test_lengths_that_lie_are_refused(service: Service) -> None:
    for length in ("-1", "x", "99999", "9" * 50, "²"):
        answer = infer(service, of(), **{"Inference-Header-Content-Length": length.encode()})  # type: ignore[arg-type]
        assert answer.status_code == 400, length
        assert "within the body" in answer.json()["error"]
    body = json.dumps(of()).encode()
    headers = {"Inference-Header-Content-Length": str(len(body))}
    answer = httpx.post(f"{service.url}/v2/models/kronos/infer", content=body + b"1234", headers=headers, timeout=60)
    assert (answer.status_code, answer.json()) == (400, {"error": "there are more bytes than the inputs take"})


@pytest.mark.anyio
async def test_keys_and_limits_speak_the_protocol_too(running: Any, tmp_path: Any, rows: Any) -> None:
    key, _ = KeyFile(tmp_path / "home" / "keys.json").make(grant(name="trader", scopes=["forecast"], symbols=["BTC*"]))
    headers = {"Authorization": f"Bearer {key}"}
    shape = {"candles": [8, 5], "timestamp": [8]}
    data = {"candles": [row[1:] for row in rows()], "timestamp": [row[0] for row in rows()]}
    inputs = [
        {"name": name, "datatype": kind, "shape": shape[name], "data": data[name]}
        for name, kind in (("candles", "FP64"), ("timestamp", "INT64"))
    ]
    async with running(max_body_bytes=10_000) as (client, _):
        for status, symbol, sent, padding in (
            (200, "btc", headers, ""),
            (403, "AAPL", headers, ""),
            (401, "BTC", {}, ""),
            (413, "BTC", headers, " " * 10_000),
        ):
            body = json.dumps({"inputs": inputs, "parameters": {"symbol": symbol, "horizon": 2}}) + padding
            answer = await client.post("/v2/models/naive/infer", content=body, headers=sent)
            assert answer.status_code == status, answer.text
            assert (answer.json().keys() == {"error"}) == (status != 200)
        assert (
            await client.post("/v2/models/naive/infer", json={"inputs": inputs}, headers=headers)
        ).status_code == 403
        assert (await client.get("/v2/health/ready")).json() == {"ready": True}


@pytest.mark.anyio
async def test_an_evaluator_says_where_forecasts_are(running: Any) -> None:
    async with running(role="evaluator") as (client, _):
        answer = await client.post("/v2/models/naive/infer", json={})
        assert (answer.status_code, answer.json()) == (
            404,
            {"error": "this process keeps score, and forecasts nothing"},
        )
