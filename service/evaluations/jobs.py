"""Evaluations as jobs: posted, queued, run one at a time behind every request, kept for whoever asks later.

The life of a job: ``create`` → queued → the thread ``evaluate`` takes it → running → done, failed or cancelled. While
it is unfinished its process holds it in memory and writes it down every few seconds; that is also how other processes,
and the next one, know that its process lives. States change on the event loop alone; the thread looks at them before
every pass and ends when its job is no longer running.
"""

import asyncio
import hashlib
import json
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import ValidationError

from latentwire.bridge.devices import is_out_of_memory
from latentwire.bridge.errors import (
    Conflict,
    InvalidRequest,
    LatentWireError,
    Overloaded,
    StoreUnavailable,
    UnknownBridge,
    first_line,
    shorten,
)
from latentwire.bridge.evaluation.conditions import CONDITIONS, TRAINED
from latentwire.bridge.evaluation.tasks import Task, load_task
from latentwire.service.evaluations.runner import run
from latentwire.service.inference.runtime import Runtime
from latentwire.service.schemas.evaluations import UNFINISHED, EvaluationRequest, Progress, Record, State
from latentwire.service.store.base import Store
from latentwire.service.store.folder import FolderStore

log = logging.getLogger(__name__)

MAX_QUEUED = 16
RETRY_SECONDS = 60.0  # what a caller is told to wait when the queue is full
KEEP_SECONDS = 7 * 24 * 3600.0
MAX_LISTED = 200
BEAT_SECONDS = 2.0
LEASE_SECONDS = 10.0  # without a sign from its process for this long, a job has none any more
ID = re.compile(r"eval_[0-9a-f]{32}")
ABANDONED = "the service stopped while it ran"
NEVER_RAN = "the service stopped before it ran"


class _Ended(Exception):
    """The job is no longer to run."""


