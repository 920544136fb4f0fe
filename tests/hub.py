"""A stand-in for the Hub's HTTP: repositories in memory, written by commits and read by revision.

It keeps what the client sends and gives back the same: files, refused tokens and unknown names, as the Hub's own
addresses do. Large files travel as they do there, beside the commit.
"""

import base64
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import Annotated, Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from tests.ports import free_port

TOKEN = "hf_of_a_test"


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {".gitattributes": b""}})
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        """Of the main branch."""
        return next(reversed(self.commits.values()))

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        if revision not in ("main", *self.commits):
            raise HTTPException(404, headers={"X-Error-Code": "RevisionNotFound"})
        sha = next(reversed(self.commits)) if revision == "main" else revision
        return sha, self.commits[sha]


@dataclass
class Hub:
    """The stand-in, and what it holds."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def find(self, name: str) -> Repository:
        if name not in self.repositories:
            raise HTTPException(404, headers={"X-Error-Code": "RepoNotFound"})
        return self.repositories[name]

    def commit(self, name: str, lines: list[dict[str, Any]]) -> str:
        repository = self.find(name)
        files = dict(repository.files)
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    repository.messages.append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repository.commits[sha] = files
        return sha


router = APIRouter()


def held(request: Request) -> Hub:
    found: Hub = request.app.state.hub
    return found


Held = Annotated[Hub, Depends(held)]


def check(request: Request) -> None:
    if request.headers.get("authorization") != f"Bearer {TOKEN}":
        raise HTTPException(401)


@router.post("/api/repos/create")
async def create(hub: Held, request: Request) -> Response:
    check(request)
    body = await request.json()
    name = "/".join(filter(None, (body.get("organization"), body["name"])))
    status, private = (
        409 if name in hub.repositories else 200,
        body.get("private") or body.get("visibility") == "private",
    )
    hub.repositories.setdefault(name, Repository(bool(private)))
    return JSONResponse({"url": f"{hub.url}/{name}"}, status)


@router.post("/api/validate-yaml")
async def validate() -> dict[str, list[str]]:
    return {"errors": [], "warnings": []}


@router.post("/api/models/{owner}/{name}/preupload/{revision}")
async def preupload(owner: str, name: str, request: Request) -> dict[str, Any]:
    check(request)
    return {
        "files": [
            {"path": file["path"], "shouldIgnore": False}
            | {"uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
            for file in (await request.json())["files"]
        ]
    }


@router.post("/{owner}/{name}.git/info/lfs/objects/batch")
async def batch(hub: Held, request: Request) -> Response:
    objects = (await request.json())["objects"]
    answer = {
        "transfer": "basic",
        "objects": [
            {**one, "actions": {"upload": {"href": f"{hub.url}/blobs/{one['oid']}", "header": {}}}} for one in objects
        ],
    }
    return Response(json.dumps(answer), media_type="application/vnd.git-lfs+json")


@router.put("/blobs/{oid}")
async def put(hub: Held, oid: str, request: Request) -> None:
    body = await request.body()
    assert hashlib.sha256(body).hexdigest() == oid
    hub.blobs[oid] = body


@router.post("/api/models/{owner}/{name}/commit/{revision}")
async def commit(hub: Held, owner: str, name: str, request: Request) -> dict[str, Any]:
    check(request)
    sha = hub.commit(f"{owner}/{name}", [json.loads(line) for line in (await request.body()).splitlines()])
    return {"commitUrl": f"{hub.url}/{owner}/{name}/commit/{sha}", "commitOid": sha, "success": True}


@router.get("/api/models/{owner}/{name}")
@router.get("/api/models/{owner}/{name}/revision/{revision}")
async def about(hub: Held, owner: str, name: str, revision: str = "main") -> dict[str, Any]:
    sha, files = hub.find(f"{owner}/{name}").at(revision)
    return {"id": f"{owner}/{name}", "sha": sha, "siblings": [{"rfilename": file} for file in files]}


@router.get("/api/models/{owner}/{name}/tree/{revision}")
async def tree(hub: Held, owner: str, name: str, revision: str) -> list[dict[str, Any]]:
    _, files = hub.find(f"{owner}/{name}").at(revision)
    return [
        {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for file, data in files.items()
    ]


@router.api_route("/{owner}/{name}/resolve/{revision}/{file:path}", methods=["GET", "HEAD"])
async def resolve(hub: Held, owner: str, name: str, revision: str, file: str) -> Response:
    sha, files = hub.find(f"{owner}/{name}").at(revision)
    if file not in files:
        raise HTTPException(404, headers={"X-Error-Code": "EntryNotFound"})
    digest = hashlib.sha256(files[file]).hexdigest()
    return Response(files[file], headers={"ETag": f'"{digest}"', "X-Repo-Commit": sha})


@contextmanager
def running_hub() -> Iterator[Hub]:
    """The stand-in on a port of its own."""
    port = free_port()
    hub, app = Hub(f"http://127.0.0.1:{port}"), FastAPI()
    app.state.hub = hub
    app.include_router(router)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield hub
    finally:
        server.should_exit = True
        thread.join()
