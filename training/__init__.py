"""Candles in, versions out: files, windows, the loop, evaluation. Never imported by the service."""
