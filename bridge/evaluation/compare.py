"""Reports beside each other: checked to be comparable, those of one recipe over its seeds."""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.plots import Plot, Point, against
from latentwire.bridge.evaluation.statistics import LEVEL, compared, over_seeds

Document = Mapping[str, Any]
FEWEST_SEEDS = 3
KINDS = {"bridge": 0, "text": 1, "zlib": 3, "same_budget": 2, "token_pruned": 4}
"""What stands in a plot, with the number of its shape and colour."""


class Estimate(NamedTuple):
    """A score and its 95 % interval, where there is one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Entry:
    """One bridge of a comparison: its report, or several that differ in the seed of their training alone."""

    name: str
    documents: Sequence[Document]

    @property
    def seeds(self) -> list[int]:
        return [document["about"]["provenance"]["seed"] for document in self.documents]

    @property
    def first(self) -> Document:
        return self.documents[0]

    def estimate(self, condition: str) -> Estimate | None:
        """The score under a condition, the mean over the seeds; None without it.

        Its interval is over the seeds where they differ; else, as of a condition without a bridge, over the examples.
        """
        rows = [document["conditions"][condition] for document in self.documents if condition in document["conditions"]]
        if not rows:
            return None
        values = [row["value"] for row in rows]
        if len(set(values)) == 1:
            return Estimate(values[0], rows[0]["low"], rows[0]["high"])
        value, interval = over_seeds(values)
        return Estimate(value, *(interval or (None, None)))

    def mean(self, *keys: str) -> float:
        """The mean over the reports of a number somewhere in them."""
        return float(np.mean([_at(document, keys) for document in self.documents]))

    @property
    def text(self) -> str | None:
        """The better condition in which the receiver reads the source, if there is one."""
        headline = self.first["headline"]
        return None if headline is None else str(headline["against"])

    @property
    def missing(self) -> list[str]:
        """Which of those conditions were not measured, where one was."""
        headline = self.first["headline"]
        return [] if headline is None else list(headline["missing"])

    @cached_property
    def scores(self) -> list[float] | None:
        """The bridge's score on each example, mean over seeds; None where a report kept no examples."""
        rows = [
            [example["scores"].get("bridge") for example in document.get("examples") or ()]
            for document in self.documents
        ]
        if any(not row or None in row for row in rows):
            return None
        return [float(value) for value in np.mean(np.array(rows, dtype=np.float64), axis=0)]

    @cached_property
    def zlib_bytes(self) -> float | None:
        """Mean bytes of a source packed by zlib; None where no examples were kept."""
        sources = [example["source"].encode() for example in self.first.get("examples") or ()]
        return float(np.mean([len(zlib.compress(source, 9)) for source in sources])) if sources else None


def _at(document: Any, keys: Sequence[str]) -> float:
    for key in keys:
        document = document[key]
    return float(document)


@dataclass(frozen=True)
class Comparison:
    """Bridges measured on the same examples of one task.

    Attributes:
        entries: In the order of their files; ``ahead`` has for each but the first how far its bridge is ahead of the
            first one's on the same examples (``statistics.compared``), where examples were kept.
        notes: What has to be known to read it, a line each.
    """

    task: str
    n: int
    entries: Sequence[Entry]
    ahead: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str]

    @property
    def conditions(self) -> list[str]:
        """Every condition that some entry has."""
        return list(dict.fromkeys(name for entry in self.entries for d in entry.documents for name in d["conditions"]))


def compare(reports: Mapping[str, Document]) -> Comparison:
    """Put reports beside each other, by the names of their files.

    Raises:
        InvalidRequest: Two of them are of other data or other examples; both are named.
    """
    first, *others = reports
    for name in others:
        _check_comparable(first, reports[first], name, reports[name])
    notes: list[str] = []
    groups: dict[str, dict[str, Document]] = {}
    for name, document in reports.items():
        group = groups.setdefault(_recipe(name, document), {})
        again = next((other for other, known in group.items() if _seed(known) == _seed(document)), None)
        if again is None:
            group[name] = document
        else:
            notes.append(f"{name} is of the recipe and seed of {again}, and not counted again")
    entries = [
        Entry(label, list(group.values())) for label, group in zip(_labels(groups), groups.values(), strict=True)
    ]
    for entry in entries:
        if 1 < len(entry.documents) < FEWEST_SEEDS:
            notes.append(
                f"{entry.name}: {len(entry.documents)} seeds are too few for an interval; {FEWEST_SEEDS} needed"
            )
    if any(len(entry.documents) > 1 for entry in entries):
        notes.append(
            "of several seeds: the mean, with Student's t interval over the seeds; over the examples where they agree"
        )
    for text in dict.fromkeys(name for entry in entries for name in entry.missing):
        lacking = ", ".join(entry.name for entry in entries if text in entry.missing)
        notes.append(f"no {text!r} of {lacking}, which may be the better of the two")
    lead = _ahead(entries)
    if any(row["p"] < 1 - LEVEL for row in lead.values()):
        notes.append("* p < .05, adjusted for the number of bridges (Holm)")
    return Comparison(reports[first]["task"], reports[first]["n"], entries, lead, notes)


