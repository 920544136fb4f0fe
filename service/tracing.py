"""Traces of requests in OpenTelemetry's terms, sent where ``OTEL_EXPORTER_OTLP_ENDPOINT`` says; else nothing is made.

The span of a request, below the caller's where a ``traceparent`` came, is FastAPI's own; ours are those of its stages.
They are known when they are over, some of them from another process, and told with the times they had.
"""

import os
import time
from collections.abc import Callable, Sequence

from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.generation.base import Times
from latentwire.service.schemas.inference import Usage

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
OF_REQUESTS: TelemetryConfig = {
    "tracing": True,
    "metrics": False,  # /metrics has them
    "logs": False,  # of a refused body they would hold its text
    "operation_spans": False,
    "auto_configure": False,
    "exclude": lambda scope: str(scope.get("path")).startswith(("/health/", "/metrics")),  # asked all the time
}
tracer, propagator = trace.get_tracer("latentwire"), TraceContextTextMapPropagator()


def start() -> Callable[[], None]:
    """Send traces from now on, if the environment says where; what sends the last of them at the end.

    ``OTEL_SERVICE_NAME``, ``OTEL_TRACES_SAMPLER`` and OpenTelemetry's other variables mean what they mean everywhere.

    Raises:
        InvalidRequest: The packages that send are not installed.
    """
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return lambda: None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InvalidRequest(
            f"{ENDPOINTS[0]} is set, and {error.name} is not installed: pip install 'latentwire[otel]'"
        ) from None
    os.environ.setdefault("OTEL_SERVICE_NAME", "latentwire")
    provider = TracerProvider(resource=Resource.create())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider.shutdown


def traceparent() -> str | None:
    """What a caller finds the span of the current request by; None where it is not recorded."""
    carrier: dict[str, str] = {}
    if trace.get_current_span().is_recording():
        propagator.inject(carrier)
    return carrier.get("traceparent")


def told(stage: str, began: float, ended: float, **attributes: AttributeValue) -> None:
    """A stage of the current request that is over; times as of ``time.monotonic()``."""
    if not trace.get_current_span().is_recording():
        return
    offset = time.time() - time.monotonic()
    start, end = (int((at + offset) * 1e9) for at in (began, ended))
    tracer.start_span(stage, start_time=start, attributes=attributes).end(end)


def told_of_answers(arrived: float, asked: float, times: Sequence[Times | None]) -> None:
    """The stages of each output that has a token, and how long the first of all took from the request's arrival."""
    for index, at in enumerate(times):
        if at is not None:
            told("queue", asked, at.begun, index=index)
            told("prefill", at.begun, at.first, index=index)
            told("decode", at.first, at.last, index=index)
    firsts = [at.first for at in times if at is not None]
    if firsts:
        trace.get_current_span().set_attribute("gen_ai.server.time_to_first_token", min(firsts) - arrived)


def told_of_usage(bridge: str, usage: Usage) -> None:
    """What the current request was for, and what it cost."""
    trace.get_current_span().set_attributes(
        {
            "gen_ai.provider.name": "latentwire",
            "gen_ai.request.model": bridge,
            "gen_ai.usage.input_tokens": usage.source_tokens + usage.prompt_tokens + usage.soft_tokens,
            "gen_ai.usage.output_tokens": usage.generated_tokens,
        }
    )