class Jobs:
    """The evaluations of one service process, and through the store those of others.

    Attributes:
        finished: How many of this process ended in each state.
        latest: The last report of this process by bridge and task.
    """

    def __init__(self, runtime: Runtime) -> None:
        folder = runtime.settings.jobs_dir
        self._runtime = runtime
        self._store: Store = runtime.store
        if folder is not None and runtime.settings.redis_url is None:
            self._store = FolderStore(folder, KEEP_SECONDS)
        self._tasks_by_name = {"world": "world", **runtime.settings.tasks}
        self._owner = secrets.token_hex(8)
        self._live: dict[str, Record] = {}
        self._queue: asyncio.Queue[Record] = asyncio.Queue()
        self._creating, self._writing = asyncio.Lock(), asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="evaluate")
        self._running: list[asyncio.Task[None]] = []
        self.finished: Counter[State] = Counter()
        self.latest: dict[tuple[str, str], dict[str, Any]] = {}

    def start(self) -> None:
        """Begin to run what will be posted; on the event loop."""
        self._running = [asyncio.create_task(self._serve()), asyncio.create_task(self._beat())]

    async def stop(self) -> None:
        """End every job of this process, with a reason, before its next pass. Does nothing the second time."""
        for record in self._live.values():
            _end(record, "failed", ABANDONED if record.state == "running" else NEVER_RAN)
        await asyncio.to_thread(self._thread.shutdown)
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._write_down()

    def counts(self) -> Counter[State]:
        """How many jobs of this process are in each state, finished ones only until they are written down."""
        return Counter(record.state for record in self._live.values())

    async def create(self, tenant: str, body: EvaluationRequest, key: str | None = None) -> Record:
        """Queue an evaluation, or find the one that the tenant posted under the same key.

        Raises:
            UnknownBridge: No such bridge or receiver.
            InvalidRequest: No such task or condition, or one that must be trained first.
            Conflict: The key was used with another body.
            Overloaded: The queue is full.
            StoreUnavailable: It cannot be written down; nothing was queued.
        """
        record = self._new(tenant, body)
        digest = _digest(json.dumps([*_identity(record)]))
        once, listed = f"once_{_digest(tenant, key or '')}", f"list_{_digest(tenant)}"
        async with self._creating:
            before, ids = await self._store.get_many("job", [once, listed])
            if key is not None and before is not None and (earlier := await self._repeated(before, digest)):
                return earlier
            if self.counts()["queued"] >= MAX_QUEUED:
                raise Overloaded(
                    f"{MAX_QUEUED} evaluations are waiting; try again later", retry_after_seconds=RETRY_SECONDS
                )
            listing = [*json.loads(ids or b"[]"), record.id][-MAX_LISTED:]
            values = {record.id: _packed(record), listed: json.dumps(listing).encode()}
            if key is not None:
                values[once] = json.dumps({"id": record.id, "body": digest}).encode()
            await self._store.put_many("job", values, ttl_seconds=KEEP_SECONDS)
            self._live[record.id] = record
            self._queue.put_nowait(record)
        return record

    async def find(self, tenant: str, job_id: str) -> Record:
        """A tenant's evaluation.

        Raises:
            UnknownBridge: There is none of that id, or it is another tenant's.
            StoreUnavailable: The store is away, and it is not an unfinished one of this process.
        """
        found = await self._get([job_id] if ID.fullmatch(job_id) else [], tenant)
        if not found:
            raise UnknownBridge(f"no evaluation is called {shorten(repr(job_id), 80)}", param="id")
        return found[0]

    async def all(self, tenant: str) -> list[Record]:
        """A tenant's evaluations, the latest first (StoreUnavailable when the store is away)."""
        listed = await self._store.get("job", f"list_{_digest(tenant)}")
        return await self._get(list(reversed(json.loads(listed or b"[]"))), tenant)

    async def cancel(self, tenant: str, job_id: str) -> Record:
        """End an evaluation before its next pass; what it has measured stays. A finished one is left as it is.

        One that another process runs ends there with its next sign of life (errors as ``find``).
        """
        record = await self.find(tenant, job_id)
        if job_id in self._live:
            _end(record, "cancelled", None)
        elif record.state in UNFINISHED:
            await self._store.put("job", _stop_key(job_id), b"1", ttl_seconds=KEEP_SECONDS)
        return record

    def _count(self, record: Record) -> None:
        self.finished[record.state] += 1
        if record.state == "done" and record.report is not None:
            self.latest[record.bridge, record.task] = record.report

    def _new(self, tenant: str, body: EvaluationRequest) -> Record:
        bridge = self._runtime.find(body.bridge)
        if body.task not in self._tasks_by_name:
            known = ", ".join(self._tasks_by_name)
            raise InvalidRequest(f"no task is called {shorten(repr(body.task), 80)}; there are {known}", param="task")
        return Record(
            id=f"eval_{secrets.token_hex(16)}",
            bridge=bridge.name,
            task=body.task,
            receiver=bridge.receiver(body.receiver),
            conditions=_checked(body.conditions),
            limit=body.limit,
            tenant=tenant,
            owner=self._owner,
            beat=time.time(),
        )

    async def _repeated(self, before: bytes, digest: str) -> Record | None:
        known = json.loads(before)
        if known["body"] != digest:
            raise Conflict(
                f"the Idempotency-Key was used for evaluation {known['id']}, with another body", param="Idempotency-Key"
            )
        found = await self._get([known["id"]])
        return found[0] if found else None

    async def _get(self, ids: Sequence[str], tenant: str | None = None) -> list[Record]:
        live = {job_id: self._live[job_id] for job_id in ids if job_id in self._live}  # one may end while we wait
        elsewhere = [job_id for job_id in ids if job_id not in live]
        packed = dict(zip(elsewhere, await self._store.get_many("job", elsewhere) if elsewhere else [], strict=True))
        records = [live.get(job_id) or _unpacked(packed[job_id]) for job_id in ids]
        return [record for record in records if record is not None and tenant in (None, record.tenant)]

    async def _serve(self) -> None:
        while True:
            record = await self._queue.get()
            if record.state != "queued":
                continue
            record.state = "running"
            try:
                record.report = await asyncio.get_running_loop().run_in_executor(self._thread, self._measure, record)
                _end(record, "done", None)
            except _Ended:
                pass
            except LatentWireError as error:
                _end(record, "failed", str(error))
            except Exception as error:
                log.exception("evaluation %s failed", record.id)
                memory = is_out_of_memory(error)
                why = f"memory is too small: {first_line(error)}" if memory else f"failed with {type(error).__name__}"
                _end(record, "failed", f"the evaluation stopped: {why}")
            await self._write_down()

    def _measure(self, record: Record) -> dict[str, Any]:
        """On the thread."""

        def check() -> None:
            if record.state != "running":
                raise _Ended

        def progress(condition: str | None, done: int, total: int) -> None:
            record.progress = Progress(condition=condition, done=done, total=total)

        def partial(report: dict[str, Any]) -> None:
            record.report = report

        check()
        return run(
            self._runtime,
            self._runtime.find(record.bridge),
            record.receiver,
            self._load(record.task),
            names=record.conditions,
            limit=record.limit,
            check=check,
            progress=progress,
            partial=partial,
        )

    def _load(self, name: str) -> Task:
        try:
            return load_task(self._tasks_by_name[name])
        except LatentWireError as error:  # what it says may hold paths, which are the operator's
            log.error("task %r: %s", name, error)
            raise InvalidRequest(f"task {name!r} cannot be read; the service's log says why", param="task") from None

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            await self._write_down()

    async def _write_down(self) -> None:
        """Show others that this process lives and how far it is, and let go of what is finished and written down."""
        async with self._writing:  # or an older state could be written over a newer one
            live = dict(self._live)
            if not live:
                return
            try:
                stops = await self._store.get_many("job", [_stop_key(job_id) for job_id in live])
                for record, stop in zip(live.values(), stops, strict=True):
                    if stop is not None:
                        _end(record, "cancelled", None)
                    record.beat = time.time()
                finished = [job_id for job_id, record in live.items() if record.state not in UNFINISHED]
                packed = {job_id: _packed(record) for job_id, record in live.items()}
                if packed:
                    await self._store.put_many("job", packed, ttl_seconds=KEEP_SECONDS)
                for job_id in finished:
                    self._count(self._live.pop(job_id))
            except StoreUnavailable as error:
                log.warning("%d evaluations are not written down for now: %s", len(live), error)


