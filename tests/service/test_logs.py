"""Request ids, from the caller to the answer, the problem and the log."""

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest

from service.logs import set_up

pytestmark = pytest.mark.anyio

MADE = re.compile(r"[0-9a-f]{16}")


@pytest.fixture
def restored() -> Iterator[None]:
    """The root logger as it was."""
    root, answers = logging.getLogger(), logging.getLogger("service.answers")
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], answers.level = handlers, logging.NOTSET
    root.setLevel(level)


async def test_a_request_s_id_is_in_its_answer_and_its_problem(client: Any) -> None:
    for path in ("/livez", "/nowhere", "/v2/nowhere"):
        answer = await client.get(path, headers={"X-Request-ID": "order-42.a_B"})
        assert answer.headers.get_list("x-request-id") == ["order-42.a_B"]
        if path == "/nowhere":
            assert answer.json()["request_id"] == "order-42.a_B"


@pytest.mark.parametrize("sent", [[], [""], ["a b"], ["a" * 65], ["a", "b"], ["é".encode()], ['x", "level": "']])
async def test_an_id_that_is_none_is_replaced(client: Any, sent: list[Any]) -> None:
    answer = await client.get("/nowhere", headers=[("X-Request-ID", each) for each in sent])
    (made,) = answer.headers.get_list("x-request-id")
    assert MADE.fullmatch(made)
    assert answer.json()["request_id"] == made
    assert (await client.get("/nowhere")).json()["request_id"] != made


@pytest.mark.usefixtures("restored")
async def test_an_unforeseen_failure_is_found_in_the_log_by_its_id(
    running: Any, rows: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        logging.getLogger("service.x").warning("about to fail")
        raise ZeroDivisionError

    set_up("json")
    monkeypatch.setattr("service.api.routes.forecast.settled", fail)
    async with running() as (client, _):
        answer = await client.post("/forecast/BTC", json={"candles": rows()}, headers={"X-Request-ID": "f1"})
    assert (answer.status_code, answer.json()["request_id"]) == (500, "f1")
    assert answer.headers.get_list("x-request-id") == ["f1"]
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    warned, answered = (line for line in lines if line["logger"] in ("service.x", "service.answers"))
    assert (warned["level"], warned["message"], warned["request_id"]) == ("warning", "about to fail", "f1")
    assert (answered["route"], answered["status"], answered["request_id"]) == ("/forecast/{symbol}", 500, "f1")


@pytest.mark.usefixtures("restored")
async def test_lines_of_text_have_the_id_too_and_answers_none(client: Any, capsys: Any) -> None:
    set_up("text")
    await client.get("/livez", headers={"X-Request-ID": "t1"})
    logging.getLogger("service.x").warning("out of order")
    assert capsys.readouterr().err == "WARNING service.x: out of order [t1]\n"
