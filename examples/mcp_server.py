"""Latents as tools of an agent (MCP over stdio): ``encode`` keeps a text, ``ask`` questions it, ``expand`` looks it up.

Start a service first: ``latentwire serve``. Needs ``pip install "mcp>=2"``. In the configuration of an MCP host:

    {"mcpServers": {"latentwire": {"command": "python", "args": ["mcp_server.py"],
                                   "env": {"LATENTWIRE_URL": "http://127.0.0.1:8000"}}}}
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from latentwire import Client, ServiceError

server = MCPServer("latentwire")
client = Client()


@contextmanager
def explained() -> Iterator[None]:
    """What the service refuses becomes an error that the agent can read."""
    try:
        yield
    except ServiceError as error:
        raise ToolError(str(error)) from error


@server.tool()
@explained()
def encode(text: str) -> str:
    """Read a text once and keep its latent. Returns the latent's id, for ask and expand."""
    return client.keep(text)[0].id


@server.tool()
@explained()
def ask(latent_ids: list[str], question: str, max_tokens: int = 64) -> list[str]:
    """Ask a question about kept latents. Returns one answer for each, in their order."""
    inputs = [{"latent_id": latent_id} for latent_id in latent_ids]
    answers = client.generate(inputs, f"Question: {question}\nAnswer:", max_tokens=max_tokens)
    return [answer.strip() for answer in answers.texts]


@server.tool()
@explained()
def expand(latent_id: str) -> dict[str, Any]:
    """Say what is kept under a latent's id: its bridge, shape and age, and the text where a corpus keeps that."""
    return {name: value for name, value in asdict(client.latent(latent_id)).items() if name != "data"}


if __name__ == "__main__":
    with client:
        server.run()
