"""From candles to a forecast."""
