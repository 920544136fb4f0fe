"""Every alarm comes at its limit, once, and not just within it."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from latentwire.training import alarms
from latentwire.training.alarms import CONDITIONS, PLATEAU, PROBES, RECENT, WINDOW, Alarm, Alarms
from latentwire.training.monitor import StepRecord

WARM_UP = 20
JUDGED = WARM_UP + WINDOW  # the first step at which answers are judged

HEALTHY: dict[str, Any] = {
    "phase": "answer", "receiver": "builtin:llama", "losses": {"answer": 1.0}, "accuracy": 0.3, "first_token_top1": 0.5,
    "first_token_top5": 0.8, "entropy_nats": 2.5, "wanted_entropy_nats": 3.0, "distinct_ratio": 0.9, "top_share": 0.1,
    "wanted_top_share": 0.1, "delta_nats": 1.0, "gradient_norm": 1.0, "learning_rate": 1e-3, "seconds": 0.1,
    "data_wait_seconds": 0.0, "tokens": 100, "allocated_bytes": 40, "reserved_bytes": 50, "inactive_bytes": 0,
    "peak_bytes": 60, "device_bytes": 100, "micro_batch": 32, "out_of_memory_count": 0, "refused": False,
    "flops_per_second": 1e9, "mfu": None,
}  # fmt: skip
ALIGNING: dict[str, Any] = {
    "phase": "align", "accuracy": None, "first_token_top1": None, "first_token_top5": None, "entropy_nats": None,
    "wanted_entropy_nats": None, "distinct_ratio": None, "top_share": None, "wanted_top_share": None,
    "delta_nats": None,
}  # fmt: skip
NOT_FINITE: dict[str, Any] = {"refused": True, "loss": math.nan, "gradient_norm": math.nan, "entropy_nats": math.nan}


def steps(count: int, first: int = 1, **changes: Any) -> Iterator[StepRecord]:
    """Records of a run that goes well, but for ``changes`` (bytes in GB); its loss falls by 2 % in 200 steps."""
    given = {**HEALTHY, **changes}
    gigabytes = {name: int(value * 1e9) for name, value in given.items() if name.endswith("_bytes")}
    for step in range(first, first + count):
        yield StepRecord(**{"step": step, "loss": 2 * 0.9999**step, **given, **gigabytes})


def alarms_of(records: Iterable[StepRecord], *, rows: int = 32, warm_up_steps: int = WARM_UP) -> list[Alarm]:
    judge = Alarms(rows=rows, warm_up_steps=warm_up_steps)
    return [alarm for record in records for alarm in judge.observe(record)]


def begun(records: Iterable[StepRecord], **settings: int) -> list[tuple[int, str]]:
    return [(alarm.step, alarm.name) for alarm in alarms_of(records, **settings)]


def test_the_defaults_are_those_of_the_docs() -> None:
    assert (alarms.GRADIENT_TIMES, alarms.FIRST_TOKEN_TOP1, alarms.ENTROPY_NATS, alarms.TOP_SHARE) == (5, 0.1, 1, 0.5)
    assert (alarms.DELTA_NATS, alarms.LEAST_PROGRESS, alarms.TINY_LOSS, alarms.MEMORY_SHARE) == (
        0.01,
        0.001,
        0.01,
        0.94,
    )
    assert (WINDOW, PLATEAU, PROBES, alarms.LEAST_ROWS) == (50, 200, 5, 4)


def test_a_run_that_goes_well_raises_no_alarm() -> None:
    assert begun(steps(1000)) == []


@pytest.mark.parametrize(
    "name, step, beyond, within, said",
    [
        ("first_token", JUDGED, {"first_token_top1": 0.098}, {"first_token_top1": 0.1}, ["9.8%", "10%", "--"]),
        ("low_entropy", JUDGED, {"entropy_nats": 0.98}, {"entropy_nats": 1.0}, ["0.98", "1.00", "3.00", "weight"]),
        ("one_output", JUDGED, {"top_share": 0.51}, {"top_share": 0.5}, ["51.0%", "50.0%", "10.0%", "margin"]),
        ("flat_delta", JUDGED, {"delta_nats": 0.009}, {"delta_nats": 0.01}, ["0.009", "0.01", "nothing crosses"]),
        ("flat_delta", JUDGED, {"delta_nats": -1.0}, {}, ["-1.000"]),
        ("loss_plateau", WARM_UP + 2 * PLATEAU, {"loss": 2.0}, {}, ["2.0000", "0.1%", "learning rate"]),
        ("loss_plateau", WARM_UP + 2 * PLATEAU, {"loss": -1.0}, {}, ["-1.0000"]),
        ("loss_plateau", WARM_UP + 2 * PLATEAU, {"loss": 0.011}, {"loss": 0.0099}, ["0.0110"]),
        ("memory", 1, {"peak_bytes": 95}, {"peak_bytes": 94}, ["95.0 of 100.0 GB", "94%"]),
        ("non_finite", 1, NOT_FINITE, {}, ["loss is nan", "norm nan", "refused"]),
    ],
)  # fmt: skip
def test_each_alarm_comes_beyond_its_limit_and_not_within(
    name: str, step: int, beyond: dict[str, Any], within: dict[str, Any], said: list[str]
) -> None:
    raised = alarms_of(steps(700, **beyond))
    assert [(alarm.step, alarm.name) for alarm in raised] == [(step, name)]
    assert begun(steps(700, **within)) == []
    assert all(word in raised[0].message for word in said), raised[0].message
    assert raised[0].message.startswith(("the ", "another ", "51.0%")), "one receiver need not be named"
    assert "\n" not in raised[0].message and not raised[0].message.endswith(".")


@pytest.mark.parametrize("per_step, plateau", [(0.000004, True), (0.000006, False)])
def test_a_loss_that_falls_by_less_than_a_thousandth_in_200_steps_stands_still(per_step: float, plateau: bool) -> None:
    falling = (replace(record, loss=2 * (1 - per_step * record.step)) for record in steps(600))
    assert begun(falling) == ([(WARM_UP + 2 * PLATEAU, "loss_plateau")] if plateau else [])


def test_a_loss_that_fell_at_once_stands_still_when_both_windows_are_past_the_fall() -> None:
    fell = (replace(record, loss=2.0 if record.step <= 300 else 1.0) for record in steps(1000))
    assert begun(fell) == [(300 + 2 * PLATEAU, "loss_plateau")]


def diverging(at: int, *, norm: float, loss: float, usual: float = 200.0, **changes: Any) -> list[StepRecord]:
    """Thirty steps and ten more, in which norm and loss are others."""
    before = steps(at, gradient_norm=usual, loss=2.0)
    return [*before, *steps(RECENT, at + 1, **{"gradient_norm": norm, "loss": loss, **changes})]


def test_a_gradient_norm_is_held_against_the_runs_own_whatever_its_size() -> None:
    for usual in (0.02, 200.0, 2e6):
        half = 30 + RECENT // 2 + 1  # of ten steps six are then at it, and their median is
        assert begun(diverging(30, norm=5.1 * usual, loss=3.0, usual=usual)) == [(half, "gradient_norm")]
        assert begun(diverging(30, norm=4.9 * usual, loss=3.0, usual=usual)) == []
    (alarm,) = alarms_of(diverging(30, norm=2000.0, loss=3.0))
    for words in ("norm before clipping is 1100", "5 times the 200 before", "rose from 2.000 to", "--warmup-steps"):
        assert words in alarm.message, alarm.message


def test_a_gradient_norm_that_rises_while_the_loss_falls_is_no_alarm() -> None:
    assert begun(diverging(30, norm=2000.0, loss=1.9)) == []


def test_a_gradient_norm_is_not_judged_across_phases_nor_by_refused_or_few_steps() -> None:
    assert begun(diverging(30, norm=2000.0, loss=3.0, **ALIGNING)) == []
    assert begun(diverging(RECENT - 6, norm=2000.0, loss=3.0)) == []
    refused = begun(diverging(30, norm=2000.0, loss=3.0, refused=True))
    assert [name for _, name in refused] == ["non_finite"]


def test_every_condition_has_a_name_and_an_advice_of_its_own() -> None:
    assert len({c.name for c in CONDITIONS}) == len({c.advice for c in CONDITIONS}) == len(CONDITIONS) == 8
    assert {c.name for c in CONDITIONS if c.collapse} == {"first_token", "low_entropy", "one_output", "flat_delta"}


@pytest.mark.parametrize("name, changes", [("one_output", {"top_share": 0.9}), ("memory", {"peak_bytes": 99})])
def test_an_alarm_knows_whether_it_means_a_dead_run(name: str, changes: dict[str, Any]) -> None:
    (alarm,) = alarms_of(steps(100, **changes))
    assert (alarm.name, alarm.collapse) == (name, name == "one_output")
    with pytest.raises(FrozenInstanceError):
        alarm.step = 2  # type: ignore[misc]


@pytest.mark.parametrize("entropy, low", [(0.34, True), (0.36, False)])
def test_two_labels_are_held_against_their_own_entropy(entropy: float, low: bool) -> None:
    two = steps(100, wanted_entropy_nats=0.69, entropy_nats=entropy)
    assert begun(two) == ([(JUDGED, "low_entropy")] if low else [])


@pytest.mark.parametrize(
    "wanted, share, one", [(0.4, 0.59, False), (0.4, 0.61, True), (0.8, 0.95, False), (0.8, 0.96, True)]
)
def test_a_common_answer_may_be_said_often(wanted: float, share: float, one: bool) -> None:
    common = steps(100, wanted_top_share=wanted, top_share=share)
    assert begun(common) == ([(JUDGED, "one_output")] if one else [])


def test_a_receiver_that_is_always_right_raises_no_alarm_whatever_the_answers() -> None:
    for entropy, share in [(0.69, 0.55), (0.1, 0.98), (0.0, 1.0)]:
        right: dict[str, Any] = {
            "entropy_nats": entropy,
            "wanted_entropy_nats": entropy,
            "top_share": share,
            "wanted_top_share": share,
        }
        assert begun(steps(100, first_token_top1=1.0, **right)) == []


@pytest.mark.parametrize("rows, names", [(3, []), (4, ["low_entropy", "one_output"])])
def test_shares_of_a_few_rows_are_not_judged(rows: int, names: list[str]) -> None:
    collapsed = steps(100, entropy_nats=0.0, top_share=1.0)
    assert [name for _, name in begun(collapsed, rows=rows)] == names


def test_single_bad_batches_do_not_alarm_where_a_mean_is_judged() -> None:
    odd: dict[str, Any] = {"first_token_top1": 0.0, "entropy_nats": 0.0, "top_share": 1.0, "delta_nats": 0.0}
    records = (replace(record, **odd) if record.step % 10 == 0 else record for record in steps(300))
    assert begun(records) == []


def test_the_warm_start_and_the_warm_up_are_not_judged() -> None:
    def dead(first: int, count: int) -> Iterator[StepRecord]:
        return steps(count, first, first_token_top1=0.0, entropy_nats=0.0, top_share=1.0, delta_nats=0.0)

    names = ["first_token", "low_entropy", "one_output", "flat_delta"]
    started = [*steps(500, loss=0.5, **ALIGNING), *dead(501, JUDGED)]
    assert begun(started) == [(500 + JUDGED, name) for name in names]
    assert begun(dead(1, 60), warm_up_steps=0) == [(WINDOW, name) for name in names]
    assert begun([*dead(1, WARM_UP), *steps(500, WARM_UP + 1)]) == []


@pytest.mark.parametrize(
    "name, stuck",
    [
        ("first_token", {"first_token_top1": 0.0}),
        ("low_entropy", {"entropy_nats": 0.0}),
        ("one_output", {"top_share": 1.0}),
    ],
)
def test_a_run_that_is_leaving_collapse_behind_is_not_stuck_in_it(name: str, stuck: dict[str, float]) -> None:
    leaving = [*steps(JUDGED - RECENT, **stuck), *steps(300, JUDGED - RECENT + 1)]
    assert begun(leaving) == []
    assert begun([*steps(JUDGED, **stuck), *steps(300, JUDGED + 1)]) == [(JUDGED, name)]


def test_probes_are_counted_where_they_were_made() -> None:
    probed = (
        replace(record, delta_nats=0.0 if record.step % 20 == 0 else None)
        for record in steps(300, first_token_top1=0.5)
    )
    assert begun(probed, warm_up_steps=25) == [(120, "flat_delta")]


def test_a_memory_without_a_size_is_not_judged() -> None:
    assert begun(steps(10, peak_bytes=5, device_bytes=0)) == []


def test_a_condition_alarms_once_while_it_lasts() -> None:
    assert begun(steps(500, peak_bytes=95)) == [(1, "memory")]


@pytest.mark.parametrize("clear, again", [(WINDOW - 1, []), (WINDOW, [(12 + WINDOW, "memory")])])
def test_a_condition_alarms_again_only_after_a_window_without_it(clear: int, again: list[tuple[int, str]]) -> None:
    history = [
        *steps(1),
        *steps(10, 2, peak_bytes=95),
        *steps(clear, 12),
        *steps(10, 12 + clear, peak_bytes=95),
    ]
    assert begun(history) == [(2, "memory"), *again]


def test_refused_steps_never_reach_the_means() -> None:
    poison: dict[str, Any] = {**NOT_FINITE, "first_token_top1": 0.0, "delta_nats": math.nan, "top_share": 1.0}
    mixed = [replace(record, **poison) if record.step % 2 else record for record in steps(1000)]
    assert begun(mixed) == [(1, "non_finite")]
    flat = (replace(record, **poison) if record.step % 2 else replace(record, loss=2.0) for record in steps(1000))
    assert begun(flat) == [(1, "non_finite"), (2 * (WARM_UP + 2 * PLATEAU), "loss_plateau")]


def test_a_value_that_is_not_finite_in_an_applied_step_is_left_out_of_its_mean() -> None:
    odd = (replace(record, delta_nats=math.inf if record.step % 2 else 0.0) for record in steps(100))
    assert begun(odd) == [(JUDGED, "flat_delta")]


def test_receivers_are_judged_apart_and_named() -> None:
    def turns() -> Iterator[StepRecord]:
        for record in steps(1000):
            dead = record.step // 100 % 2 == 1
            yield replace(record, receiver="dead", first_token_top1=0.0) if dead else record

    raised = alarms_of(turns())
    assert [(alarm.step, alarm.name) for alarm in raised] == [(99 + JUDGED, "first_token")]
    assert raised[0].message.startswith("dead: the first token of only 0.0%")


@pytest.mark.parametrize("killed", [1, JUDGED - 1, JUDGED, 250, 600])
def test_a_resumed_run_raises_what_one_never_interrupted_would(killed: int) -> None:
    history = [*steps(150, top_share=0.9), *steps(300, 151, loss=2.0), *steps(300, 451, top_share=0.9, loss=2.0)]
    whole = begun(history)
    assert {name for _, name in whole} == {"one_output", "loss_plateau"} and len(whole) == 3
    resumed = Alarms(rows=32, warm_up_steps=WARM_UP)
    resumed.replay(history[:killed])
    later = [(alarm.step, alarm.name) for record in history[killed:] for alarm in resumed.observe(record)]
    assert later == [alarm for alarm in whole if alarm[0] > killed]
