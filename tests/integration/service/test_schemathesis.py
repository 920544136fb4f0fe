"""Whatever the OpenAPI document allows or forbids is sent to a real server: every answer is one that it documents.

The examples are the same in every run. ``coverage`` goes through each field's borders, ``fuzzing`` draws whole bodies.
"""

from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from schemathesis import config
from schemathesis.engine import events, from_schema
from schemathesis.generation import GenerationMode

from latentwire.service.app import create_app
from latentwire.service.settings import Settings
from tests.integration.service.test_storm import at_rest, listening

MOST_EXAMPLES = 12  # of each operation, beside the borders of its fields
SECONDS = 15.0  # after which an answer counts as missing
DELIBERATE = {503: "Retry-After of a service that is full, loading or stopping", 504: "the caller's own deadline"}
CHAT = "/v1/chat/completions"  # whose many fields of OpenAI's have more borders than there is time for
POSTED = ("/encode", "/generate", "/v1/completions", CHAT)
TEXT = {"type": "string", "pattern": "^[a-z]{1,12}$"}
SOUND: dict[str, Any] = {  # what a schema cannot say: names that are served, texts with a word in them, small numbers
    "bridge": {"const": "tiny"}, "model": {"const": "tiny"}, "receiver": {"type": "null"},
    "text": TEXT, "source": TEXT, "prompt": TEXT, "inputs": {"type": "array", "minItems": 1, "maxItems": 2},
    "timeout_seconds": {"type": "null"}, "max_tokens": {"type": "integer", "minimum": 1, "maximum": 4},
    "n": {"type": "integer", "minimum": 1, "maximum": 2},
    "stop_ids": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 258}, "maxItems": 16},
    "messages": {"const": [{"role": "user", "content": "Where?"}]},
}  # fmt: skip
LEFT_OUT = {
    "latent",
    "latent_id",
    "sources",
    "fallback",
    "max_completion_tokens",
    "top_logprobs",
}  # excluded by others, or made by /encode


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    app = create_app(Settings(max_samples=2), {"tiny": str(checkpoint)})
    with listening(app) as port:
        yield f"http://127.0.0.1:{port}"
        at_rest(app)


def run(document: dict[str, Any], url: str, *modes: GenerationMode, coverage: bool, accepted: bool) -> Counter[int]:
    """Send what the document describes; gives how many answers had which status. Every failed check is reported."""
    checks = config.ChecksConfig(
        not_a_server_error=config.NotAServerErrorConfig(expected_statuses=["2xx", "3xx", "4xx", *map(str, DELIBERATE)]),
        positive_data_acceptance=config.PositiveDataAcceptanceConfig(enabled=accepted),
    )
    off = {"enabled": False}
    project = config.ProjectConfig(
        base_url=url,
        request_timeout=SECONDS,
        continue_on_failure=True,
        checks=checks,
        generation=config.GenerationConfig(
            modes=list(modes), max_examples=MOST_EXAMPLES, deterministic=True, no_shrink=True
        ),
        phases=config.PhasesConfig(
            coverage=config.CoveragePhaseConfig(
                enabled=coverage,
                unexpected_methods={"PATCH"},
                generation=config.GenerationConfig(modes=[GenerationMode.NEGATIVE]),
            ),
            stateful=config.StatefulPhaseConfig(**off),
        ),
    )
    settings = config.SchemathesisConfig(seed=1, projects=config.ProjectsConfig(default=project))
    met, failures = Counter[int](), list[str]()
    schema = schemathesis.openapi.from_dict(document, config=settings)
    schema.hook(map_body)
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            failures.append(str(event))
        if isinstance(event, events.ScenarioFinished):
            failures += judged(event, met)
    assert not failures, "\n\n".join([f"{len(failures)} failures", *failures[:20]])
    return met


def map_body(_: object, body: Any) -> Any:
    """Whole numbers as such: 3.0 is an integer for a schema, and none for this service."""
    if isinstance(body, dict):
        return {key: map_body(_, value) for key, value in body.items()}
    if isinstance(body, list):
        return [map_body(_, value) for value in body]
    return int(body) if isinstance(body, float) and body.is_integer() else body


def judged(event: events.ScenarioFinished, met: Counter[int]) -> Iterator[str]:
    """What is wrong with the answers of a scenario."""
    for case, checks in event.recorder.checks.items():
        for check in checks:
            if (info := check.failure_info) is not None:
                yield f"{event.recorder.label}: {info.failure.title}: {info.failure.message}\n{info.code_sample}"
        interaction = event.recorder.interactions[case]
        response = interaction.response
        if response is None:
            yield f"{event.recorder.label}: no answer"
            continue
        met[response.status_code] += 1
        if response.status_code == 503 and "retry-after" not in response.headers:
            yield f"{event.recorder.label}: 503 without Retry-After"
        if response.status_code == 504 and b"timeout_seconds" not in (interaction.request.body or b""):
            yield f"{event.recorder.label}: 504 although nobody wished for it"


def document_of(url: str) -> dict[str, Any]:
    document: dict[str, Any] = httpx.get(f"{url}/openapi.json").json()
    return document


def sound(document: dict[str, Any]) -> dict[str, Any]:
    """The part of the document's bodies that this service can answer."""
    document = deepcopy(document)
    document["paths"] = {path: {"post": document["paths"][path]["post"]} for path in POSTED}
    schemas = document["components"]["schemas"]
    for name in ("EncodeRequest", "GenerateRequest", "CompletionRequest", "ChatRequest", "Input"):
        schema = schemas[name]
        schema["properties"] = {key: value for key, value in schema["properties"].items() if key not in LEFT_OUT}
        for key in SOUND.keys() & schema["properties"].keys():
            kept = {"items": TEXT if name == "EncodeRequest" else {"$ref": "#/components/schemas/Input"}}
            schema["properties"][key] = SOUND[key] | (kept if key == "inputs" else {})
        if "source" in schema["properties"]:
            schema["required"] = [*schema["required"], "source"]
    schemas["Input"] |= {"oneOf": [{"required": ["text"]}]}
    return document


def only(document: dict[str, Any], *paths: str) -> dict[str, Any]:
    return {**document, "paths": {path: document["paths"][path] for path in paths}}


def test_every_answer_to_good_and_bad_data_is_documented_and_none_is_a_server_error(url: str) -> None:
    document, both = document_of(url), (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    bordered = [path for path in document["paths"] if path != CHAT]
    met = run(only(document, *bordered), url, *both, coverage=True, accepted=False)
    met += run(only(document, CHAT), url, *both, coverage=False, accepted=False)
    assert {200, 400, 404, 405, 415, 422} <= set(met), met  # so the data reach every kind of answer
    assert set(met) <= {200, 202, 400, 404, 405, 409, 413, 415, 422, *DELIBERATE}, met


def test_sound_requests_are_answered_streamed_or_whole_in_the_documented_shape(url: str) -> None:
    met = run(sound(document_of(url)), url, GenerationMode.POSITIVE, coverage=False, accepted=True)
    assert met[200] == sum(met.values()) >= 4 * MOST_EXAMPLES // 2, met
