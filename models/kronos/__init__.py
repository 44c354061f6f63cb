"""Kronos (NeoQuasar): candles to token pairs, an autoregressive decoder over them, and back."""
