"""Run the service: two ports, one process, one event loop, until SIGTERM."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Final

import uvicorn

from service import logs
from service.app import create_admin_app, create_app, shows_docs
from service.connections import Connection
from service.listening import Listening, reachable
from service.services import Services
from service.settings import Settings
from service.state import StateError

_log = logging.getLogger(__name__)

_BACKLOG: Final = 2048
_ACCEPTED: Final = 8  # connections in a turn of the loop: uvloop takes one from each socket, and turns can be long
_TURN_SECONDS: Final = 0.0001  # of a thread that others wait for: a network takes hundreds of turns for one batch
_GARBAGE: Final = 50_000, 20, 50  # 512 candles are as many lists, and by the default one request meets two collections


class ServeError(RuntimeError):
    """The service cannot start; the message says what to do."""


class _Server(uvicorn.Server):
    """A server that leaves signals to whoever runs two of them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: Settings, on_ready: Callable[[Listening], None]) -> None:
    """Serve until SIGINT or SIGTERM; `on_ready` is called once, when both ports answer.

    Callers are sent elsewhere and open requests finished first. ServeError if a port is taken or the private Redis
    cannot run.
    """
    with contextlib.ExitStack() as sockets:
        callers = sockets.enter_context(_listen(settings.host, settings.port, "CANDLECAST_PORT"))
        admin = sockets.enter_context(_listen(settings.host, settings.admin_port, "CANDLECAST_ADMIN_PORT"))
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(settings, callers, admin, on_ready))


async def _serve(
    settings: Settings, callers: socket.socket, admin: socket.socket, on_ready: Callable[[Listening], None]
) -> None:
    logs.set_up(settings.log)
    app = create_app(settings)
    services: Services = app.state.services
    servers = [
        _server(app, settings, lifespan="off"),
        _server(create_admin_app(services), settings, lifespan="off"),
    ]
    _on_signal(servers, services, settings.drain_seconds)
    try:
        async with app.router.lifespan_context(app):
            tasks = [
                asyncio.create_task(server.serve(sockets=[listener, *(listener.dup() for _ in range(_ACCEPTED - 1))]))
                for server, listener in zip(servers, (callers, admin), strict=True)
            ]
            while not all(server.started for server in servers) and not any(task.done() for task in tasks):
                await asyncio.sleep(0.01)
            sys.setswitchinterval(_TURN_SECONDS)
            gc.freeze()  # a full collection would look through all of torch, in the middle of a request
            gc.set_threshold(*_GARBAGE)
            on_ready(Listening(_url(callers), _url(admin), shows_docs(settings), services.access.own_key))
            await asyncio.gather(*tasks)
    except StateError as error:
        raise ServeError(str(error)) from error
    if services.registry.left_behind:
        _log.warning("not waited for: %s", ", ".join(services.registry.left_behind))
        logging.shutdown()
        os._exit(0)  # the interpreter would wait for their threads


def _server(app: object, settings: Settings, lifespan: str) -> _Server:
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        lifespan=lifespan,  # type: ignore[arg-type]
        http=type("Connection", (Connection,), {"seconds": settings.client_seconds}),
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks who called
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )
    return _Server(config)


def _on_signal(servers: list[_Server], services: Services, drain_seconds: float) -> None:
    """SIGTERM drains, and again it changes nothing; the next Ctrl-C ends the wait, and one after that open requests."""
    loop = asyncio.get_running_loop()

    def on_terminate() -> None:
        if services.draining:
            return
        if services.started and drain_seconds:
            services.draining = True
            loop.call_later(drain_seconds, stop)
        else:
            stop()

    def on_interrupt() -> None:
        if any(server.should_exit for server in servers):
            for server in servers:
                server.force_exit = True
        elif services.draining:
            stop()
        else:
            on_terminate()

    def stop() -> None:
        for server in servers:
            server.should_exit = True
        services.drain()

    loop.add_signal_handler(signal.SIGTERM, on_terminate)
    loop.add_signal_handler(signal.SIGINT, on_interrupt)


def _listen(host: str, port: int, variable: str) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror}; set {variable}") from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = reachable(host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on Windows
        return None
    return uvloop.new_event_loop
