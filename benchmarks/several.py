"""Several sources of the world in one prompt: an example's own among others, at a place drawn by chance."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.evaluation import world
from latentwire.bridge.evaluation.metrics import exact_match
from latentwire.bridge.evaluation.statistics import interval
from latentwire.bridge.results import Output
from latentwire.bridge.sampling import SamplingParams
from latentwire.training.data import chunks

SOURCES = (1, 2, 4, 8)
COMMON = 0.5  # of the sources: a word that more of them have tells none apart
ROWS = 16


def among(bridge: Bridge, count: int, limit: int) -> dict[str, Any]:
    """Answers from so many latents, and from so many texts; the one asked about is at a place drawn by chance.

    Beside them what one latent alone gives, in the prompt for one: ``one`` is told which (the most that finding the
    source could give), and ``best_single`` asks each and keeps the answer that the receiver finds likeliest.
    """
    scenes = [world.scene("test", 0, i) for i in range(limit)]
    asked = [scene.questions[i * 7919 % len(scene.questions)] for i, scene in enumerate(scenes)]
    sources = [scene.source for scene in scenes]
    plain = [world.QUESTION.replace("{question}", question) for question, _ in asked]
    prompts = [prompt.replace("{latent}", "{latents}") for prompt in plain]
    given = [mixed(sources, question, i, count) for i, (question, _) in enumerate(asked)]
    right: dict[str, list[float]] = {"bridge": [], "direct": [], "one": [], "best_single": []}
    soft_tokens = 0
    for part in chunks(range(limit), ROWS):
        latents = dict(zip(part, bridge.encode([sources[i] for i in part]), strict=True))
        needed = sorted({j for i in part for j in given[i]} - latents.keys())
        latents |= zip(needed, bridge.encode([sources[j] for j in needed]), strict=True) if needed else {}
        made = bridge.generate(
            [[latents[j] for j in given[i]] for i in part], [prompts[i] for i in part], max_tokens=24, temperature=0.0
        )
        soft_tokens += made.usage.soft_tokens
        texts = [tuple(sources[j] for j in given[i]) for i in part]
        name = bridge.receivers[0]
        rows = bridge._rows(name, texts, [prompts[i] for i in part], SamplingParams(24, 0.0), 1)
        read = bridge._answers(name, rows)
        each = [(i, j) for i in part for j in given[i]]
        alone = bridge.generate(
            [latents[j] for _, j in each], [plain[i] for i, _ in each], max_tokens=24, temperature=0.0, logprobs=1
        )
        one, likeliest = single(each, alone.outputs)
        answers_of = {"bridge": made.texts, "direct": [row.text for row in read], "one": one, "best_single": likeliest}
        for said, answers in answers_of.items():
            right[said] += [exact_match(text, f" {asked[i][1]}") for i, text in zip(part, answers, strict=True)]
    return {
        "sources": count,
        "n": limit,
        "soft_tokens": soft_tokens / limit,
        **{name: {"em": float(np.mean(scores)), "interval": interval(scores)} for name, scores in right.items()},
    }


def single(each: Sequence[tuple[int, int]], outputs: Sequence[Output]) -> tuple[list[str], list[str]]:
    """Of answers to questions (first) from single sources (second): each question's from its own, and its likeliest."""
    own: dict[int, str] = {}
    likeliest: dict[int, tuple[float, str]] = {}
    for (question, source), output in zip(each, outputs, strict=True):
        if source == question:
            own[question] = output.text
        nats = sum(token.logprob for token in output.logprobs or ())
        likeliest[question] = max(likeliest.get(question, (-math.inf, "")), (nats, output.text))
    return list(own.values()), [text for _, text in likeliest.values()]


def mixed(sources: Sequence[str], question: str, own: int, count: int) -> list[int]:
    """Which sources a prompt has, in order: its own, and others that say nothing of what is asked about."""
    words = [set(re.findall(r"\w+", source.lower())) for source in sources]
    counts = Counter(word for each in words for word in each)
    rare = {word for word in re.findall(r"\w+", question.lower()) if counts[word] <= COMMON * len(sources)}
    about = rare & words[own]
    drawn = np.random.default_rng((count, own))
    others = [int(j) for j in drawn.permutation(len(sources)) if j != own and not about & words[j]]
    return [[own, *others[: count - 1]][at] for at in drawn.permutation(count)]
