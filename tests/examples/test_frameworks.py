"""The bots of frameworks that have environments of their own, in them, and what every bot's account comes to.

make test-examples makes the environments.
"""

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from candlecast_client import Candlecast, from_frame
from examples.backtesting_strategy import held_out_since
from tests.examples.conftest import ROOT, serving, with_another_future
from tests.feeds.conftest import Exchange

pytestmark = pytest.mark.frameworks

BARS = 24  # that are traded
DECISION = re.compile(r"GOOG\S* after (\S+ \S+): (\S+), (hold|out)")
RESULT = re.compile(r"(?:strategy|account) +(\S+) %[^%]*buy and hold +(\S+) %")


@dataclass
class Run:
    """What a bot decided after each candle, by its opening, and what its account and the asset gained, in %."""

    decisions: dict[str, tuple[str, str]]
    account: float
    market: float


Bot = Callable[..., Run]


def told(command: list[str], **options: Any) -> str:
    """All that a command says; AssertionError with it if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def decided(output: str) -> dict[str, tuple[str, str]]:
    return {at: (expected, hold) for at, expected, hold in DECISION.findall(output)}


@contextmanager
def markets() -> Iterator[dict[str, Any]]:
    """freqtrade's settings of an exchange: the one on this machine, where GOOG is all that can be traded.

    A backtest asks it for nothing but its markets.
    """
    exchange = Exchange(lambda: int(time.time() * 1000))
    exchange.symbols = ["GOOGUSDT"]
    exchange.start()
    at = {"urls": {"api": {"public": f"http://127.0.0.1:{exchange.port}/api/v3"}}}
    spot = {"options": {"fetchMarkets": {"types": ["spot"]}}}
    yield {"name": "binance", "pair_whitelist": ["GOOG/USDT"], "ccxt_config": at | spot}
    exchange.stop()


def freqtrade(place: Path, candles: pd.DataFrame, since: pd.Timestamp, **asked: Any) -> Run:
    """`freqtrade backtesting`, with the candles in its own format."""
    (place / "user_data").mkdir(parents=True)
    opens = candles.index.astype("datetime64[ms, UTC]").astype("int64")
    rows = [[at, *row] for at, row in zip(opens.tolist(), candles.to_numpy().tolist(), strict=True)]
    (place / "GOOG_USDT-1d.json").write_text(json.dumps(rows))
    settings = {
        "stake_currency": "USDT",
        "stake_amount": "unlimited",
        "max_open_trades": 1,
        "dry_run": True,
        "entry_pricing": {"price_side": "other"},
        "exit_pricing": {"price_side": "other"},
        "pairlists": [{"method": "StaticPairList"}],
        "candlecast": asked,
    }
    with markets() as exchange:
        (place / "config.json").write_text(json.dumps(settings | {"exchange": exchange}))
        command = f"backtesting -v --datadir . --data-format-ohlcv json --timerange {since:%Y%m%d}- --fee 0.001"
        strategy = ["--strategy-path", str(ROOT / "examples"), "--strategy", "Forecasting"]
        program = str(ROOT / ".venv-freqtrade" / "bin" / "freqtrade")
        wide = os.environ | {"COLUMNS": "200"}  # or it would break the lines of its log
        output = told([program, *command.split(), *strategy], cwd=place, env=wide)
    (found,) = (place / "user_data" / "backtest_results").glob("*.zip")
    with zipfile.ZipFile(found) as archive:
        result = json.loads(archive.read(f"{found.stem}.json"))["strategy"]["Forecasting"]
    return Run(decided(output), 100 * result["profit_total"], 100 * result["market_change"])


def script(name: str, python: str = sys.executable) -> Bot:
    """The bot of an example that goes through a file of candles."""

    def bot(place: Path, candles: pd.DataFrame, since: pd.Timestamp, **asked: Any) -> Run:
        place.mkdir()
        candles.to_csv(place / "GOOG.csv")
        flags = [f"--{key}" if value is True else f"--{key}={value}" for key, value in asked.items()]
        file = ["GOOG", "--replay=GOOG.csv"] if name == "ccxt_loop" else ["GOOG.csv", "--symbol=GOOG"]
        command = [python, str(ROOT / "examples" / f"{name}.py"), *file, f"--since={since:%Y-%m-%d}", *flags]
        output = told(command, cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT / "client")})
        account, market = RESULT.findall(output)[-1]
        return Run(decided(output), float(account), float(market))

    return bot


nautilus = script("nautilus_actor", str(ROOT / ".venv-nautilus" / "bin" / "python"))
BOTS: dict[str, tuple[Bot, dict[str, Any]]] = {"freqtrade": (freqtrade, {}), "nautilus": (nautilus, {"verbose": True})}
each_bot = pytest.mark.parametrize(("bot", "aloud"), BOTS.values(), ids=list(BOTS))


@pytest.fixture(scope="module")
def candles(packaged_candles: Callable[[str], Path]) -> pd.DataFrame:
    """GOOG's days that backtesting.py brings."""
    return from_frame(pd.read_csv(packaged_candles("GOOG.csv"), index_col=0, parse_dates=True))


