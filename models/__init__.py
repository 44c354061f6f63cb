"""The two networks and the vocabulary of forecasting: torch and numpy, no HTTP, no Redis, no environment."""
