"""What the service is compared with: the reference predictor in plain FastAPI, and an endpoint that computes nothing.

Both run on the service's own server stack: python -m bench.baselines reference --port 9000
"""

import argparse
import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response

from bench.predictor import ReferencePredictor


def create_reference_app(predictor: ReferencePredictor) -> FastAPI:
    """A sync endpoint around the predictor, as its users write it.

    One forecast at a time: the predictor keeps its rotary angles between calls, and two threads spoil each other's.
    """
    app, alone = FastAPI(), threading.Lock()

    @app.post("/predict")
    def predict(body: dict[str, Any]) -> dict[str, Any]:
        with alone:
            return predictor.predict(body)

    return app


def create_bytes_app(content: bytes, wait_ms: float = 0.0) -> FastAPI:
    """An endpoint that reads the body and answers the same bytes every time.

    With `wait_ms` it also reads the JSON and lets a thread sleep: what is left for a service whose model takes so long.
    """
    app = FastAPI()

    @app.post("/forecast/{symbol}")
    async def answer(request: Request) -> Response:
        if wait_ms:
            await request.json()
            await asyncio.to_thread(time.sleep, wait_ms / 1e3)
        else:
            await request.body()
        return Response(content, media_type="application/json")

    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve one of the two until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m bench.baselines")
    parser.add_argument("what", choices=["reference", "bytes"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--answer", type=Path, help="File with the bytes to answer.")
    parser.add_argument("--wait-ms", type=float, default=0.0, help="How long to sleep before the answer.")
    options = parser.parse_args(arguments)
    if options.what == "reference":
        app = create_reference_app(ReferencePredictor(options.device))
    else:
        app = create_bytes_app(options.answer.read_bytes(), options.wait_ms)
    uvicorn.run(app, port=options.port, log_level="warning", access_log=False, loop="uvloop", http="httptools")


if __name__ == "__main__":
    main()
