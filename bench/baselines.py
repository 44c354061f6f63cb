"""What the service is compared with: the reference predictor in plain FastAPI, and an endpoint that computes nothing.

Both run on the service's own server stack: python -m bench.baselines reference --port 9000
"""

import argparse
import threading
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


def create_bytes_app(content: bytes) -> FastAPI:
    """An endpoint that reads the body and answers the same bytes every time."""
    app = FastAPI()

    @app.post("/forecast/{symbol}")
    async def answer(request: Request) -> Response:
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
    options = parser.parse_args(arguments)
    if options.what == "reference":
        app = create_reference_app(ReferencePredictor(options.device))
    else:
        app = create_bytes_app(options.answer.read_bytes())
    uvicorn.run(app, port=options.port, log_level="warning", access_log=False, loop="uvloop", http="httptools")


if __name__ == "__main__":
    main()
