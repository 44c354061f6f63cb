"""The page in a real browser, against a real service whose clock stands still."""

import io
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import httpx
import numpy as np
import pytest
import uvicorn
from matplotlib.image import imread
from numpy.typing import NDArray
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

from model_store.store import ModelStore
from service.app import create_app
from service.settings import Settings
from tests.service.conftest import HOUR, NOW, build_naive, put_version_without_weights

DAY: Final = 24 * HOUR
_PATIENCE_MS: Final = 60_000  # a busy machine is slow
_CHROMIUM: Final = ("chromium", "chromium-browser", "google-chrome")


class Service(NamedTuple):
    """Where it listens, and its clock; `put` stores closes that end with the candle before the clock's."""

    url: str
    clock: list[int]

    def put(self, symbol: str, interval: str, step: int, closes: list[float], *, end: int | None = None) -> None:
        last = (self.clock[0] if end is None else end) // step * step - step
        times = range(last - step * (len(closes) - 1), last + 1, step)
        rows = [[time, close, 1.01 * close, 0.99 * close, close, 5] for time, close in zip(times, closes, strict=True)]
        body = {"candles": rows, "interval": interval, "calendar": "24/7"}
        httpx.put(f"{self.url}/candles/{symbol}", json=body).raise_for_status()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """BTC, hourly and watched; OLD, daily, whose candles ended long ago."""
    home, clock = tmp_path_factory.mktemp("page"), [NOW]
    store = ModelStore(home / "store")
    for name in ("naive", "toto-demo"):
        put_version_without_weights(store, name)
    settings = Settings(home=home, store_root=store.root, watch="BTC:naive:3")  # type: ignore[arg-type]
    app = create_app(settings, build=build_naive, now=lambda: clock[0])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            threading.Event().wait(0.01)
        host, port = server.servers[0].sockets[0].getsockname()
        running = Service(f"http://{host}:{port}", clock)
        running.put("BTC", "1h", HOUR, [100 + place % 7 for place in range(80)])
        running.put("OLD", "1d", DAY, [0.5 + place % 3 / 50 for place in range(40)], end=NOW - 400 * DAY)
        yield running
    finally:
        app.state.services.drain()  # or the server would wait for streams
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, _CHROMIUM)), None)
    if path is None:
        pytest.fail("no Chromium here: apt-get install --no-install-recommends chromium")
    expect.set_options(timeout=_PATIENCE_MS)
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=path, args=["--disable-gpu"]) as launched,
    ):
        yield launched


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, service: Service) -> Iterator[Open]:
    """Open the page at a query. What the console, a script or the policy complains of fails the test; the browser's
    own line for an answer that is an error does too, unless `refusals` says that there will be some."""
    complaints: list[str] = []
    expected, context = False, None

    def start(
        query: str = "", *, refusals: bool = False, before: Callable[[Page], object] | None = None, **options: Any
    ) -> Page:
        nonlocal expected, context
        expected = refusals
        context = browser.new_context(**{"viewport": ViewportSize(width=1280, height=800), **options})
        page = context.new_page()
        page.set_default_timeout(_PATIENCE_MS)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
        if before:
            before(page)
        page.goto(f"{service.url}/{query}")
        expect(page.locator("#forecast")).to_have_attribute("aria-busy", "false")
        return page

    yield start
    if context:
        context.close()
    assert [line for line in complaints if not (expected and line.startswith("Failed to load resource"))] == []


def pixels(page: Page, selector: str) -> NDArray[np.int64]:
    """A screenshot as [pixels, 3] from 0 to 255."""
    image = imread(io.BytesIO(page.locator(selector).screenshot()), format="png")
    return np.rint(255 * image[..., :3]).astype(np.int64).reshape(-1, 3)


