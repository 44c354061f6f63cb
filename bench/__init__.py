"""Benchmarks against the reference implementations and against the hardware's floor."""
