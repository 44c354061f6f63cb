"""A loop over an exchange of ccxt that trades on forecasts, on paper: no order is sent.

    pip install ./client ccxt
    python examples/ccxt_loop.py BTC/USDT --exchange binance --interval 1h --model toto
    python examples/ccxt_loop.py AAPL --replay data/samples/AAPL.csv --since 2012-01-01 --model toto

Once a candle has closed, by the exchange's own clock, it asks what comes next, and holds the asset until the next one
has closed if the median close at the horizon lies above the last close by more than both trades cost, unless the
service says not to act on it. The open candle, which exchanges send too, is never used. The account is reckoned as if
each order were filled at the close that it follows. `--replay` goes through a file of candles, with a clock that jumps
from close to close.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ccxt
import pandas as pd

from candlecast_client import (
    Candlecast,
    DeadlineExceeded,
    NoAnswer,
    TooManyRequests,
    Unavailable,
    from_ccxt,
    from_frame,
)

LOOKBACK = 256
FEE = 0.001  # of what is bought or sold
PASSING = (ccxt.NetworkError, DeadlineExceeded, NoAnswer, TooManyRequests, Unavailable)


class Replay(ccxt.Exchange):
    """An exchange whose past is a file and whose time is `now`; its newest candle is open, as everywhere."""

    def __init__(self, candles: pd.DataFrame, now: int) -> None:
        super().__init__()
        opens = candles.index.astype("datetime64[ms, UTC]").astype("int64")
        prices = candles[["open", "high", "low", "close", "volume"]].to_numpy().tolist()
        self.rows = [[at, *row] for at, row in zip(opens.tolist(), prices, strict=True)]
        self.now = now

    def milliseconds(self) -> int:
        return self.now

    def fetch_ohlcv(
        self, symbol: str, timeframe: str = "1d", since: Any = None, limit: Any = None, params: Any = None
    ) -> Any:
        return [row for row in self.rows if row[0] <= self.now][-(limit or 500) :]

    def wait(self, milliseconds: int) -> bool:
        """Until the next candle has closed; False where there is none."""
        self.now = next((row[0] + milliseconds for row in self.rows if row[0] + milliseconds > self.now), 0)
        return self.now > 0


@dataclass
class Decision:
    """What was decided once a candle had closed at `price`, and what the account was worth then."""

    as_of: int
    price: float
    expected: float  # log-return at the horizon
    hold: bool
    equity: float


def decisions(
    exchange: ccxt.Exchange,
    client: Candlecast,
    symbol: str,
    interval: str,
    *,
    heed: bool = True,
    threshold: float = 2 * FEE,
    **asked: Any,
) -> Iterator[Decision]:
    """One for each candle that closes, for ever, or as long as a replay has candles."""
    step = 1000 * exchange.parse_timeframe(interval)
    equity, held, last = 1.0, False, None
    while True:
        try:
            rows = exchange.fetch_ohlcv(symbol, interval, limit=LOOKBACK + 1)
            closed = [row for row in rows if row[0] + step <= exchange.milliseconds()]
            if closed and (last is None or closed[-1][0] > last[0]):
                as_of, price = closed[-1][0] + step, closed[-1][4]
                found = client.forecast(from_ccxt(closed), symbol=symbol, interval=interval, as_of=as_of, **asked)
                expected = float(found.returns["cumulative"].iloc[-1])
                hold = expected > threshold and (found.do_predict or not heed)
                equity *= (price / last[4] if held and last else 1.0) * (1 - FEE if hold != held else 1.0)
                held, last = hold, closed[-1]
                yield Decision(as_of, price, expected, hold, equity)
        except PASSING as error:  # what is held stays held
            print(f"no decision: {error}")
        if not isinstance(exchange, Replay):
            time.sleep(5)
        elif not exchange.wait(step):
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("symbol")
    parser.add_argument("--exchange", default="binance", help="any of ccxt's")
    parser.add_argument("--replay", metavar="CSV", help="daily candles to go through instead")
    parser.add_argument("--since", default="2012-01-01", help="where the replay begins to trade")
    parser.add_argument("--interval", default="1d")
    parser.add_argument("--model", default="toto")
    parser.add_argument("--horizon", type=int, default=5)
    parser.add_argument("--regardless", action="store_true", help="act where the service says not to, too")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    args = parser.parse_args()
    if args.replay:
        candles = from_frame(pd.read_csv(args.replay, index_col=0, parse_dates=True))
        exchange = Replay(candles, int(pd.Timestamp(args.since, tz="UTC").timestamp() * 1000))
    else:
        exchange = getattr(ccxt, args.exchange)({"enableRateLimit": True})
    first = None
    with Candlecast(args.url) as client:
        asked = {"model": args.model, "horizon": args.horizon, "heed": not args.regardless}
        for each in decisions(exchange, client, args.symbol, args.interval, **asked):
            first = first or each
            when = pd.Timestamp(each.as_of, unit="ms")
            account, market = 100 * (each.equity - 1), 100 * (each.price / first.price - 1)
            state = "hold" if each.hold else "out "
            print(f"{when:%Y-%m-%d %H:%M} {state} account {account:+.1f} %, buy and hold {market:+.1f} %", flush=True)
    print("One stretch of one series, on paper: it shows how to ask, and promises nothing.")


if __name__ == "__main__":
    main()
