"""A nautilus_trader strategy that trades on forecasts, each made of the bars that had closed when it was made.

    pip install ./client -r examples/nautilus.txt
    python examples/nautilus_actor.py data/samples/AAPL.csv --symbol AAPL --model toto --since 2012-01-01

When a bar has closed it asks what comes next, and holds the asset until the next one has closed if the median close at
the horizon lies above the last close by more than both trades cost, unless the service says not to act on it. The
engine fills its orders at the close that they follow. In a live node the same class waits for each answer, for
`timeout` seconds at most.
"""

import argparse
from decimal import Decimal

import pandas as pd
from nautilus_trader.backtest.engine import BacktestEngine, BacktestEngineConfig
from nautilus_trader.config import LoggingConfig, StrategyConfig
from nautilus_trader.model.currencies import USD
from nautilus_trader.model.data import Bar, BarType
from nautilus_trader.model.enums import AccountType, BarAggregation, OmsType, OrderSide
from nautilus_trader.model.identifiers import InstrumentId, Symbol, Venue
from nautilus_trader.model.instruments import Equity
from nautilus_trader.model.objects import Money, Price, Quantity
from nautilus_trader.persistence.wranglers import BarDataWrangler
from nautilus_trader.trading.strategy import Strategy

from candlecast_client import Candlecast, CandlecastError, from_frame

LOOKBACK = 256
CASH = 100_000
FEE = 0.001  # of what is bought or sold
PRICES = ["open", "high", "low", "close", "volume"]
UNITS = {BarAggregation.MINUTE: "m", BarAggregation.HOUR: "h", BarAggregation.DAY: "d"}


class ForecastingConfig(StrategyConfig, frozen=True):
    """Which bars are traded from when on, and what is asked about them."""

    bar_type: BarType
    since: pd.Timestamp = pd.Timestamp(0, tz="UTC")
    url: str = "http://127.0.0.1:8000"
    key: str | None = None
    timeout: float = 30.0
    model: str = "toto"
    horizon: int = 5
    regardless: bool = False  # whether to act where the service says not to
    threshold: float = 0.002  # log-return at the horizon above which it is held: what both trades cost


class Forecasting(Strategy):
    """Long or out, with all that the account has."""

    def on_start(self) -> None:
        bars = self.config.bar_type
        self.client = Candlecast(self.config.url, self.config.key, timeout=self.config.timeout)
        self.step = pd.Timedelta(bars.spec.timedelta)
        self.interval = f"{bars.spec.step}{UNITS[bars.spec.aggregation]}"
        self.subscribe_bars(bars)

    def on_bar(self, bar: Bar) -> None:
        if pd.Timestamp(bar.ts_event, tz="UTC") - self.step < self.config.since:
            return
        id = bar.bar_type.instrument_id
        try:
            hold = self.decide(bar)
        except CandlecastError as error:  # what is held stays held
            self.log.error(f"no decision: {error}")
            return
        if hold and self.portfolio.is_flat(id):
            instrument = self.cache.instrument(id)
            free = self.portfolio.account(id.venue).balance_free(instrument.quote_currency)
            quantity = instrument.make_qty(float(free) / (float(bar.close) * (1 + FEE)), round_down=True)
            self.submit_order(self.order_factory.market(id, OrderSide.BUY, quantity))
        elif not hold:
            self.close_all_positions(id)

    def decide(self, bar: Bar) -> bool:
        """Whether to hold after this bar, by those that the engine has handed out."""
        bars = self.cache.bars(bar.bar_type)[:LOOKBACK][::-1]  # it has the newest first
        known = pd.DataFrame(
            [[float(getattr(each, name)) for name in PRICES] for each in bars],
            pd.to_datetime([each.ts_event for each in bars], utc=True) - self.step,
            PRICES,
        )
        symbol = bar.bar_type.instrument_id.symbol.value
        asked = {"model": self.config.model, "horizon": self.config.horizon}
        found = self.client.forecast(known, symbol=symbol, interval=self.interval, **asked)
        expected = float(found.returns["cumulative"].iloc[-1])
        hold = expected > self.config.threshold and (found.do_predict or self.config.regardless)
        self.log.info(f"{symbol} after {known.index[-1]}: {expected!r}, {'hold' if hold else 'out'}")
        return hold

    def on_stop(self) -> None:
        self.close_all_positions(self.config.bar_type.instrument_id)
        self.client.close()


def run(candles: pd.DataFrame, symbol: str, *, verbose: bool = False, **settings: object) -> tuple[float, int]:
    """The worth of the account in the end over that at first, and how often it bought, with daily candles."""
    id = InstrumentId(Symbol(symbol), Venue("SIM"))
    fees = dict.fromkeys(("maker_fee", "taker_fee"), Decimal(str(FEE)))
    instrument = Equity(id, id.symbol, USD, 6, Price(1e-6, 6), Quantity.from_int(1), 0, 0, **fees)
    engine = BacktestEngine(BacktestEngineConfig(logging=LoggingConfig(log_level="INFO" if verbose else "ERROR")))
    engine.add_venue(id.venue, OmsType.NETTING, AccountType.CASH, [Money(CASH, USD)], base_currency=USD)
    engine.add_instrument(instrument)
    bars = BarType.from_str(f"{id}-1-DAY-LAST-EXTERNAL")
    closed = candles.set_axis(candles.index + pd.Timedelta(days=1))  # a bar bears the time of its close
    engine.add_data(BarDataWrangler(bars, instrument).process(closed))
    engine.add_strategy(Forecasting(ForecastingConfig(bar_type=bars, **settings)))
    engine.run()
    worth = float(engine.portfolio.account(id.venue).balance_total(USD)) / CASH
    trades = sum(order.is_buy and order.filled_qty > 0 for order in engine.cache.orders())
    engine.dispose()
    return worth, trades


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv")
    parser.add_argument("--symbol", required=True)
    parser.add_argument("--since", default="2012-01-01", help="first day to trade")
    parser.add_argument("--model", default="toto")
    parser.add_argument("--horizon", type=int, default=5)
    parser.add_argument("--regardless", action="store_true", help="act where the service says not to, too")
    parser.add_argument("--threshold", type=float, default=0.002, help="log-return above which it is held")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--verbose", action="store_true", help="tell each decision and order")
    args = vars(parser.parse_args())
    candles = from_frame(pd.read_csv(args.pop("csv"), index_col=0, parse_dates=True))
    since = args["since"] = pd.Timestamp(args["since"], tz="UTC")
    worth, trades = run(candles, **args)
    traded = candles["close"].loc[since:]
    print(
        f"{args['symbol']} by {args['model']}, {traded.index[0]:%Y-%m-%d} to {traded.index[-1]:%Y-%m-%d}, 0.1 % a trade"
    )
    print(f"strategy     {100 * (worth - 1):8.1f} %, {trades} trades")
    print(f"buy and hold {100 * (traded.iloc[-1] / traded.iloc[0] - 1):8.1f} %")
    print("One stretch of one series: it shows how to ask, and promises nothing.")


if __name__ == "__main__":
    main()