def test_first_view_is_the_watch_lists_forecast_drawn(open_page: Open, service: Service) -> None:
    asked: list[str] = []
    page = open_page(before=lambda page: page.on("request", lambda request: asked.append(request.url)))
    expect(page.locator("h2#title")).to_have_text("BTC1h")
    expect(page.locator("#figures dt")).to_have_text(
        ["Last close", "Median in 3 candles", "80 % band", "Chance of a rise"]
    )
    expect(page.locator("#health")).to_have_text("Service ready")
    expect(page.locator("#freshness")).to_contain_text("updates live")
    assert all(url.startswith(service.url) for url in asked)
    assert page.locator("#chart path.band").count() == 1
    bodies = [page.locator(f"#chart path.{way}").get_attribute("d") or "" for way in ("up", "down")]
    assert sum(path.count("M") for path in bodies) == 80
    shown = pixels(page, "#chart")
    ink, blue = (np.abs(shown - colour).max(axis=1) < 8 for colour in ([26, 29, 35], [47, 85, 212]))
    assert ink.sum() > 500
    assert blue.sum() > 50
    assert 0.5 < (shown == 255).all(axis=1).mean() < 0.99


def test_choices_are_in_the_address_and_back_undoes_them(open_page: Open, service: Service) -> None:
    page = open_page()
    page.get_by_label("Symbol").select_option("OLD")
    expect(page.locator("#title")).to_have_text("OLD1d")
    page.get_by_label("Horizon").fill("12")
    page.keyboard.press("Tab")
    expect(page.locator("#figures")).to_contain_text("Median in 12 candles")
    assert page.url == f"{service.url}/?symbol=OLD&interval=1d&model=naive&horizon=12"
    page.reload()
    expect(page.locator("#figures")).to_contain_text("Median in 12 candles")
    page.go_back()
    page.go_back()
    expect(page.locator("#title")).to_have_text("BTC1h")


def test_reasons_not_to_act_are_said_in_words(open_page: Open) -> None:
    page = open_page("?symbol=OLD&model=naive")
    expect(page.locator("#verdict")).to_contain_text("Do not act on this forecast.")
    expect(page.locator("#verdict")).to_contain_text("The stored candles end in the past")
    expect(page.locator("#freshness")).to_contain_text("1.1 years old")


def test_refusals_say_what_to_do_and_another_choice_recovers(open_page: Open, service: Service) -> None:
    page = open_page("?symbol=NOPE", refusals=True)
    expect(page.get_by_role("alert")).to_contain_text("No candles of NOPE are stored.")
    expect(page.get_by_role("alert")).to_contain_text("PUT /candles/{symbol}")
    expect(page.locator("#forecast")).to_be_hidden()
    page.goto(f"{service.url}/?symbol=<img src=x onerror=alert(1)>")
    expect(page.get_by_role("alert")).to_contain_text("Status 422")
    page.goto(f"{service.url}/?symbol=BTC&model=naive&horizon=5000")
    expect(page.get_by_role("alert")).to_contain_text("Status 422")
    expect(page.locator("#chart path.wicks")).to_be_attached()
    page.get_by_label("Horizon").fill("3")
    page.get_by_label("Horizon").blur()
    expect(page.locator("#figures")).to_contain_text("Last close")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_service_that_is_down_is_said_and_asked_again(open_page: Open) -> None:
    def cut(page: Page) -> None:
        page.route(re.compile("/(symbols|models|watch|readyz)$"), lambda route: route.abort())

    page = open_page(refusals=True, before=cut)
    expect(page.get_by_role("alert")).to_contain_text("The service does not answer.")
    expect(page.locator("#health")).to_have_text("Service not reachable")
    page.unroute_all()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#title")).to_have_text("BTC1h")


def test_refused_page_asks_for_a_key_and_sends_it_in_the_header_alone(open_page: Open) -> None:
    sent: list[tuple[str, str | None]] = []

    def guard(page: Page) -> None:
        def answer(route: Any) -> None:
            authorization = route.request.headers.get("authorization")
            sent.append((route.request.url, authorization))
            refusal = {"status": 401, "json": {"detail": "a key is needed", "next_steps": ["Send one."]}}
            route.continue_() if authorization == "Bearer cc_test" else route.fulfill(**refusal)

        page.route(re.compile("/(symbols|models|watch|candles|forecasts?|accuracy)(/|[?]|$)"), answer)

    page = open_page(refusals=True, before=guard)
    expect(page.get_by_role("alert")).to_contain_text("A key is needed.")
    page.get_by_label("API key", exact=True).fill("cc_test")
    page.keyboard.press("Enter")
    expect(page.locator("#figures")).to_contain_text("Last close")
    expect(page.locator("#freshness")).to_contain_text("updates live")
    page.reload()
    expect(page.locator("#figures")).to_contain_text("Last close")
    assert {"stream", "latest"} & {url.partition("?")[0].rpartition("/")[2] for url, key in sent if key}
    assert not any("cc_test" in url for url in [page.url, *(url for url, _ in sent)])


