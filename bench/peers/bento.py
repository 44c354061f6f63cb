"""BentoML around the reference predictor: python -m bench.peers.bento --port 9000

A batchable endpoint of BentoML takes a batch from every caller: requests are `{"bodies": [one body]}`.
"""

import argparse
import os
import sys
from typing import Any, Final

import bentoml

from bench.peers import MAX_BATCH
from bench.predictor import ReferencePredictor

_DEVICE: Final = "CANDLECAST_BENCH_DEVICE"
_PATIENCE_MS: Final = 600_000  # its batcher refuses what it expects to take longer


@bentoml.service(traffic={"timeout": _PATIENCE_MS // 1000})
class Kronos:
    """One worker behind BentoML's adaptive batcher."""

    def __init__(self) -> None:
        self.predictor = ReferencePredictor(os.environ.get(_DEVICE, "cpu"))

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=_PATIENCE_MS)
    def predict(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.predictor.predict_batch(bodies)


def main() -> None:
    """Become `bentoml serve`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    command = [sys.executable, "-m", "bentoml", "serve", "bench.peers.bento:Kronos"]
    listen = ["--host", "127.0.0.1", "--port", str(options.port)]
    os.execve(sys.executable, [*command, *listen], {**os.environ, _DEVICE: options.device})


if __name__ == "__main__":
    main()
