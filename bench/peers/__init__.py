"""The reference predictor in LitServe, BentoML and Ray Serve, batching on, set up as their documentation says."""

from typing import Final

MAX_BATCH: Final = 16
BATCH_WAIT_SECONDS: Final = 0.01
