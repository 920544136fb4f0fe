"""What goes over HTTP about evaluations, in and out."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from latentwire.service.schemas.inference import FAIL_FAST, Strict

State = Literal["queued", "running", "done", "failed", "cancelled"]
UNFINISHED: tuple[State, ...] = ("queued", "running")


class EvaluationRequest(Strict):
    """A bridge to measure on a task."""

    bridge: str = Field(description="Name of a bridge that is served.")
    task: str = Field(description="'world', or a task that this service was started with.")
    conditions: Annotated[list[str], FAIL_FAST] | None = Field(
        None, min_length=1, max_length=64, description="What the receiver gets to see; all conditions when absent."
    )
    limit: int | None = Field(None, ge=1, description="Use the first so many examples; all when absent.")
    receiver: str | None = Field(None, description="Which of the bridge's receivers answers; its first when absent.")


class Progress(BaseModel):
    """How far an evaluation is under the condition measured now, in examples.

    The condition is null while the sender still reads for all of them.
    """

    condition: str | None = None
    done: int = 0
    total: int | None = None


class EvaluationOut(BaseModel):
    """An evaluation; its report holds the conditions measured so far."""

    id: str
    bridge: str
    task: str
    receiver: str
    state: State = "queued"
    progress: Progress = Progress()
    report: dict[str, Any] | None = None
    error: str | None = Field(default=None, description="Why it failed.")
    created: datetime = Field(default_factory=lambda: datetime.now(UTC))


class EvaluationList(BaseModel):
    """The caller's evaluations, the latest first."""

    evaluations: list[EvaluationOut]


class Record(EvaluationOut):
    """An evaluation as it is kept.

    Attributes:
        tenant: Whose it is.
        owner: The process that runs it.
        beat: Unix time at which that process last said so.
    """

    tenant: str
    owner: str
    conditions: list[str]
    limit: int | None
    beat: float

    def shown(self) -> EvaluationOut:
        """What its tenant sees of it."""
        return EvaluationOut(**self.model_dump(include=set(EvaluationOut.model_fields)))


RECORDS = TypeAdapter(list[Record])
