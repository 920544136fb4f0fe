"""What is counted, and that labels are bounded and begin at zero."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from latentwire.bridge.diversity import diversity, repetition, similarity
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.generation.base import Times
from latentwire.bridge.generation.output import Generation
from latentwire.service.api.errors import STATUS
from latentwire.service.metrics import OUTCOMES, REASONS, ROUTES, WINDOW, Metrics, ModelMetrics, Window, outcome_of
from latentwire.service.settings import Settings


def samples(metrics: Metrics | ModelMetrics) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {
        (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.mark.parametrize(
    "status, outcome",
    [
        (200, "ok"),
        (422, "invalid"),
        (429, "refused"),
        (503, "refused"),
        (499, "aborted"),
        (504, "late"),
        (500, "failed"),
    ],
)
def test_every_status_has_an_outcome(status: int, outcome: str) -> None:
    assert outcome_of(status) == outcome
    assert {outcome_of(code) for code in STATUS.values()} | {"ok"} == set(OUTCOMES)


def test_series_are_there_before_the_first_event() -> None:
    seen = samples(Metrics({"news": None}))
    for route in ROUTES:
        for outcome in OUTCOMES:
            assert seen["latentwire_outcomes_total", "news", outcome, route] == 0
    assert {key[1] for key in seen if key[0] == "latentwire_refusals_total"} == set(REASONS)
    for name in ("first_token_seconds", "inter_token_seconds", "encode_seconds", "latent_bytes"):
        assert seen[f"latentwire_{name}_count", "news"] == 0
    assert samples(ModelMetrics())["latentwire_queue_seconds_count", "score"] == 0


def test_a_stream_counts_by_its_end_and_other_routes_have_no_outcome() -> None:
    metrics = Metrics({"news": None})
    metrics.observe_end("/generate", 200, 0.5, "news", 499)
    metrics.observe_end("/metrics", 200, 0.5, "", 200)
    seen = samples(metrics)
    assert seen["latentwire_requests_total", "/generate", "200"] == 1
    assert seen["latentwire_outcomes_total", "news", "aborted", "/generate"] == 1
    assert not [key for key in seen if key[0] == "latentwire_outcomes_total" and "/metrics" in key]


def test_refusals_are_counted_by_reasons_that_are_known() -> None:
    metrics = Metrics()
    for kind in ("Overloaded", "Overloaded", InvalidRequest.__name__):
        metrics.observe_refusal(kind)
    assert samples(metrics)["latentwire_refusals_total", "Overloaded"] == 2
    assert ("latentwire_refusals_total", "InvalidRequest") not in samples(metrics)


def test_first_tokens_are_timed_from_the_arrival_and_later_ones_from_the_first() -> None:
    metrics = Metrics({"news": None})
    answers = [Generation("a b c", "stop", 5), Generation("", "stop", 1), Generation("", "stop", 0)]
    metrics.observe_times("news", 10.0, [Times(10.0, 11.0, 12.0, 14.0), Times(10.0, 11.0, 13.0, 13.0), None], answers)
    seen = samples(metrics)
    assert (
        seen["latentwire_first_token_seconds_count", "news"],
        seen["latentwire_first_token_seconds_sum", "news"],
    ) == (
        2,
        5.0,
    )
    assert (
        seen["latentwire_inter_token_seconds_count", "news"],
        seen["latentwire_inter_token_seconds_sum", "news"],
    ) == (
        1,
        0.5,
    )


def test_a_window_forgets_what_is_old() -> None:
    window = Window()
    for _ in range(WINDOW):
        window.add("the same", True)
    measured = window.measured()
    assert (measured["outputs"], measured["top_ratio"], measured["truncated_ratio"]) == (WINDOW, 1.0, 1.0)
    for i in range(WINDOW - 1):
        window.add(f"{i}", False)
    assert window.measured()["truncated_ratio"] == 1 / WINDOW
    window.add(" ", False)
    assert window.measured()["empty_ratio"] == 1 / WINDOW
    assert window.measured()["distinct_ratio"] == 1.0


@given(st.lists(st.text(alphabet="ab ", max_size=9), max_size=12))
def test_a_window_says_what_diversity_says_of_the_texts_in_it(texts: list[str]) -> None:
    window = Window()
    for text in ["a b a a"] * WINDOW + texts:
        window.add(text, False)
    measured, whole = window.measured(), diversity((["a b a a"] * WINDOW + texts)[-WINDOW:])
    assert (measured["outputs"], measured["distinct_ratio"]) == (whole.outputs, whole.distinct_ratio)
    assert (measured["distinct_1"], measured["distinct_2"]) == (whole.distinct_1, whole.distinct_2)
    assert (measured["top_ratio"], measured["entropy_nats"]) == (
        whole.top_output_ratio, pytest.approx(whole.entropy_nats),
    )  # fmt: skip


def test_a_word_said_again_and_again_is_seen_in_different_outputs() -> None:
    window = Window()
    assert window.measured()["top_word_ratio"] == 0.0
    for i in range(8):
        window.add(f"the the the the {i}", False)
    assert window.measured()["top_word_ratio"] == 0.8


def test_how_unsure_a_receiver_was_is_told_where_any_output_says_it() -> None:
    window = Window()
    window.add("of vLLM", False)
    assert "token_entropy_nats" not in window.measured()
    for entropy in (1.0, 2.0, math.nan):  # of logits that were no numbers
        window.add("ours", False, entropy)
    assert window.measured()["token_entropy_nats"] == 1.5


def test_repetition_is_within_an_output() -> None:
    assert repetition(["a b c d", "a b c d"]) == 0.0
    assert repetition(["a b a b a b a b"]) == pytest.approx(1 - 2 / 5)
    assert repetition(["a b"]) == repetition([]) == 0.0


def test_similarity_is_the_mean_cosine_of_all_pairs() -> None:
    vectors = [np.array(v, np.float32) for v in ([2.0, 0.0], [0.0, 3.0], [5.0, 0.0])]
    assert similarity(vectors) == pytest.approx(1 / 3, abs=1e-6)
    assert similarity(vectors[:1]) == 0.0


def test_buckets_of_seconds_are_what_the_operator_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LW_LATENCY_BUCKETS", "0.5, 2,8")
    buckets = Settings().latency_buckets
    for metrics in (Metrics({"news": None}, buckets), ModelMetrics(buckets)):
        bounds = {
            key[-1] if key[0] == "latentwire_queue_seconds_bucket" else key[2]
            for key in samples(metrics)
            if key[0] in ("latentwire_first_token_seconds_bucket", "latentwire_queue_seconds_bucket")
        }
        assert bounds & {"0.5", "2.0", "8.0", "+Inf", "1.0"} == {"0.5", "2.0", "8.0", "+Inf"}


@pytest.mark.parametrize("said", ["2,1", "1,1", "", "a"])
def test_buckets_that_do_not_ascend_are_refused(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LW_LATENCY_BUCKETS", said)
    with pytest.raises(ValueError, match=r"ascending order|valid number|latency_buckets"):
        Settings()
