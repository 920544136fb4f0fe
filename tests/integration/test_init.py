"""A run that begins with the weights of a checkpoint, and knows where they come from."""

from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.checkpoint import load_bridge, read_manifest
from latentwire.bridge.errors import IncompatibleBridge, InvalidRequest, UnknownBridge
from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.evaluation.tasks import load_task
from latentwire.training.base import completed
from latentwire.training.calibration import drawn, unseen
from latentwire.training.config import TrainConfig
from latentwire.training.controls import control_config
from latentwire.training.loop import train
from tests.integration.runs import prepared, quiet
from tests.integration.test_calibration import task_of


@pytest.fixture
def first(make: Any, tmp_path: Path) -> TrainConfig:
    """A run of a few steps on a task of 200 rows, done."""
    config: TrainConfig = make(
        task=str(task_of(tmp_path, 200)), out=tmp_path / "first", max_steps=4, batch_size=8, ratio=3, validate_every=0
    )
    train(config, quiet())
    return config


def then(first: TrainConfig, **changes: Any) -> TrainConfig:
    """The run after it, which says neither models nor shapes."""
    told = {"task": first.task, "out": first.out.parent / "then", "max_steps": 4, "batch_size": 8, "validate_every": 0}
    return TrainConfig.model_validate({**told, "init": str(first.out), **changes})


def test_a_run_begins_with_the_weights_models_and_shape_of_its_checkpoint(first: TrainConfig) -> None:
    run, (_, base) = prepared(completed(then(first))), load_bridge(first.out, device=torch.device("cpu"))
    assert (run.config.sender, run.config.receiver) == (first.sender, first.receiver)
    assert (run.bridge.config.encoder, run.bridge.config.layers) == (base.config.encoder, base.config.layers)
    assert run.bridge.config.encoder.ratio == 3 and run.alignment_steps == 0
    mine, theirs = run.bridge.parameters(), base.parameters()
    assert len(mine) == len(theirs) > 4
    for one, other in zip(mine, theirs, strict=True):
        assert one.requires_grad
        torch.testing.assert_close(one.detach().cpu(), other, rtol=0, atol=0)


def test_what_its_heads_are_made_by_and_the_longest_source_stay_unless_the_run_says(make: Any, tmp_path: Path) -> None:
    settings = {"max_source_tokens": 48, "gain": True, "head_dim": 24}
    first: TrainConfig = make(task=str(task_of(tmp_path, 200)), out=tmp_path / "first", max_steps=1, **settings)
    train(first, quiet())
    went_on = completed(then(first, max_source_tokens=64))
    assert went_on.max_source_tokens == 64 and completed(then(first)).max_source_tokens == 48
    (head,) = prepared(went_on).bridge.config.heads.values()
    assert head.gain and head.hidden_dim == 24
    assert completed(then(first, receiver=first.receiver)).head_dim == 24
    elsewhere = completed(then(first, receiver=["builtin:llama"]))
    assert (elsewhere.max_source_tokens, elsewhere.gain, elsewhere.head_dim) == (48, False, None)


def test_a_checkpoint_remembers_every_run_whose_weights_it_has_and_no_gate_is_made_from_their_examples(
    first: TrainConfig,
) -> None:
    second = then(first, seed=5)
    manifest = train(second, quiet())
    assert manifest.bridge.earlier == (read_manifest(first.out).bridge.provenance,)
    assert manifest.bridge.provenance.recipe["init"] == str(first.out)
    third = train(then(first, init=str(second.out), out=first.out.parent / "third"), quiet())
    assert third.bridge.earlier == (*manifest.bridge.earlier, manifest.bridge.provenance)
    assert read_manifest(second.out) == manifest
    task = load_task(first.task)
    seen = [drawn(run, task) for run in (*manifest.bridge.earlier, manifest.bridge.provenance)]
    assert seen[0] - seen[1] and seen[1] - seen[0]
    left = {example.source for example in unseen(Bridge.load(second.out), task, first.receiver[0], 200)}
    assert left == {task.train[i].source for i in set(range(200)) - seen[0] - seen[1]}


def test_a_control_begins_anew(first: TrainConfig, tmp_path: Path) -> None:
    train(then(first), quiet())
    context = open_context(first.out.parent / "then", first.task, limit=2, dtype="float16", receiver=None)
    control = control_config("random_sender", context, tmp_path / "control")
    assert control.init is None and control.ratio == 3


def test_what_does_not_go_together_is_one_sentence(
    first: TrainConfig, make: Any, model_folders: dict[str, Path]
) -> None:
    with pytest.raises(UnknownBridge, match="no checkpoint at"):
        prepared(completed(then(first, init=str(first.out.parent / "nowhere"))))
    with pytest.raises(IncompatibleBridge, match="the bridge was trained with sender"):
        prepared(completed(then(first, sender=str(model_folders["gpt2"]), receiver=first.receiver)))
    with pytest.raises(InvalidRequest, match=r"--init .*: its head is of another shape"):
        prepared(completed(then(first, head_dim=96)))
    with pytest.raises(ValueError, match="--init begins with a whole bridge's weights, --add-receiver keeps them"):
        then(first, add_receiver="builtin:llama", bridge="builtin")
    for changes, message in (
        ({"ratio": 8}, "ratio 8: the bridge at .* has 3"),
        ({"layer": [1]}, r"layer \[1\]: the bridge at .* has \["),
        ({"encoder": "perceiver"}, "encoder 'perceiver': the bridge at .* has 'pooling'"),
        ({"depth": 0}, "depth 0: the bridge at .* has 1"),
        ({"layer_mix": True}, "layer_mix True: the bridge at .* has False"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            completed(then(first, **changes))
    assert completed(then(first, ratio=3, encoder="pooling")).ratio == 3
    for folder in (first.out, first.out / "best"):
        with pytest.raises(ValueError, match=r"--out .* would replace the weights of --init .*; give another --out"):
            then(first, init=str(folder), out=first.out)
    with pytest.raises(ValueError, match="sender and receiver are needed"):
        then(first, init=None)


def test_a_run_goes_on_from_the_weights_it_began_with_and_from_no_others(first: TrainConfig) -> None:
    second = then(first, max_steps=3)
    train(second, quiet())
    train(first.model_copy(update={"seed": 1}), quiet(), overwrite=True)
    with pytest.raises(InvalidRequest, match=r"--resume: bridge_extended was '[0-9a-f]{32}', now '[0-9a-f]{32}'"):
        train(second, quiet(), resume=True)
