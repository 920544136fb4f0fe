"""The HTTP contract is the committed ``openapi.json``; a change to it must be seen in review."""

import json
from pathlib import Path
from typing import Any

from latentwire.service.app import create_app
from latentwire.service.settings import Settings

COMMITTED = Path(__file__).with_name("openapi.json")
REGENERATE = (
    'if the change is wanted: python -c "from tests.contract.test_openapi import *; '
    'COMMITTED.write_text(rendered(contract()))"'
)


def contract() -> dict[str, Any]:
    """The document of an application without bridges; it does not depend on them."""
    document: dict[str, Any] = create_app(Settings(), {}).openapi()
    return document


def rendered(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def test_the_http_contract_is_the_committed_one() -> None:
    assert contract() == json.loads(COMMITTED.read_text()), REGENERATE


def test_every_route_documents_the_one_error_body() -> None:
    document = contract()
    for path, methods in document["paths"].items():
        body = "OpenAIErrorBody" if path.startswith("/v1/") else "ErrorBody"  # as OpenAI's clients read it
        for operation in methods.values():
            refusals = {code: r for code, r in operation["responses"].items() if not code.startswith("2")}
            assert {"404", "413", "422", "429", "500", "503"} <= set(refusals), path
            for response in refusals.values():
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": f"#/components/schemas/{body}"}, path
