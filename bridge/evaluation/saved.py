"""Reports read back from their files, and what is none told apart."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from latentwire.bridge.errors import InvalidRequest, first_line


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Row(_Part):
    metric: str
    value: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None
    ttft_ms: FiniteFloat | None


class _Versus(_Part):
    difference: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None
    p: FiniteFloat


class _Headline(_Part):
    against: str
    ratio: FiniteFloat | None
    low: FiniteFloat | None
    high: FiniteFloat | None
    missing: list[str]


class _Sizes(_Part):
    latent: float = Field(gt=0, allow_inf_nan=False)
    source: float = Field(gt=0, allow_inf_nan=False)
    receiver_kv: FiniteFloat


class _Model(_Part):
    name: str
    fingerprint: str


class _Provenance(_Part):
    task: str
    data_sha256: str
    seed: int
    steps: int
    code_version: str
    recipe: dict[str, Any]


class _About(_Part):
    command: str | None
    versions: dict[str, str]
    data_sha256: str
    dtype: str
    sender: _Model
    receiver: _Model
    encoder: dict[str, Any]
    provenance: _Provenance


class _Example(_Part):
    source: str
    prompt: str
    wanted: str
    also: list[str] = []
    said: dict[str, str]
    scores: dict[str, FiniteFloat]


class _Reads(_Part):
    example: int
    tokens: list[str]
    reads: list[list[FiniteFloat]]
    source_tokens: int
    slots: int


class _Latents(_Part):
    pca: list[tuple[FiniteFloat, FiniteFloat]]
    explained: tuple[FiniteFloat, FiniteFloat]


class _Report(_Part):
    """A report as ``measure`` writes it, as far as others read it."""

    checkpoint: str
    bridge_id: str
    task: str
    n: int = Field(gt=0)
    conditions: dict[str, _Row] = Field(min_length=1)
    bytes: _Sizes
    source_tokens_per_soft_token: float = Field(gt=0, allow_inf_nan=False)
    receiver_tokens_per_soft_token: float = Field(gt=0, allow_inf_nan=False)
    truncated: int
    content_share: FiniteFloat | None
    # What came later than the first reports.
    dropped: dict[str, int]
    headline: _Headline | None
    comparisons: dict[str, _Versus]
    content_share_interval: tuple[FiniteFloat, FiniteFloat] | None
    sender_share: FiniteFloat | None
    sender_share_interval: tuple[FiniteFloat, FiniteFloat] | None
    about: _About
    left_out: dict[str, str] = {}
    examples: list[_Example] | None = None
    slots: list[_Reads] | None = None
    latents: _Latents | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "_Report":
        counts = [] if self.examples is None else [len(self.examples)]
        counts += [] if self.latents is None else [len(self.latents.pca)]
        if any(count != self.n for count in counts):
            raise ValueError(f"n is {self.n}, with as many as {counts} examples and latents")
        for example in self.examples or ():
            if lacking := set(self.conditions) - (set(example.scores) & set(example.said)):
                raise ValueError(f"an example has nothing of {min(lacking)!r}")
        if any(len(row) != len(one.tokens) for one in self.slots or () for row in one.reads):
            raise ValueError("a slot does not have as many shares as there are tokens")
        if any(one.example not in range(len(self.examples or ())) for one in self.slots or ()):
            raise ValueError("slots are of an example that is not there")
        return self


def read_report(path: Path) -> dict[str, Any]:
    """The report in a JSON file.

    Raises:
        InvalidRequest: The file holds none, or one of an older version; the field at fault is named.
        OSError: It cannot be read.
    """
    data = path.read_bytes()
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path}: not JSON: {first_line(error)}", param="report") from None
    try:
        _Report.model_validate_json(data)
    except ValidationError as error:
        found = error.errors()
        missing = [str(one["loc"][0]) for one in found if one["type"] == "missing" and len(one["loc"]) == 1]
        if len(missing) == len(found) and isinstance(document, dict) and "conditions" in document:
            raise InvalidRequest(
                f"{path}: a report without {', '.join(missing)}, as older versions wrote it; measure the bridge again",
                param="report",
            ) from None
        where = ".".join(map(str, found[0]["loc"])) or "the document"
        raise InvalidRequest(
            f"{path}: no report of an evaluation: {where}: {found[0]['msg']}", param="report"
        ) from None
    return dict(document)
