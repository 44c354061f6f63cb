"""A backtesting.py strategy that trades on forecasts, each made of the candles that had closed when it was made.

    pip install ./client backtesting
    python examples/backtesting_strategy.py data/samples/AAPL.csv --symbol AAPL --model toto

After the close of each candle it asks what comes next, and holds the asset from the next open on while the median close
at the horizon lies above the last close by more than both trades cost, unless the service says not to act on it. It
starts where the model's held-out test windows do, so that the model has learned from none of the candles that it is
tried on.
"""

import argparse
from typing import Any

import pandas as pd
from backtesting import Backtest, Strategy

from candlecast_client import Candlecast, from_frame

LOOKBACK = 256


class Forecasting(Strategy):
    """Long or out. Give `client`, `symbol` and what else to `Backtest.run`."""

    client: Candlecast | None = None
    symbol = ""
    model = "toto"
    interval = "1d"
    horizon = 5
    since = pd.Timestamp(0)
    heed = True  # whether to stay out where the service says not to act
    threshold = 0.002  # log-return at the horizon above which it is held: what both trades cost

    def init(self) -> None:
        self.expected: dict[pd.Timestamp, float] = {}  # log-return at the horizon, by the candle that had just closed

    def next(self) -> None:
        if self.data.index[-1] < self.since:
            return
        assert self.client is not None
        known = self.data.df.iloc[-LOOKBACK:]  # of backtesting.py's: it ends with the candle that has just closed
        found = self.client.forecast(
            known, symbol=self.symbol, model=self.model, interval=self.interval, horizon=self.horizon
        )
        expected = self.expected[self.data.index[-1]] = float(found.returns["cumulative"].iloc[-1])
        hold = expected > self.threshold and (found.do_predict or not self.heed)
        if hold and not self.position:
            self.buy()
        elif self.position and not hold:
            self.position.close()


def run(candles: pd.DataFrame, since: pd.Timestamp, **settings: Any) -> "pd.Series[Any]":
    """backtesting.py's statistics of a run from `since` on, with candles as `from_frame` gives them; 0.1 % a trade."""
    first = max(0, candles.index.searchsorted(since) - LOOKBACK)
    named = candles.rename(columns=str.title).tz_localize(None).iloc[first:]
    backtest = Backtest(named, Forecasting, cash=100_000, commission=0.001, finalize_trades=True)
    return backtest.run(since=since.tz_localize(None), **settings)


def held_out_since(client: Candlecast, model: str) -> pd.Timestamp:
    """When the test windows of the version that answers begin."""
    for each in client.models()["models"]:
        if model in each["asked_for_as"]:
            starts = [its["start"] for its in each["evaluations"] if its["windows"] == "test"]
            if starts:
                return pd.Timestamp(starts[0], tz="UTC")
    raise SystemExit(f"{model} tells no test windows: say --since, a day that it has not learned from")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv")
    parser.add_argument("--symbol", required=True)
    parser.add_argument("--model", default="toto")
    parser.add_argument("--horizon", type=int, default=5)
    parser.add_argument("--since", help="first day to trade; default: the first of the model's test windows")
    parser.add_argument("--regardless", action="store_true", help="act where the service says not to, too")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    args = parser.parse_args()
    with Candlecast(args.url) as client:
        since = pd.Timestamp(args.since, tz="UTC") if args.since else held_out_since(client, args.model)
        candles = from_frame(pd.read_csv(args.csv, index_col=0, parse_dates=True))
        asked = {"symbol": args.symbol, "model": args.model, "horizon": args.horizon, "heed": not args.regardless}
        found = run(candles, since, client=client, **asked)
    traded = candles["close"].loc[since:]
    print(f"{args.symbol} by {args.model}, {traded.index[0]:%Y-%m-%d} to {traded.index[-1]:%Y-%m-%d}, 0.1 % a trade")
    print(f"strategy       {found['Return [%]']:8.1f} %, {found['# Trades']} trades")
    print(f"buy and hold   {100 * (traded.iloc[-1] / traded.iloc[0] - 1):8.1f} %")
    print(f"worst drawdown {found['Max. Drawdown [%]']:8.1f} %")
    print("One stretch of one series: it shows how to ask, and promises nothing.")


if __name__ == "__main__":
    main()
