"""What the built-in bridge says of its own latents: how many facts of held-out sources come back, and how likely.

Asked: .95 of the facts. Beside them stand the receiver that repeats the text itself, each source's facts in the reading
of another, and the facts that the same latents answer when asked for one by one.
"""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import typer
from rich.console import Console

from benchmarks.record import record
from latentwire.bridge.bridge import BATCH_ROWS, Bridge
from latentwire.bridge.engine import LatentPrompt, generate_from_latents
from latentwire.bridge.evaluation import world
from latentwire.bridge.evaluation.evaluate import progress_bar
from latentwire.bridge.evaluation.statistics import interval
from latentwire.bridge.prompt import REPEAT
from latentwire.bridge.results import Latent, Reading
from latentwire.bridge.sampling import SamplingParams


def sentences(text: str) -> set[str]:
    """The sentences of a text of the world, which has no other full stops."""
    return {sentence.strip() for sentence in text.split(".")} - {""}


def recovered(told: Sequence[world.Fact], said: str) -> list[bool]:
    """Which facts a text says, in whichever wording."""
    found = sentences(said)
    return [
        any(words.format(s=fact.subject, v=fact.value).removesuffix(".") in found for words in fact.relation.statements)
        for fact in told
    ]


def invented(source: str, said: str) -> float:
    """Share of the sentences of a text that its source does not hold, word by word."""
    found = sentences(said)
    return len(found - sentences(source)) / max(len(found), 1)


def repeated(bridge: Bridge, texts: Sequence[str], max_tokens: int = 160) -> list[str]:
    """What the receiver says that reads the texts themselves at the same prompt."""
    name, params = bridge.receiver(None), SamplingParams(max_tokens)
    prompts = [LatentPrompt(bridge.compose(name, text, REPEAT, params), None, params) for text in texts]
    with bridge.lend(name) as lm:
        return [one.text.removeprefix(" ") for one in generate_from_latents(bridge.model, name, lm, prompts)[0]]


def answered(bridge: Bridge, latents: Sequence[Latent], scenes: Sequence[world.Scene]) -> list[list[bool]]:
    """Which of the facts are answered right, each asked for by its question."""
    asked = [(at, *pair) for at, scene in enumerate(scenes) for pair in scene.questions]
    said = bridge.generate(
        [latents[at] for at, _, _ in asked],
        [world.QUESTION.replace("{question}", question) for _, question, _ in asked],
    )
    right = iter([text.strip() == answer for text, (_, _, answer) in zip(said.texts, asked, strict=True)])
    return [[next(right) for _ in scene.questions] for scene in scenes]


def shares(told: Sequence[Sequence[world.Fact]], found: Sequence[Sequence[bool]]) -> dict[str, dict[str, float]]:
    """Share of facts found: by their place in the source, and by what they are about."""
    place: dict[str, list[bool]] = {}
    relation: dict[str, list[bool]] = {}
    for facts, each in zip(told, found, strict=True):
        for at, (fact, is_found) in enumerate(zip(facts, each, strict=True), start=1):
            place.setdefault(str(at), []).append(is_found)
            relation.setdefault(fact.relation.name, []).append(is_found)
    return {
        name: {key: fmean(group[key]) for key in sorted(group)}
        for name, group in (("place", place), ("relation", relation))
    }


def figure(scores: Iterable[float | Sequence[bool]]) -> dict[str, Any]:
    """The mean over sources, with its interval; of facts, of each source's share."""
    each = [fmean(score) if isinstance(score, list) else float(score) for score in scores]
    return {"value": fmean(each), "interval": interval(each)}


def main(checkpoint: str = "builtin", limit: int = 300) -> None:
    """Read back the latents of LIMIT held-out sources."""
    bridge = Bridge.load(checkpoint)
    told = [world.facts("test", 0, index) for index in range(limit)]
    scenes = [world.scene("test", 0, index) for index in range(limit)]
    texts = [scene.source for scene in scenes]
    readings: list[Reading] = []
    direct: list[str] = []
    asked: list[list[bool]] = []
    with progress_bar(Console()) as progress:
        for start in range(0, limit, BATCH_ROWS):
            some = texts[start : start + BATCH_ROWS]
            latents = bridge.encode(some)
            readings += bridge.read(latents, against=some).readings
            asked += answered(bridge, latents, scenes[start : start + BATCH_ROWS])
            direct += repeated(bridge, some)
            progress("reading back", len(readings), limit)
    said = [reading.text for reading in readings]
    found = list(map(recovered, told, said))
    lost = [
        right for both in zip(found, asked, strict=True) for is_found, right in zip(*both, strict=True) if not is_found
    ]
    facts = np.array(list(map(fmean, found)))
    nats = np.array([reading.mean for reading in readings])
    likelier = nats >= np.median(nats)
    figures = {
        "bridge_id": bridge.manifest.bridge_id,
        "ratio": bridge.manifest.bridge.encoder.ratio,
        "sources": limit,
        "facts": figure(found),
        "facts_asked_one_by_one": figure(asked),
        "facts_of_direct": figure(map(recovered, told, direct)),
        "facts_of_another_source": figure(map(recovered, told, [said[-1], *said[:-1]])),
        "lost_that_are_answered_when_asked": fmean(lost) if lost else None,
        "exact": figure(one == text for one, text in zip(said, texts, strict=True)),
        "exact_of_direct": figure(one == text for one, text in zip(direct, texts, strict=True)),
        "invented": figure(map(invented, texts, said)),
        "cut": sum(reading.finish_reason == "length" for reading in readings),
        "nats_per_token": {
            "said": float(nats.mean()),
            "original": fmean(reading.against.mean for reading in readings if reading.against is not None),
        },
        "facts_by": shares(told, found),
        "facts_by_likelihood": {
            "likelier half": float(facts[likelier].mean()),
            "other half": float(facts[~likelier].mean()),
        },
        "examples": [
            {"source": texts[at], "said": said[at], "nats_per_token": round(float(nats[at]), 4)}
            for at in np.flatnonzero(facts < 1)[:10]
        ],
    }
    print({name: value for name, value in figures.items() if name != "examples"})
    record("readback", f"python -m benchmarks.readback --checkpoint {checkpoint} --limit {limit}", figures)


if __name__ == "__main__":
    typer.run(main)
