"""The HTTP service: candles in, forecasts out."""