@each_bot
def test_a_bot_decides_by_closed_candles_alone(
    bot: Bot, aloud: dict[str, Any], url: str, candles: pd.DataFrame, tmp_path: Path
) -> None:
    since, known = candles.index[-BARS], len(candles) - BARS // 2
    asked = {"url": url, "horizon": 3, "regardless": True, **aloud}
    first = bot(tmp_path / "first", candles, since, **asked)
    other = bot(tmp_path / "other", with_another_future(candles, known), since, **asked)
    traded = [str(at) for at in candles.index[-BARS:]]
    assert set(traded) <= set(first.decisions)
    before = [{at: run.decisions[at] for at in traded[: BARS // 2]} for run in (first, other)]
    assert before[0] == before[1]
    after = [{at: run.decisions[at] for at in traded[BARS // 2 :]} for run in (first, other)]
    assert after[0] != after[1], "the candles make no difference at all"


def test_freqtrade_fills_an_order_at_the_next_open(url: str, candles: pd.DataFrame, tmp_path: Path) -> None:
    asked = {"url": url, "horizon": 3, "regardless": True, "threshold": -1.0}  # always held
    found = freqtrade(tmp_path / "bot", candles, candles.index[-BARS], **asked)
    bought, sold = candles["open"].iloc[1 - BARS], candles["open"].iloc[-1]
    assert found.account == pytest.approx(99 * (0.999 * sold / (1.001 * bought) - 1), abs=0.02), (
        "a hundredth stays in the purse"
    )


def test_nautilus_fills_an_order_at_the_close_before_it(url: str, candles: pd.DataFrame, tmp_path: Path) -> None:
    asked = {"url": url, "horizon": 3, "regardless": True, "threshold": -1.0}  # always held
    found = nautilus(tmp_path / "bot", candles, candles.index[-BARS], **asked)
    bought, sold = candles["close"].iloc[-BARS], candles["close"].iloc[-1]
    assert found.account == pytest.approx(100 * (0.999 * sold / (1.001 * bought) - 1), abs=0.1)


@each_bot
def test_a_forecast_that_should_not_be_acted_on_is_not(
    bot: Bot, aloud: dict[str, Any], url: str, candles: pd.DataFrame, tmp_path: Path
) -> None:
    found = bot(tmp_path / "bot", candles, candles.index[-5], url=url, horizon=3, **aloud)
    assert {hold for _, hold in found.decisions.values()} == {"out"}
    assert found.account == 0


def test_every_bot_trades_what_its_model_has_not_learned_from(url: str, candles: pd.DataFrame, tmp_path: Path) -> None:
    """By the demo model of the store here, if it has one; the accounts are printed, and not judged."""
    bots = {"backtesting": script("backtesting_strategy"), "ccxt": script("ccxt_loop")}
    bots |= {name: bot for name, (bot, _) in BOTS.items()}
    with ExitStack() as stack:
        asked, since = {"url": url, "model": "toto", "regardless": True}, candles.index[-BARS]
        if (ROOT / "model_store" / "artifacts" / "kronos-demo").exists():
            asked["url"] = stack.enter_context(serving(ROOT / "model_store" / "artifacts", tmp_path / "home"))
            asked["model"] = "kronos"  # toto-demo's median hardly moves: nothing would be traded
            with Candlecast(asked["url"]) as client:
                since = held_out_since(client, "kronos")
        runs = {name: bot(tmp_path / name, candles, since, **asked) for name, bot in bots.items()}
    days = f"{since:%Y-%m-%d} to {candles.index[-1]:%Y-%m-%d}"
    print(f"GOOG by {asked['model']}, {days}, acted on regardless, 0.1 % a trade")
    for name, run in runs.items():
        print(f"{name:11} {run.account:+7.1f} %   buy and hold {run.market:+7.1f} %")
    print("One stretch of one series: it shows how to ask, and promises nothing.")
    assert len({round(run.market) for run in runs.values()}) <= 2, "they have not traded the same days"
