"""What a report shows of the latents themselves: which tokens each slot reads, and how examples lie apart."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.checkpoint import make_bridge
from latentwire.bridge.evaluation.context import EvaluationContext, open_context
from latentwire.bridge.evaluation.measure import measure
from latentwire.bridge.evaluation.slots import SHOWN_EXAMPLES, SHOWN_SLOTS, SHOWN_TOKENS, components, pictures, reads
from latentwire.bridge.evaluation.tasks import Example
from latentwire.bridge.models import FrozenLM
from tests.conftest import bridge_config

Opened = Callable[..., EvaluationContext]


@pytest.fixture(scope="module")
def made(checkpoint: Any) -> EvaluationContext:
    return open_context(checkpoint, "world", limit=6, dtype="float16", receiver=None)


@pytest.fixture
def opened(lms: dict[str, FrozenLM], made: EvaluationContext) -> Opened:
    """The same measurement with an encoder of one's choice, and sources."""

    def call(*sources: str, **encoder: object) -> EvaluationContext:
        torch.manual_seed(0)
        bridge = make_bridge(bridge_config(lms["neox"], lms["llama"], **encoder))
        examples = [Example(source, "{latent}?", " a") for source in sources]
        return replace(made, bridge=bridge, examples=examples)

    return call


def shares(context: EvaluationContext, example: int = 0) -> np.ndarray[Any, Any]:
    return np.array(reads(context, example)["reads"])


def test_a_slot_of_windows_without_mixing_reads_its_window_and_nothing_else(opened: Opened) -> None:
    found = shares(opened("Mara sings.", kind="linear"))  # BOS and 11 bytes in windows of 4
    assert found.shape == (3, 12)
    window = np.arange(12) // 4 == np.arange(3)[:, None]
    assert (found[~window] == 0).all() and found[window].min() > 0
    assert found.sum(axis=1) == pytest.approx(1, abs=0.01)


def test_mixing_lets_a_slot_read_beyond_its_window(opened: Opened) -> None:
    found = shares(opened("Mara sings.", kind="pooling"))
    window = np.arange(12) // 4 == np.arange(3)[:, None]
    assert found[window].sum() > found[~window].sum() > 0


def test_any_kind_can_be_asked_and_one_that_reads_nothing_says_so(opened: Opened) -> None:
    assert shares(opened("Mara sings.", kind="perceiver")).shape == (6, 12)
    assert (shares(opened("Mara sings.", kind="prompt")) == 0).all()


def test_global_slots_are_shown_before_the_windows_of_the_tokens_shown(opened: Opened) -> None:
    found = shares(opened("x" * 100, kind="hybrid", ratio=8, num_latents=2, depth=0))
    window = np.arange(SHOWN_TOKENS) // 8 == np.arange(SHOWN_TOKENS // 8)[:, None]
    assert found.shape == (2 + len(window), SHOWN_TOKENS) and found[:2].min() > 0
    assert (found[2:][~window] == 0).all() and found[2:][window].min() > 0


def test_tokens_are_as_the_sender_reads_them_and_long_sources_are_shown_from_their_start(opened: Opened) -> None:
    context = opened("Né", "x" * 100, kind="linear", ratio=2)
    short, long = reads(context, 0), reads(context, 1)
    assert short["tokens"] == ["<s>", "N", "\ufffd", "\ufffd"] and (short["source_tokens"], short["slots"]) == (4, 2)
    assert len(long["tokens"]) == SHOWN_TOKENS and len(long["reads"]) == SHOWN_SLOTS < SHOWN_TOKENS // 2
    assert (long["example"], long["source_tokens"], long["slots"]) == (1, 101, 51)
    assert len(reads(opened("x" * 100, kind="linear", ratio=8), 0)["reads"]) == SHOWN_TOKENS // 8


def test_components_are_the_plane_in_which_examples_differ_most() -> None:
    along, across = np.eye(8, dtype=np.float32)[:2]
    places = [(-3, 1), (0, -2), (3, 1)]
    latents = [np.stack([2 * (x * along + y * across), 0 * along]) for x, y in places]  # mean of two slots
    found = components(latents)
    assert found is not None and found["explained"] == [0.75, 0.25]
    points = np.array(found["pca"])
    assert np.abs(points) == pytest.approx(np.abs(np.array(places, dtype=np.float64)), abs=1e-3)


@pytest.mark.parametrize("count, alike", [(2, False), (5, True)])
def test_too_few_examples_or_all_alike_span_no_plane(count: int, alike: bool) -> None:
    latents = [np.full((2, 4), 0 if alike else i, dtype=np.float32) for i in range(count)]
    assert components(latents) is None


def test_a_report_that_keeps_examples_holds_both_and_another_neither(made: EvaluationContext) -> None:
    report = measure(made, conditions=["bridge"], keep_examples=True)
    assert {"slots", "latents"} <= set(report) and report["slots"] == pictures(made)["slots"]
    assert [one["example"] for one in report["slots"]] == list(range(SHOWN_EXAMPLES))
    assert len(report["latents"]["pca"]) == len(made.examples)
    assert not {"slots", "latents"} & set(measure(made, conditions=["bridge"]))
    assert not {"slots", "latents"} & set(measure(made, conditions=["none"], keep_examples=True))


def test_the_built_in_bridge_reads_mostly_in_its_window() -> None:
    bridge = Bridge.load()
    context = open_context("builtin", "world", limit=1, dtype="float16", receiver=None)
    found, ratio = shares(context), bridge.model.config.encoder.ratio
    window = np.arange(found.shape[1]) // ratio == np.arange(len(found))[:, None]
    assert (found * window).sum() > 0.7 * found.sum()
