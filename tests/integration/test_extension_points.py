"""What others may add without touching a file of ours, added here and used from end to end."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentwire.bridge.checkpoint import load_bridge, read_manifest
from latentwire.bridge.config import EncoderConfig
from latentwire.bridge.encoder import KINDS, Encoder, Pooling, slots_of
from latentwire.bridge.errors import CorruptCheckpoint, InvalidRequest
from latentwire.bridge.evaluation.conditions import CONDITIONS, Condition
from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.evaluation.html import page
from latentwire.bridge.evaluation.measure import measure
from latentwire.bridge.evaluation.metrics import METRICS, Metric
from latentwire.bridge.evaluation.report import table
from latentwire.training.config import TrainConfig, read_config
from latentwire.training.loop import train
from latentwire.training.objectives import OBJECTIVES, Objective, first_logits
from latentwire.training.run import Forward
from tests.integration.conftest import MakeConfig
from tests.integration.runs import events_of, log_of, quiet, said, task_of


@pytest.fixture
def own_kind() -> Iterator[type[Encoder]]:
    class Last(Encoder):
        """The sender's last token, in as many slots as are asked for."""

        kind = "last"

        def __init__(self, config: EncoderConfig) -> None:
            super().__init__(config)
            self.read = nn.Linear(config.sender_width, config.num_latents * config.hidden_dim)

        def slots(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            last = states[torch.arange(len(states)), mask.sum(dim=1) - 1]
            K = self.config.num_latents
            return self.read(last).reshape(len(last), K, -1), mask.any(dim=1, keepdim=True).expand(-1, K)

    yield Last
    del KINDS["last"]


def test_an_encoder_kind_is_a_class_that_is_trained_saved_loaded_and_measured(
    own_kind: type[Encoder], make: MakeConfig
) -> None:
    config = make(encoder="last", num_latents=3, max_steps=2, alignment_steps=None)
    manifest = train(config, quiet())
    _, bridge = load_bridge(config.out)
    assert type(bridge.encoder) is own_kind and manifest.bridge.encoder.kind == "last"
    assert slots_of(manifest.bridge.encoder, 40) == 3 and [r["phase"] for r in log_of(config.out)] == ["answer"] * 2
    context = open_context(config.out, "world", limit=2, dtype="float16", receiver=None)
    assert [latent.shape for latent in context.latents(range(2))] == [(3, 16)] * 2
    assert measure(context, conditions=["bridge"])["conditions"].keys() == {"bridge"}


def test_a_windowed_kind_of_ones_own_is_aligned_with_the_words_it_covers(make: MakeConfig) -> None:
    class Wide(Pooling):
        kind = "wide"

    try:
        config = make(encoder="wide", ratio=8, max_steps=3)
        train(config, quiet())
        assert [record["phase"] for record in log_of(config.out)] == ["align", "align", "answer"]
        assert slots_of(read_manifest(config.out).bridge.encoder, 17) == 3
    finally:
        del KINDS["wide"]


def test_an_encoder_that_makes_other_slots_than_it_counts_is_refused(make: MakeConfig) -> None:
    class Odd(Pooling):
        kind, windowed = "odd", False

    try:
        with pytest.raises(InvalidRequest, match=r"^encoder 'odd' makes \[\d.*\] slots; its slot_count says \[5, 5, 5"):
            train(make(encoder="odd", num_latents=5, alignment_steps=0), quiet())
    finally:
        del KINDS["odd"]


def test_a_kind_that_nobody_defined_is_refused_with_those_there_are(make: MakeConfig, own_kind: type[Encoder]) -> None:
    known = "Input should be 'pooling', 'perceiver', 'pooled-perceiver', 'hybrid', 'mean', 'linear', 'prompt' or 'last'"
    keys: dict[str, Any] = {"sender": "a", "receiver": "b", "task": "world", "out": "c"}
    with pytest.raises(InvalidRequest, match=rf"^encoder: {known}, got 'vq'$"):
        read_config(None, {**keys, "encoder": "vq"})
    config = make(max_steps=1)
    train(config, quiet())
    file = config.out / "config.json"
    document = json.loads(file.read_text())
    document["bridge"]["encoder"]["kind"] = "vq"
    file.write_text(json.dumps(document))
    for load in (read_manifest, load_bridge):
        with pytest.raises(
            CorruptCheckpoint,
            match=rf"config\.json: bridge\.encoder\.kind: {known}, got 'vq'; an encoder of your own is known",
        ):
            load(config.out)


def shown(report: dict[str, Any]) -> tuple[str, str]:
    """A report as a terminal and as a page show it."""
    console = quiet()
    console.width = 200
    console.print(table(report))
    return said(console), page(report, title="tiny", facts={})


def test_a_condition_is_a_record_that_is_measured_and_shown_with_what_it_means(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    backwards = Condition(
        "backwards", "the source from its end", lambda c, chosen: [c.examples[i].source[::-1] for i in chosen]
    )
    monkeypatch.setitem(CONDITIONS, "backwards", backwards)
    config = make(max_steps=1)
    train(config, quiet())
    context = open_context(config.out, "world", limit=2, dtype="float16", receiver=None)
    assert backwards.read(context, [1]) == [context.examples[1].source[::-1]]
    report = measure(context, conditions=["none", "backwards"])
    assert list(report["conditions"]) == ["none", "backwards"]
    assert all("backwards" in text and backwards.meaning in text for text in shown(report))


def test_a_metric_is_a_record_that_chooses_the_best_checkpoint_and_stands_in_reports(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    excess = Metric(
        "excess", "characters too many", "excess", lambda text, wanted: float(len(text) - len(wanted)),
        ("generation",), smaller_is_better=True,
    )  # fmt: skip
    monkeypatch.setitem(METRICS, "excess", excess)
    config = make(metric="excess", max_steps=2, validate_every=1, validation_examples=2)
    manifest = train(config, quiet())
    assert manifest.bridge.provenance.recipe["metric"] == "excess"
    first, second = events_of(config.out, "validation")
    assert first["metric"] == "excess" and second["best"] is (second["value"] < first["value"])
    report = measure(open_context(config.out, "world", limit=2, dtype="float16", receiver=None), conditions=["bridge"])
    row = report["conditions"]["bridge"]
    assert row["metric"] == "em" and f"{row['excess']:.3f}" in shown(report)[0]
    assert "excess" in shown(report)[0] and "characters too many" in shown(report)[1]


def test_a_metric_that_nobody_defined_is_refused_with_those_there_are() -> None:
    keys: dict[str, Any] = {"sender": "a", "receiver": "b", "task": "world", "out": "c", "metric": "bleu"}
    with pytest.raises(InvalidRequest, match=r"^metric: Input should be 'em', 'accuracy', 'token_f1' or 'loss', got"):
        read_config(None, keys)


def test_a_task_is_a_file(make: MakeConfig, tmp_path: Path) -> None:
    task = task_of(tmp_path, ("Mara sings.", "\nWho?", " Mara"), ("Ben cooks.", "\nWho?", " Ben"))
    manifest = train(make(task=task, max_steps=1), quiet())
    assert manifest.bridge.provenance.task == "few"
    context = open_context(tmp_path / "run", task, limit=None, dtype="float16", receiver=None)
    assert measure(context, conditions=["none"])["n"] == 2


class OwnConfig(TrainConfig):
    """What an objective of one's own is weighted with."""

    unsure_weight: float = 0.25


def test_an_objective_is_a_record_and_a_weight_that_are_trained_and_logged(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entropy(forward: Forward) -> Tensor:
        first = first_logits(*forward.answers)[0].float()
        return torch.special.entr(first.softmax(dim=-1)).sum(dim=-1)

    monkeypatch.setitem(OBJECTIVES, "unsure", Objective("unsure", "answers", entropy))
    plain = make(max_steps=2, alignment_steps=0)
    config = OwnConfig.model_validate(plain.model_dump() | {"out": plain.out.with_name("own"), "answer_weight": 0.5})
    manifest, without = train(config, quiet()), OwnConfig.model_validate(plain.model_dump() | {"unsure_weight": 0.0})
    for record in log_of(config.out):
        assert list(record["losses"]) == ["answer", "unsure"] and record["losses"]["unsure"] > 0
        assert record["loss"] == pytest.approx(0.5 * record["losses"]["answer"] + 0.25 * record["losses"]["unsure"])
    assert manifest.bridge.provenance.recipe["unsure_weight"] == 0.25
    train(without, quiet())
    assert [list(record["losses"]) for record in log_of(without.out)] == [["answer"]] * 2
