"""Which answers from latents are trusted: signals, trust, and the threshold on known and on empty cases."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentwire.bridge.checkpoint import BUILTIN_BRIDGE, load_bridge, read_manifest, save_bridge
from latentwire.bridge.errors import CorruptCheckpoint, IncompatibleBridge, InvalidRequest
from latentwire.bridge.evaluation.gated import curve_of, retention_interval
from latentwire.bridge.gate import (
    GATE,
    SIGNALS,
    Gate,
    as_asked,
    load_gates,
    save_gates,
    signals_of,
    watched,
)
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.results import TokenLogprob
from latentwire.bridge.sampling import SamplingParams
from latentwire.training.calibration import choose, gate_of, regression

MANIFEST = read_manifest("builtin")
HEAD = MANIFEST.heads["builtin:llama"].sha256


def answer(*shares: float, then: tuple[float, ...] = ()) -> tuple[TokenLogprob, ...]:
    """An answer whose first token was the likeliest of these shares, with so likely tokens after it."""
    top = tuple((f"t{i}", math.log(share)) for i, share in enumerate(shares))
    return (TokenLogprob("t0", top[0][1], top), *(TokenLogprob("x", math.log(share)) for share in then))


def gate(**changes: Any) -> Gate:
    """The built-in bridge's gate, changed."""
    return replace(load_gates(BUILTIN_BRIDGE, MANIFEST)["builtin:llama"], **changes)


def drawn(count: int, *, sure: float = 0.5, lost_unsure: float = 0.6) -> tuple[Any, Any, Any]:
    """Signals that tell which answers are lost (N, S), and both scores: the text is always right."""
    rng = np.random.default_rng(0)
    is_sure = rng.random(count) < sure
    lowest = np.where(is_sure, -0.1, -3.0) + rng.normal(0, 0.05, count)
    signals = np.stack([rng.random(count) * 1e-4, 9 + rng.normal(0, 0.1, count), lowest / 2, lowest], axis=1)
    ours = np.where(is_sure, 1.0, (rng.random(count) > lost_unsure).astype(float))
    return signals, ours, np.ones(count)


def test_the_signals_are_those_of_the_first_token_and_of_all() -> None:
    signals = signals_of(answer(0.5, 0.25, then=(0.9, 0.1)))
    assert tuple(signals) == SIGNALS
    assert signals["first_entropy"] == pytest.approx(0.5 * math.log(2) + 2 * 0.25 * math.log(4))  # a quarter is lumped
    assert signals["first_margin"] == pytest.approx(math.log(2))
    assert signals["mean_logprob"] == pytest.approx((math.log(0.5) + math.log(0.9) + math.log(0.1)) / 3)
    assert signals["lowest_logprob"] == pytest.approx(math.log(0.1))


def test_an_impossible_token_is_no_infinite_evidence() -> None:
    never = TokenLogprob("x", -math.inf, (("a", 0.0), ("b", -math.inf)))
    assert all(map(math.isfinite, signals_of([never]).values()))


def test_trust_is_the_logistic_function_of_the_weighted_signals() -> None:
    made = gate(weights=dict.fromkeys(SIGNALS, 0.0) | {"lowest_logprob": 2.0}, intercept=1.0)
    assert made.trust(answer(0.5)) == pytest.approx(1 / (1 + math.exp(-(1.0 + 2.0 * math.log(0.5)))))
    assert replace(made, intercept=-1e6).trust(answer(0.5)) == 0.0 and made.trust(()) == 0.0


def said(text: str, *shares: float) -> Generation:
    return Generation(text, "stop", 2, answer(*shares))


def test_answers_below_the_least_trust_are_those_of_the_text() -> None:
    made = gate(weights=dict.fromkeys(SIGNALS, 0.0) | {"lowest_logprob": 1.0}, intercept=0.0)
    made = replace(made, reached=replace(made.reached, trust=made.trust(answer(0.5))))
    judged = made.judge([said("sure", 0.5), said("unsure", 0.4), Generation("", "stop", 1, ())])
    assert judged.refused == [1, 2] and [source for source, _ in judged] == ["latent", "text", "text"]
    assert [trust for _, trust in judged] == [made.reached.trust, made.trust(answer(0.4)), 0.0]
    given = judged.given([said("sure", 0.5)] * 3, [said("text 1", 0.9), said("text 2", 0.9)])
    assert [one.text for one in given] == ["sure", "text 1", "text 2"]


def test_an_answer_is_watched_whatever_its_caller_asked_for_and_shown_as_asked() -> None:
    for asked, seen in ((None, 5), (2, 5), (9, 9)):
        params = SamplingParams(logprobs=asked)
        assert watched(params).logprobs == seen
        given = as_asked(said("a", 0.4, 0.3, 0.2), params)
        assert [len(one.top) for one in given.logprobs or ()] == ([] if asked is None else [min(asked, 3)])
        assert (given.logprobs is None) == (asked is None)


def test_the_regression_finds_the_weights_that_made_the_cases() -> None:
    rng = np.random.default_rng(1)
    signals = np.stack([rng.random(4000), rng.random(4000) * 4, -rng.random(4000), -3 * rng.random(4000)], axis=1)
    odds = 1.0 - 1.5 * signals[:, 0] + 0.8 * signals[:, 1] + 1.2 * signals[:, 3]
    weights, intercept = regression(signals, rng.random(4000) < 1 / (1 + np.exp(-odds)))
    assert [*weights, intercept] == pytest.approx([-1.5, 0.8, 0.0, 1.2, 1.0], abs=0.35)


