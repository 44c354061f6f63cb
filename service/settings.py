"""Every knob of the service, and the only reader of the environment."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    SecretsSettingsSource,
    SettingsConfigDict,
)

from service.api.watchlist import WatchEntry, parse_watch
from service.keys import KEYS_FILE, Auth
from service.logs import LogFormat
from service.score.recalibration import Mode

Role = Literal["all", "api", "evaluator"]
Source = Literal["default", "environment", "secret file", "argument"]
Watch = Annotated[
    tuple[WatchEntry, ...],
    NoDecode,  # or it would have to be JSON
    BeforeValidator(lambda given: parse_watch(given) if isinstance(given, str) else given),
]
Origins = Annotated[
    tuple[str, ...],
    NoDecode,
    BeforeValidator(lambda given: [each.strip() for each in given.split(",")] if isinstance(given, str) else given),
]
_SECRETS: Final = Path("/run/secrets")  # where Docker and Kubernetes mount them


class Settings(BaseSettings):
    """Each field is the environment variable CANDLECAST_<FIELD>, or the file candlecast_<field> in /run/secrets."""

    model_config = SettingsConfigDict(
        env_prefix="CANDLECAST_", frozen=True, secrets_dir=_SECRETS if _SECRETS.is_dir() else None
    )

    log: LogFormat = Field(
        "text",
        description="Lines of text or of json, all with the id of their request; json: one for every answer too.",
    )
    traces: bool | None = Field(
        None,
        description="Send a span for each request by OTLP, as OTEL_EXPORTER_OTLP_ENDPOINT and its like say; default:"
        " where that is set. Needs the extra `otel`.",
    )
    role: Role = Field(
        "all",
        description="api: forecasts, and publishes no metrics of single symbols; evaluator: publishes those, and"
        " forecasts nothing; all: both. Beside several processes of role api one evaluator is enough.",
    )
    host: str = Field("127.0.0.1", description="Address that both ports listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port for callers; 0 picks a free one.")
    admin_port: int = Field(8001, ge=0, le=65535, description="Port for /metrics; 0 picks a free one.")
    auth: Auth = Field(
        "auto",
        description="Whether callers need a key: on, off, or auto: once there are keys, and without any the service"
        " listens on a loopback address alone.",
    )
    keys_file: Path | None = Field(
        None, description=f"The file that `candlecast keys` writes; default: {KEYS_FILE} in the home."
    )
    cors_origins: Origins = Field((), description="Origins whose web pages may call, with commas; * for any.")
    docs: bool | None = Field(None, description="Serve /docs and /openapi.json; default: only on a loopback address.")
    home: Path = Field(Path("var"), description="Folder for everything the service writes.")
    store_root: str | Path = Field(
        "model_store/artifacts", description="The model store: a folder, or a URL such as s3://bucket/prefix."
    )
    store_public_key: Path | None = Field(
        None, description="PEM file of the Ed25519 key that versions must be signed by; without it none has to be."
    )
    store_poll_seconds: PositiveFloat = Field(
        2, description="From one look for promotions to the next; those made here or heard of by Redis need none."
    )
    redis_url: str | None = Field(None, description="Redis to use; without it a private one runs under home.")
    toto: str = Field("toto-demo", description="The model that a request's `toto` means.")
    kronos: str = Field("kronos-demo", description="The model that a request's `kronos` means.")
    ensemble: str = Field("ensemble", description="The model that a request's `ensemble` means.")
    ensemble_live: bool = Field(
        True,
        description="Ensembles' weights follow the realised scores, slowly; each answer names which it had, and every"
        " change can be taken back. false: the published weights, and nothing else.",
    )
    device: str = Field("cpu", description="Torch device that the models run on.")
    memory_budget_gb: PositiveFloat | None = Field(
        None,
        description="What the versions in memory may take together, 1e9 bytes, two of a model while it is swapped;"
        " default: half of the container's memory, or of the GPU's.",
    )
    runtime: str | None = Field(
        None, description="Runtime of every model, such as eager-float32; default: the fastest."
    )
    threads: PositiveInt | None = Field(None, description="Threads of one forecast; default: torch's own choice.")
    max_queue: PositiveInt = Field(256, description="Requests that may wait beside a full batch; more answer 503.")
    max_batch_rows: PositiveInt = Field(32, description="Most requests that are computed at once.")
    recalibrate: Mode = Field("off", description="Bands fitted to their misses: off, shadow (shown beside) or on.")
    watch: Watch = Field(
        (),
        description="Forecasts computed as soon as candles come: SYMBOL[@INTERVAL][:MODEL[:HORIZON]], with commas, such"
        " as AAPL:kronos:30,BTC-USDT@1h:auto. What is left out is as in a POST.",
    )
    max_streams: NonNegativeInt = Field(256, description="Streams of forecasts that may be open; more answer 503.")
    watchdog_seconds: PositiveFloat = Field(60, description="A step of a batch that takes longer fails /livez.")
    cache_bytes: NonNegativeInt = Field(64 * 2**20, description="Memory for forecasts that still hold; 0 keeps none.")
    metric_symbols: NonNegativeInt = Field(
        100, description="Symbols with metrics of their own: the first by name; the others count in their models'."
    )
    max_body_bytes: PositiveInt = Field(8 * 2**20, description="Largest request body; a larger one answers 413.")
    client_seconds: PositiveFloat = Field(
        30, description="Longest wait for a caller: for the whole of a request, or to take more of its answer."
    )
    keep_alive_seconds: PositiveInt = Field(
        75, description="How long a connection may lie idle. A balancer must close its own sooner, or loses requests."
    )
    request_timeout_ms: PositiveInt = Field(20_000, description="Deadline of a request that names none.")
    drain_seconds: float = Field(
        0, ge=0, le=3600, description="After SIGTERM /readyz answers 503, and all else goes on for so long."
    )
    shutdown_seconds: PositiveInt = Field(20, description="Longest wait for open requests once nothing is accepted.")

    @property
    def traced(self) -> bool:
        """Whether traces are to be sent: where nothing is said, if a collector is named as its senders read it."""
        if self.traces is not None:
            return self.traces
        return any(os.environ.get(f"OTEL_EXPORTER_OTLP_{of}ENDPOINT") for of in ("", "TRACES_"))

    def sources(self) -> dict[str, Source]:
        """Where the value of each setting came from; the environment goes before a secret file."""
        kind = type(self)
        last_wins: list[tuple[Source, Iterable[str]]] = [
            ("default", kind.model_fields),
            ("argument", self.model_fields_set),
            ("secret file", SecretsSettingsSource(kind)()),
            ("environment", EnvSettingsSource(kind)()),
        ]
        return {name: source for source, names in last_wins for name in names}
