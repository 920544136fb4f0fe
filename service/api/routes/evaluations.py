"""``/evaluations``: measure a bridge that is served, beside everything else the service does."""

from typing import Annotated

from fastapi import APIRouter, Header, Request
from fastapi.responses import HTMLResponse

from latentwire.bridge.evaluation.html import page
from latentwire.service.evaluations.jobs import Jobs
from latentwire.service.inference.runtime import Runtime
from latentwire.service.schemas.evaluations import EvaluationList, EvaluationOut, EvaluationRequest

router = APIRouter(tags=["evaluations"], prefix="/evaluations")
LOCKED = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}  # the page needs nothing else
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[\x20-\x7e]+$",
        description="Posted again with the same key and body, the evaluation is the same one; for a week.",
    ),
]


@router.post("", status_code=202)
async def create(body: EvaluationRequest, request: Request, idempotency_key: IdempotencyKey = None) -> EvaluationOut:
    """Queue an evaluation. One runs at a time, in the gaps between requests."""
    runtime: Runtime = request.app.state.runtime
    runtime.check_open()
    return (await _jobs(request).create(request.state.caller.name, body, idempotency_key)).shown()


@router.get("")
async def all_of_them(request: Request) -> EvaluationList:
    """The caller's evaluations, the latest first."""
    records = await _jobs(request).all(request.state.caller.name)
    return EvaluationList(evaluations=[record.shown() for record in records])


@router.get("/{id}")
async def one(id: str, request: Request) -> EvaluationOut:
    """How far an evaluation is, and what it has measured so far."""
    return (await _jobs(request).find(request.state.caller.name, id)).shown()


@router.delete("/{id}")
async def cancel(id: str, request: Request) -> EvaluationOut:
    """End an evaluation; what it has measured stays."""
    return (await _jobs(request).cancel(request.state.caller.name, id)).shown()


@router.get("/{id}/report", response_model=None, responses={200: {"content": {"text/html": {}}}})
async def report(id: str, request: Request) -> HTMLResponse:
    """The report as a page, as far as it goes."""
    record = await _jobs(request).find(request.state.caller.name, id)
    facts = {"bridge": record.bridge, "receiver": record.receiver, "state": record.state}
    if record.error is not None:
        facts["why"] = record.error
    facts["posted"] = f"{record.created:%Y-%m-%d %H:%M} UTC"
    return HTMLResponse(page(record.report, title=f"{record.bridge} on {record.task}", facts=facts), headers=LOCKED)


def _jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs
