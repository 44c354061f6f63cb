"""Traces by OpenTelemetry: a span for each request, and one for each stage of its forecast below it.

Nothing of OpenTelemetry is imported unless traces are sent; its SDK reads its own variables (OTEL_*). A thread sends
what has ended: no request waits for a collector, and what one does not take is dropped.
"""

import asyncio
import contextlib
import logging
import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.schemas import normalise_symbol
from service.engine.batcher import Timings
from service.logs import StatusSeen, method_and_route, request_id, trace_id

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

_log = logging.getLogger(__name__)

_PROBES: Final = frozenset({"/livez", "/readyz", "/startupz", "/v2/health/live", "/v2/health/ready"})
_LAST_SECONDS: Final = 2.0
_current: Final[ContextVar["_Answering | None"]] = ContextVar("answering", default=None)


@dataclass
class _Answering:
    """The span of a request, and the computations that ended for it, by the instant in nanoseconds."""

    span: "Span"
    computed: dict[int, Timings] = field(default_factory=dict)


class Traces:
    """Makes spans and sends them; ImportError without OpenTelemetry."""

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        ours = {"service.name": "candlecast", "service.version": version("candlecast")}
        resource = Resource.create(ours).merge(OTELResourceDetector().detect())  # what the environment says goes first
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self.tracer: Tracer = self._provider.get_tracer("candlecast", version("candlecast"))

    async def stop(self) -> None:
        """Send what is left, unless the collector is slow to take it."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        await asyncio.to_thread(last.join, _LAST_SECONDS)


def begin_traces(*, required: bool) -> Traces | None:
    """Without OpenTelemetry RuntimeError if they are required, else None and a line in the log."""
    try:
        return Traces()
    except ImportError as error:
        if required:
            raise RuntimeError("traces need OpenTelemetry: pip install 'candlecast[otel]'") from error
        _log.warning("OTEL_EXPORTER_OTLP_ENDPOINT is set, but traces need pip install 'candlecast[otel]'")
        return None


class TracedRequests:
    """Every request but a probe's is a span, of the caller's trace if its headers name one."""

    def __init__(self, app: ASGIApp, tracer: "Tracer") -> None:
        self.app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _PROBES:
            return await self.app(scope, receive, send)
        answering, seen = self._begin(scope), StatusSeen(send)
        try:
            await self.app(scope, receive, seen)
        except Exception as error:
            answering.span.set_attribute("error.type", type(error).__qualname__)
            raise
        finally:
            self._end(answering, scope, seen.status)

    def _begin(self, scope: Scope) -> _Answering:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        method, _ = method_and_route(scope)
        attributes = {
            "http.request.method": method.upper(),
            "url.path": scope["path"],
            "url.scheme": scope["scheme"],
            "candlecast.request_id": request_id.get() or "",
        }
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        span = self._tracer.start_span(method, extract(headers), SpanKind.SERVER, attributes)
        if (known := span.get_span_context()).is_valid:
            trace_id.set(f"{known.trace_id:032x}")
        answering = _Answering(span)
        _current.set(answering)
        return answering

    def _end(self, answering: _Answering, scope: Scope, status: int) -> None:
        """All is said once the answer has been sent, so that it waits for none of this."""
        from opentelemetry.trace import StatusCode

        span, ended = answering.span, time.time_ns()
        method, _ = method_and_route(scope)
        if route := getattr(scope.get("route"), "path", None):
            span.update_name(f"{method} {route}")
            span.set_attribute("http.route", route)
        if symbol := scope.get("path_params", {}).get("symbol"):
            with contextlib.suppress(ValueError):  # refused, and named by url.path alone
                span.set_attribute("candlecast.symbol", normalise_symbol(symbol))
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        if span.is_recording():
            self._tell_stages(answering)
        span.end(ended)

    def _tell_stages(self, answering: _Answering) -> None:
        from opentelemetry.trace import set_span_in_context

        parent = set_span_in_context(answering.span)
        for end, stages in answering.computed.items():
            for stage, milliseconds in reversed(vars(stages).items()):
                begin = end - int(1e6 * milliseconds)
                self._tracer.start_span(stage, parent, start_time=begin).end(end)
                end = begin


def tell(**facts: str) -> None:
    """Add facts to the span of the request that is being answered, if there is one."""
    if (answering := _current.get()) is not None:
        answering.span.set_attributes({f"candlecast.{name}": fact for name, fact in facts.items()})


def tell_computed(stages: Timings) -> None:
    """Give that span a child for each stage of a computation, the last of which has ended just now."""
    if (answering := _current.get()) is not None:
        answering.computed[time.time_ns()] = stages
