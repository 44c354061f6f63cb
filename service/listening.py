"""Where a service can be reached."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Listening:
    """Both addresses; where keys are asked for, one that stores candles for as long as the service runs."""

    url: str
    admin_url: str
    docs: bool
    key: str | None = field(repr=False)


def reachable(host: str) -> str:
    """The host to ask: a service that listens on every address is asked on this machine's own."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 # nothing is bound here
