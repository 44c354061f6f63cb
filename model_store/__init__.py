"""Immutable, content-addressed versions of models, and the aliases that point at them."""
