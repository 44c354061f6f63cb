"""A freqtrade strategy that trades on forecasts, each made of the candles that had closed when it was made.

    pip install ./client -r examples/freqtrade.txt
    freqtrade backtesting --strategy-path examples --strategy Forecasting --config config.json --timerange 20120101-

After the close of each candle it asks what comes next, and holds the asset from the next open on while the median close
at the horizon lies above the last close by more than both trades cost, unless the service says not to act on it. A
backtest asks about each candle of its time range, a running bot about the newest one. The configuration may say
otherwise than here:

    "candlecast": {"url": "http://127.0.0.1:8000", "key": null, "model": "toto", "horizon": 5, "regardless": false}
"""

import logging
from typing import Any, ClassVar

import pandas as pd
from freqtrade.strategy import IStrategy

from candlecast_client import Candlecast

LOOKBACK = 256
DEFAULTS = {
    "url": "http://127.0.0.1:8000",
    "key": None,
    "model": "toto",
    "horizon": 5,
    "regardless": False,
    "threshold": 0.002,  # log-return at the horizon above which it is held: what both trades cost
}

logger = logging.getLogger(__name__)


class Forecasting(IStrategy):
    """Long or out."""

    INTERFACE_VERSION = 3
    timeframe = "1d"
    startup_candle_count = LOOKBACK * 3 // 2  # of which LOOKBACK at least were traded, weekends and holidays apart
    process_only_new_candles = True
    minimal_roi: ClassVar[dict[str, float]] = {}  # the forecast alone decides
    stoploss = -0.99

    def bot_start(self, **_: Any) -> None:
        self.asked = DEFAULTS | self.config.get("candlecast", {})
        self.client = Candlecast(self.asked["url"], self.asked["key"])

    def populate_indicators(self, dataframe: pd.DataFrame, metadata: dict[str, Any]) -> pd.DataFrame:
        """Add `expected`, the log-return at the horizon, and `hold`, 1 or 0; both are NaN where it was not asked.

        freqtrade hands out closed candles alone, and fills in those that an exchange lacks, without volume.
        """
        traded = dataframe[dataframe["volume"] > 0]
        running = self.dp.runmode.value in ("live", "dry_run")
        rows = traded.index[-1:] if running else traded.index[LOOKBACK - 1 :]
        table = [self.decide(traded.loc[:row].iloc[-LOOKBACK:], metadata["pair"]) for row in rows]
        return dataframe.join(pd.DataFrame(table, index=rows, columns=["expected", "hold"], dtype="float64"))

    def decide(self, known: pd.DataFrame, pair: str) -> tuple[float, float]:
        """The log-return that is expected after these candles, and 1 or 0."""
        asked = {name: self.asked[name] for name in ("model", "horizon")}
        found = self.client.forecast(known, symbol=pair, interval=self.timeframe, **asked)
        expected = float(found.returns["cumulative"].iloc[-1])
        hold = expected > self.asked["threshold"] and (found.do_predict or self.asked["regardless"])
        logger.debug("%s after %s: %r, %s", pair, known["date"].iloc[-1], expected, "hold" if hold else "out")
        return expected, float(hold)

    def populate_entry_trend(self, dataframe: pd.DataFrame, metadata: dict[str, Any]) -> pd.DataFrame:
        dataframe["enter_long"] = (dataframe["hold"] == 1).astype(int)
        return dataframe

    def populate_exit_trend(self, dataframe: pd.DataFrame, metadata: dict[str, Any]) -> pd.DataFrame:
        dataframe["exit_long"] = (dataframe["hold"] == 0).astype(int)
        return dataframe
