"""The scripts of ``examples/``, as a user runs them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters
from mcp.types import CallToolResult, TextContent

from latentwire import Bridge
from latentwire.bridge.bulk import encode_corpus
from latentwire.service.cli.demo import running
from tests.ports import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: object, **variables: str) -> list[str]:
    command = [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_example_is_run_here() -> None:
    alone, served = {"ask_many", "two_models", "own_task", "own_encoder"}, {"openai_client"}
    adapters = {"langchain_documents", "llamaindex_retriever", "mcp_server"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == alone | served | adapters


def test_a_text_is_encoded_once_and_asked_about_many_times() -> None:
    lines = run("ask_many")
    assert "soft tokens in a message of" in lines[0]
    assert [line.partition("? ")[2] for line in lines[1:]] == [
        "Mara wants a cup of tea.", "Ben lives in Rome.", "Otto wants a silver ring.",
    ]  # fmt: skip


def test_two_models_in_two_processes_talk_in_latents() -> None:
    answers = [line.partition("? ")[2] for line in run("two_models")]
    assert answers == ["Mara wants a cup of tea.", "Mara lives in Oslo.", "Otto sings."]


def test_a_bridge_is_trained_and_measured_on_ones_own_data(tmp_path: Path) -> None:
    lines = run("own_task", "--folder", tmp_path, "--steps", 2, "--limit", 2)
    assert any("bridge" in line and "soft tokens from the sender" in line for line in lines)
    assert "orders" in (tmp_path / "report.html").read_text()


def test_a_bridge_is_trained_with_an_encoder_of_ones_own(tmp_path: Path) -> None:
    lines = run("own_encoder", "--out", tmp_path / "run", "--steps", 2, "--limit", 2)
    assert any("→ maximum (" in line for line in lines)
    assert any("bridge" in line and "soft tokens from the sender" in line for line in lines)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service of the built-in bridge, and of a corpus of one document: its address."""
    port, folder = free_port(), tmp_path_factory.mktemp("service")
    (folder / "corpora").mkdir()
    encode_corpus(Bridge.load(), {"1": "Ben lives in Rome."}, folder / "corpora" / "facts.lw", keep_text=True)
    with running("builtin", port, folder / "log", LW_CORPUS_DIR=str(folder / "corpora")):
        yield f"http://127.0.0.1:{port}"


def test_openais_client_gets_both_kinds_of_answers(service: str) -> None:
    assert [line.strip() for line in run("openai_client", LATENTWIRE_URL=service)] == ["Ben lives in Rome."] * 2


def test_langchain_asks_a_kept_document_by_its_id_whole_and_in_pieces(service: str) -> None:
    lines = run("langchain_documents", LATENTWIRE_URL=service, LANGSMITH_TRACING_V2="false")
    assert [line.rpartition("? ")[2].strip() for line in lines] == [
        "Mara wants a cup of tea.", "Ben lives in Rome.", "Otto wants a silver ring.",
    ]  # fmt: skip


def test_llamaindex_finds_the_node_and_its_latent_answers(service: str) -> None:
    answers = [line.partition("? ")[2] for line in run("llamaindex_retriever", LATENTWIRE_URL=service)]
    assert answers == ["Mara lives in Oslo.", "Ben lives in Rome.", "Otto wants a silver ring."]


async def test_an_agent_keeps_asks_and_looks_up_latents_by_mcp(service: str) -> None:
    script = str(EXAMPLES / "mcp_server.py")
    server = StdioServerParameters(
        command=sys.executable, args=["-W", "error", script], env={**os.environ, "LATENTWIRE_URL": service}
    )
    async with Client(server) as agent:
        assert [tool.name for tool in (await agent.list_tools()).tools] == ["encode", "ask", "expand"]
        latent_id = result(await agent.call_tool("encode", {"text": "Mara wants a cup of tea."}))["result"]
        question = {"latent_ids": [latent_id, "facts/1"], "question": "What does Mara want?"}
        assert result(await agent.call_tool("ask", question))["result"][0] == "Mara wants a cup of tea."
        kept = result(await agent.call_tool("expand", {"latent_id": latent_id}))
        assert (kept["id"], kept["bridge"], kept["source_bytes"], kept["text"]) == (latent_id, "demo", 24, None)
        document = result(await agent.call_tool("expand", {"latent_id": "facts/1"}))
        assert document["text"] == "Ben lives in Rome." and "data" not in document
        for name, arguments in (
            ("ask", {"latent_ids": ["nowhere"], "question": "?"}),
            ("expand", {"latent_id": "nowhere"}),
        ):
            refused = await agent.call_tool(name, arguments)
            assert refused.is_error and "no latent is stored under 'nowhere'" in text_of(refused)


def result(called: CallToolResult) -> dict[str, Any]:
    assert not called.is_error and called.structured_content is not None, text_of(called)
    return called.structured_content


def text_of(called: CallToolResult) -> str:
    (content,) = called.content
    assert isinstance(content, TextContent)
    return content.text
