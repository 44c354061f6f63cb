"""Where a service can be reached."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Listening:
    """The addresses of both ports."""

    url: str
    admin_url: str


def reachable(host: str) -> str:
    """The host to ask: a service that listens on every address is asked on this machine's own."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
