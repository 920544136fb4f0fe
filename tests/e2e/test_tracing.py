"""Traces of a service, as a collector receives them over OTLP."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from latentwire.service.cli.demo import running
from tests.ports import free_port

ASK = {
    "inputs": [{"text": "Mara lives in Rome."}],
    "prompt": "Question: Where does Mara live?\nAnswer:",
    "max_tokens": 8,
}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
STAGES = ["admit", "encode", "wire", "queue", "prefill", "decode"]


class Collector(ThreadingHTTPServer):
    """Takes what exporters send to /v1/traces, as OpenTelemetry's collector does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.received: list[ExportTraceServiceRequest] = []

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for sent in self.received
            for of in sent.resource_spans
            for scope in of.scope_spans
            for span in scope.spans
        ]


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
        self.server.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def attributes(span: Span) -> dict[str, object]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value") or "") for one in span.attributes}


def test_a_request_is_a_span_of_its_caller_with_its_stages_below(collector: Collector, tmp_path: Path) -> None:
    port = free_port()
    where = f"http://127.0.0.1:{collector.server_address[1]}"
    with running(
        "builtin", port, tmp_path / "log", OTEL_EXPORTER_OTLP_ENDPOINT=where, LW_LOG_FORMAT="json", LW_LOG_REQUESTS="1"
    ):
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        answer = httpx.post(f"http://127.0.0.1:{port}/generate", json=ASK, headers=headers)
        httpx.post(f"http://127.0.0.1:{port}/generate", json={**ASK, "bridge": "nobody"})
        httpx.get(f"http://127.0.0.1:{port}/metrics")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    (logged,) = (line for line in lines if line.get("request_id") == "mine")
    assert logged["message"].startswith("POST /generate: 200 after ") and logged["trace_id"] == TRACE
    assert not [line for line in lines if "/metrics" in line["message"] or "Mara" in str(line)]
    assert not [line for line in lines if line["level"] == "error"]  # nor at the end

    spans = collector.spans  # the last are sent when the service ends
    resource = {one.key: one.value.string_value for one in collector.received[0].resource_spans[0].resource.attributes}
    assert resource["service.name"] == "latentwire"

    ours = [span for span in spans if span.trace_id.hex() == TRACE]
    (request,) = (span for span in ours if span.kind == Span.SPAN_KIND_SERVER)
    assert request.name == "POST /generate" and request.parent_span_id.hex() == PARENT
    assert answer.headers["traceparent"] == f"00-{TRACE}-{request.span_id.hex()}-01"
    stages = [span for span in ours if span.parent_span_id == request.span_id]
    assert [span.name for span in sorted(stages, key=lambda span: span.start_time_unix_nano)] == STAGES
    for span in stages:
        assert request.start_time_unix_nano - 1e6 <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano + 1e6
    told, usage = attributes(request), answer.json()["usage"]
    assert told["http.response.status_code"] == 200 and told["gen_ai.request.model"] == "demo"
    assert told["gen_ai.usage.output_tokens"] == usage["generated_tokens"]
    whole = (request.end_time_unix_nano - request.start_time_unix_nano) / 1e9
    assert 0 < float(str(told["gen_ai.server.time_to_first_token"])) < whole
    assert "Mara" not in str(spans)

    (other,) = (span for span in spans if span.kind == Span.SPAN_KIND_SERVER and span is not request)
    assert attributes(other)["http.response.status_code"] == 404 and other.status.code == Status.STATUS_CODE_UNSET


def test_a_service_that_is_to_send_traces_and_cannot_says_what_is_missing(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["opentelemetry.sdk.trace"] = None
from latentwire.service.__main__ import main
main()
"""
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "LW_FRONTENDS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", "--port", "0"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert "is not installed: pip install 'latentwire[otel]'" in done.stderr and "Traceback" not in done.stderr
