"""Forecasts of candles from a Candlecast service: pandas in, pandas out."""

from candlecast_client.candles import Candles, from_alpaca, from_binance, from_ccxt, from_frame, from_yfinance
from candlecast_client.client import AsyncCandlecast, Candlecast
from candlecast_client.errors import (
    CandlecastError,
    DeadlineExceeded,
    Invalid,
    NoAnswer,
    NotAllowed,
    NotFound,
    TooManyRequests,
    Unavailable,
)
from candlecast_client.forecast import Forecast

__all__ = [
    "AsyncCandlecast",
    "Candlecast",
    "CandlecastError",
    "Candles",
    "DeadlineExceeded",
    "Forecast",
    "Invalid",
    "NoAnswer",
    "NotAllowed",
    "NotFound",
    "TooManyRequests",
    "Unavailable",
    "from_alpaca",
    "from_binance",
    "from_ccxt",
    "from_frame",
    "from_yfinance",
]
