"""Toto 1.0 (Datadog): patches of a multivariate series in, a Student-T mixture per step out."""