def test_no_signal_counts_against_its_sense() -> None:
    rng = np.random.default_rng(2)
    signals = np.stack([rng.random(300) * 1e-4, *(-rng.random((3, 300)))], axis=1)
    good = signals[:, 0] + signals[:, 1] * 1e-4 > -0.5e-4 + 0.5e-4 * rng.random(300)  # the less sure, the better
    weights, _ = regression(signals, good)
    assert weights[0] <= 0 <= weights[1:].min()


def test_answers_are_trusted_down_to_where_the_lost_ones_begin() -> None:
    made = gate_of(*drawn(800), 0.98)
    assert made["reached"].coverage == pytest.approx(0.5, abs=0.06)
    assert made["reached"].low >= 0.98 and made["reached"].retention >= made["reached"].low
    assert made["coverage_low"] < made["reached"].coverage < made["coverage_high"]
    assert made["curve"][-1].coverage == 1.0 and made["curve"][-1].retention == pytest.approx(0.7, abs=0.05)
    assert made["examples"] == 800 and tuple(made["weights"]) == SIGNALS


def test_a_lower_target_trusts_more_answers() -> None:
    cases = drawn(800)
    assert gate_of(*cases, 0.85)["reached"].coverage > gate_of(*cases, 0.98)["reached"].coverage + 0.1


def test_a_bridge_as_good_as_the_text_is_always_trusted() -> None:
    signals, _, texts = drawn(400)
    made = gate_of(signals, texts, texts, 0.98)
    assert made["reached"].coverage == 1.0 and not any(made["weights"].values())


def test_signals_that_tell_nothing_reach_no_target() -> None:
    signals, ours, texts = drawn(800, sure=0.0, lost_unsure=0.5)
    with pytest.raises(InvalidRequest, match=r"no trust keeps 0.999 .* the best keeps at least 0\.\d+"):
        gate_of(signals, ours, texts, 0.999)
    assert gate_of(signals, ours, texts, 0.9)["reached"].coverage < 0.25


def test_an_answer_that_says_nothing_is_the_last_to_be_trusted() -> None:
    signals, ours, texts = drawn(400)
    signals[:40], ours[:40] = np.nan, 0.0
    made = gate_of(signals, ours, texts, 0.98)
    assert made["reached"].coverage < 0.9 and made["curve"][-1].trust == 0.0


def test_the_threshold_stops_before_the_first_step_that_misses() -> None:
    """What comes after a miss may look well by chance: it is not tried."""
    trust, texts = np.linspace(1, 0, 200), np.ones(200)
    ours = texts.copy()
    ours[80:90], ours[100:] = 0.0, 2.0
    curve = curve_of(trust, ours, texts)
    chosen = choose(curve, 0.97)
    assert chosen is not None and 0.35 <= chosen.coverage <= 0.42
    assert curve[-1].low > 0.97


def test_none_lost_among_few_is_not_taken_for_none_ever_lost() -> None:
    few, many = retention_interval(np.ones(50), np.ones(50)), retention_interval(np.ones(500), np.ones(500))
    assert few[0] == pytest.approx(0.025 ** (1 / 50), abs=0.03)  # Clopper and Pearson
    assert many[0] == pytest.approx(0.025 ** (1 / 500), abs=0.003)


def test_a_gate_is_what_it_was_when_it_is_read_back(tmp_path: Path) -> None:
    save_gates(tmp_path, MANIFEST.bridge_id, {"builtin:llama": gate(intercept=0.1 + 0.2)})
    assert load_gates(tmp_path, MANIFEST) == {"builtin:llama": gate(intercept=0.1 + 0.2)}
    assert [path.name for path in tmp_path.iterdir()] == [GATE]


def test_a_checkpoint_without_a_gate_has_none(tmp_path: Path) -> None:
    assert load_gates(tmp_path, MANIFEST) == {}


def test_a_gate_of_another_bridge_or_receiver_or_head_is_refused_with_both(tmp_path: Path) -> None:
    for bridge_id, gates, both in (
        ("f" * 32, {"builtin:llama": gate()}, ("f" * 32, MANIFEST.bridge_id)),
        (MANIFEST.bridge_id, {"other": gate()}, ("'other'", "builtin:llama")),
        (MANIFEST.bridge_id, {"builtin:llama": gate(head_sha256="e" * 64)}, ("e" * 64, HEAD)),
    ):
        save_gates(tmp_path, bridge_id, gates)
        with pytest.raises(IncompatibleBridge) as refused:
            load_gates(tmp_path, MANIFEST)
        assert all(value in str(refused.value) for value in both) and GATE in str(refused.value)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"intercept": "much"}, "intercept"),
        ({"intercept": math.inf}, "intercept"),
        ({"weights": {"first_entropy": 1.0}}, "weights"),
        ({"weights": {**dict.fromkeys(SIGNALS, 1.0), "luck": 1.0}}, "luck"),
        ({"luck": 1}, "luck"),
    ],
)
def test_a_damaged_gate_is_refused_by_its_field(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    document = json.loads((BUILTIN_BRIDGE / GATE).read_text())
    document["gates"]["builtin:llama"] |= change
    (tmp_path / GATE).write_text(json.dumps(document))
    with pytest.raises(CorruptCheckpoint, match=named):
        load_gates(tmp_path, MANIFEST)


def test_new_weights_end_the_gate_of_the_old_ones(tmp_path: Path) -> None:
    _, bridge = load_bridge("builtin")
    save_bridge(tmp_path, bridge)
    save_gates(tmp_path, MANIFEST.bridge_id, {"builtin:llama": gate()})
    save_bridge(tmp_path, bridge)
    assert not (tmp_path / GATE).exists()