class JobsElsewhere(Jobs):
    """Of a service whose models take turns with no evaluation: it shows what others over its store have measured."""

    def start(self) -> None:
        """Nothing runs here."""

    async def create(self, tenant: str, body: EvaluationRequest, key: str | None = None) -> Record:
        """Refused (InvalidRequest)."""
        raise InvalidRequest("evaluations do not run on Ray; measure a bridge with latentwire evaluate", param="bridge")


def _checked(names: list[str] | None) -> list[str]:
    for name in names or ():
        if name in TRAINED:
            raise InvalidRequest(
                f"condition {name!r} is a bridge that has to be trained first, which a service does not do; "
                "use latentwire evaluate --controls",
                param="conditions",
            )
        if name not in CONDITIONS:
            known = ", ".join(CONDITIONS)
            raise InvalidRequest(
                f"no condition is called {shorten(repr(name), 80)}; there are {known}", param="conditions"
            )
    return [name for name in CONDITIONS if names is None or name in names]


def _end(record: Record, state: State, error: str | None) -> None:
    """The first end is the one that counts."""
    if record.state in UNFINISHED:
        record.state, record.error = state, error


def _packed(record: Record) -> bytes:
    return record.model_dump_json().encode()


def _unpacked(packed: bytes | None) -> Record | None:
    """A job of another process, or of an earlier one: failed where that has gone."""
    try:
        record = None if packed is None else Record.model_validate_json(packed)
    except ValidationError as error:  # of another version
        log.warning("an evaluation cannot be read: %s", first_line(error))
        return None
    if record is not None and time.time() - record.beat > LEASE_SECONDS:
        _end(record, "failed", ABANDONED)
    return record


def _identity(record: Record) -> list[Any]:
    return [record.bridge, record.task, record.receiver, record.conditions, record.limit]


def _stop_key(job_id: str) -> str:
    return job_id.replace("eval_", "stop_")


def _digest(*parts: str) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
