"""Candles into a running service: from files, from standard input, from exchanges. Speaks to it over HTTP only."""
