"""Ray Serve around the reference predictor: python -m bench.peers.ray_serve --port 9000"""

import argparse
import os
import threading
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from bench.peers import BATCH_WAIT_SECONDS, MAX_BATCH
from bench.predictor import ReferencePredictor

_CALLERS = 256  # its default of 5 would keep batches small


class Kronos:
    """One replica with every core."""

    def __init__(self, device: str) -> None:
        self.predictor = ReferencePredictor(device)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_SECONDS)
    async def predict(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.predictor.predict_batch(bodies)

    async def __call__(self, request: Request) -> dict[str, Any]:
        answer: dict[str, Any] = await self.predict(await request.json())
        return answer


def main() -> None:
    """Serve `/predict` until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    cores, gpus = os.cpu_count() or 1, int(options.device.startswith("cuda"))
    ray.init(num_cpus=cores, num_gpus=gpus, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    resources = {"num_cpus": cores, "num_gpus": gpus}
    replica = serve.deployment(max_ongoing_requests=_CALLERS, ray_actor_options=resources)(Kronos)
    serve.run(replica.bind(options.device), route_prefix="/predict")
    threading.Event().wait()


if __name__ == "__main__":
    main()