def test_everything_is_reached_by_keyboard(open_page: Open) -> None:
    page = open_page("?symbol=BTC&model=naive")
    expect(page.get_by_label("Past forecast")).to_be_enabled()
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the forecast")).to_be_focused()
    reached = []
    for _ in range(10):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached == [
        *("access-toggle", "A", "symbol", "interval", "model", "horizon", "chart", "lookback", "SUMMARY"),
        "BODY",
    ]
    page.get_by_label("Symbol").focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#title")).to_have_text("OLD1d")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#figures")).to_contain_text("Median in 3 candles")
    page.locator("#chart").focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "2px"
    page.keyboard.press("ArrowRight")
    expect(page.locator("#readout")).to_contain_text("step 1")
    told = """() => {
        document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
        return document.getElementById("readout").getAttribute("aria-live");
    }"""
    assert page.evaluate(told) == "polite"  # at once: a refresh draws anew, and is not read out
    page.keyboard.press("Home")
    expect(page.locator("#readout")).not_to_contain_text("step")


def test_phone_scrolls_in_one_direction_and_follows_light_and_dark(open_page: Open) -> None:
    page = open_page(viewport=ViewportSize(width=360, height=740), has_touch=True, is_mobile=True)
    expect(page.locator("#record h3, #record caption")).to_be_attached()
    page.get_by_text("The forecast in numbers").tap()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    light = pixels(page, "#chart").mean()
    page.emulate_media(color_scheme="dark")
    assert light > 200 > 60 > pixels(page, "#chart").mean()


def test_closed_candle_appears_with_its_forecast_and_what_the_last_one_was_worth(
    open_page: Open, service: Service
) -> None:
    page = open_page("?symbol=BTC&model=naive")
    expect(page.locator("#freshness")).to_contain_text("updates live")
    service.clock[0] += HOUR
    service.put("BTC", "1h", HOUR, [104.25])
    expect(page.locator("#figures")).to_contain_text("104.25")
    expect(page.locator("#announcement")).to_contain_text("New forecast. BTC: last close 104.25")
    expect(page.locator("#record table")).to_contain_text("1–8")
    page.get_by_label("Past forecast").fill("1")
    expect(page.locator("#lookback-value")).to_have_text("1")
    expect(page.locator("#lookback-text")).to_contain_text("1 closed, 0 of them inside the 80 % band")
    assert page.locator("#chart path.past.median").count() == 1


def test_files_carry_the_policy_and_are_sent_once(service: Service) -> None:
    with httpx.Client(base_url=service.url) as client:
        page = client.get("/")
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in page.headers["content-security-policy"]
        assert not re.search(r"<style|style=|<script(?! type=\"module\" src=)| on\w+=", page.text)
        for name in ["", *re.findall(r'(?:href|src)="(page/[^"]+)"', page.text)]:
            sent = client.get(f"/{name}")
            assert (sent.status_code, sent.headers["content-encoding"]) == (200, "gzip")
            assert sent.headers["x-content-type-options"] == "nosniff"
            again = client.get(f"/{name}", headers={"If-None-Match": sent.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            plain = client.get(f"/{name}", headers={"Accept-Encoding": "identity"})
            assert plain.content == sent.content
            assert plain.headers["etag"] != sent.headers["etag"]
        assert client.get("/page/nothing.js").json()["code"] == "not_found"


def test_served_forecasts_can_be_those_of_one_version_alone(service: Service) -> None:
    with httpx.Client(base_url=service.url) as client:
        exact = f"naive@{client.post('/forecast/BTC', json={'model': 'naive'}).json()['model']['version']}"
        for wanted in (exact, "toto-demo@other"):
            rows = client.get("/forecasts/BTC", params={"model": wanted}).json()["rows"]
            assert {row[4] for row in rows} == ({exact} if wanted == exact else set())


def test_watch_list_says_what_can_be_streamed(service: Service) -> None:
    entries = httpx.get(f"{service.url}/watch").json()["entries"]
    assert entries == [{"symbol": "BTC", "interval": "1h", "model": "naive", "horizon": 3}]