def _check_comparable(first: str, one: Document, name: str, other: Document) -> None:
    if (one["task"], one["about"]["data_sha256"]) != (other["task"], other["about"]["data_sha256"]):
        shown = [f"{d['task']!r} (data {d['about']['data_sha256'][:12]})" for d in (one, other)]
        raise InvalidRequest(
            f"{name} is of task {shown[1]} and {first} of {shown[0]}: they cannot be compared", param="report"
        )
    kept = [d["examples"] for d in (one, other) if d.get("examples")]
    same = len({tuple((e["source"], e["prompt"], e["wanted"]) for e in examples) for examples in kept}) < 2
    if one["n"] != other["n"] or not same:
        count = f"{other['n']} examples and {first} on {one['n']}" if one["n"] != other["n"] else f"others than {first}"
        raise InvalidRequest(f"{name} was measured on {count}: measure both on the same ones (--limit)", param="report")


def _seed(document: Document) -> tuple[int, str]:
    return document["about"]["provenance"]["seed"], document["bridge_id"]


def _recipe(name: str, document: Document) -> str:
    """What reports share that differ in the seed alone; of a bridge without one, its file's name."""
    about = document["about"]
    recipe = {key: value for key, value in about["provenance"]["recipe"].items() if key != "seed"}
    if not recipe:
        return name
    same = [about[key] for key in ("dtype", "sender", "receiver", "encoder")]
    return json.dumps([recipe, about["provenance"]["steps"], *same], sort_keys=True)


def _labels(groups: Mapping[str, Mapping[str, Document]]) -> list[str]:
    """A name for each group: its first file's, as short as tells them apart."""
    firsts = [next(iter(group)) for group in groups.values()]
    stems = [Path(first).name.removesuffix(".json") for first in firsts]
    names = stems if len(set(stems)) == len(stems) else firsts
    sizes = [len(group) for group in groups.values()]
    return [f"{name} ({size} seeds)" if size > 1 else name for name, size in zip(names, sizes, strict=True)]


def _ahead(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """Each bridge held against the first on the same examples."""
    scores = {entry.name: entry.scores for entry in entries}
    if len(entries) < 2 or any(row is None for row in scores.values()):
        return {}
    rows = compared({name: row for name, row in scores.items() if row is not None}, entries[0].name)

    def turned(row: Mapping[str, Any]) -> dict[str, Any]:
        low, high = (None if row[end] is None else -row[end] for end in ("high", "low"))
        return {**row, "difference": -row["difference"], "low": low, "high": high}

    return {name: turned(row) for name, row in rows.items()}


def against_compression(entries: Sequence[Entry]) -> Plot | None:
    """Scores against how many receiver tokens of source a soft token, or a token of what is left of it, stands for."""
    points = []
    for entry in entries:
        ratio = entry.mean("receiver_tokens_per_soft_token")
        points += _points(entry, ((_label(entry, entries), "bridge", "bridge", ratio),))
        points += _points(entry, ((_said(entry.text), "text", entry.text, 1.0),))
        rivals = (("cut text", "same_budget"), ("pruned text", "token_pruned"))
        points += _points(entry, ((label, kind, kind, ratio) for label, kind in rivals))
    return against("Score against compression", "receiver tokens of source for each token read", points)


def against_bytes(entries: Sequence[Entry]) -> Plot | None:
    """Scores against the bytes that cross: a latent as a message, the text, and the text packed."""
    points = []
    for entry in entries:
        points += _points(entry, ((_label(entry, entries), "bridge", "bridge", entry.mean("bytes", "latent")),))
        points += _points(entry, ((_said(entry.text), "text", entry.text, entry.mean("bytes", "source")),))
        if entry.zlib_bytes is not None:
            points += _points(entry, (("text, zlib", "zlib", entry.text, entry.zlib_bytes),))
    return against("Score against bytes", "bytes for each source", points)


def _label(entry: Entry, entries: Sequence[Entry]) -> str:
    return entry.name if len(entries) > 1 else "bridge"


def _said(text: str | None) -> str:
    return "text, tuned" if text == "direct_tuned" else "text"


def _points(entry: Entry, wanted: Iterable[tuple[str, str, str | None, float]]) -> list[Point]:
    """Points of (label, kind, condition, x) whose condition was measured."""
    made = []
    for label, kind, condition, x in wanted:
        found = None if condition is None else entry.estimate(condition)
        if found is not None:
            made.append(Point(label, KINDS[kind], round(x, 3), *found))
    return made
