"""LitServe around the reference predictor: python -m bench.peers.lit --port 9000"""

import argparse
from typing import Any

import litserve

from bench.peers import BATCH_WAIT_SECONDS, MAX_BATCH
from bench.predictor import ReferencePredictor

Body = dict[str, Any]


class KronosAPI(litserve.LitAPI):  # type: ignore[misc]
    """One worker that collects requests into batches."""

    def setup(self, device: str) -> None:
        self.predictor = ReferencePredictor(device)

    def decode_request(self, request: Body) -> Body:
        return request

    def batch(self, inputs: list[Body]) -> list[Body]:
        return inputs

    def predict(self, bodies: list[Body]) -> list[Body]:
        return self.predictor.predict_batch(bodies)

    def unbatch(self, output: list[Body]) -> list[Body]:
        return output

    def encode_response(self, output: Body) -> Body:
        return output


def main() -> None:
    """Serve `/predict` until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    api = KronosAPI(max_batch_size=MAX_BATCH, batch_timeout=BATCH_WAIT_SECONDS)
    accelerator = "cuda" if options.device.startswith("cuda") else "cpu"
    server = litserve.LitServer(api, accelerator=accelerator, devices=1, timeout=False)
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
